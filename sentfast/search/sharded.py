"""A corpus that is spread over the processes of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from sentfast.ops import checks
from sentfast.search import arguments
from sentfast.search.corpus import Corpus
from sentfast.search.results import Stats, TopK, best


class ShardedCorpus:
    """The rows of all processes of a group, in the order of their ranks. Every process searches its own rows.

    Args:
        corpus: this process's rows; as many columns in every process.
        group: a ``torch.distributed`` group that can send CPU tensors (gloo); None for the default one.
    """

    def __init__(self, corpus: Corpus, group: Any = None):
        if not isinstance(corpus, Corpus):
            raise TypeError(f"corpus: expected a Corpus, got {checks.describe(corpus)}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ShardedCorpus: expected torch.distributed.init_process_group to have been called")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group: expected a torch.distributed group or None, got {checks.describe(group)}")
        self.corpus, self.group = corpus, group
        shapes = _gathered((len(corpus), corpus.dim), group)
        if len({columns for _, columns in shapes}) > 1:
            raise ValueError(f"corpus: expected as many columns in every process, got {[c for _, c in shapes]}")
        lengths = [length for length, _ in shapes]
        self.first = sum(lengths[: dist.get_rank(group)])  # number of this process's first row
        self._length = sum(lengths)

    def __len__(self) -> int:
        return self._length

    @property
    def dim(self) -> int:
        return self.corpus.dim

    def topk(
        self,
        queries: Any,
        k: int,
        *,
        metric: str | None = None,
        threshold: float | None = None,
        ceiling: Any = None,
        progress: bool = False,
    ) -> TopK:
        """The k best rows of all processes, the same result in each: see :func:`sentfast.search.topk`.

        Every process makes the same call with the same queries.
        """
        wanted = arguments.queries(queries, self.dim, self.corpus.device)
        k = checks.whole("k", k, 1, len(self))
        local = self.corpus.topk(
            wanted,
            min(k, len(self.corpus)),
            metric=metric,
            threshold=threshold,
            ceiling=ceiling,
            progress=progress,
        )
        indices = torch.where(local.indices >= 0, local.indices + self.first, -1)
        parts = _gathered((local.scores.cpu(), indices.cpu(), local.stats), self.group)
        scores, indices = best(torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1), k)
        device = self.corpus.device
        result = TopK(scores.to(device), indices.to(device), sum((p[2] for p in parts), Stats()))
        return result.numpy() if arguments.wants_numpy(queries) else result


def _gathered(value: Any, group: Any) -> list[Any]:
    """The value of every process, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
