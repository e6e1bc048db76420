"""What the search functions return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sentfast.ops.search import Statistics


@dataclass(frozen=True)
class Stats:
    """What a search did: the certificate that its result is exact.

    A pair is left out by the first pass only if its packed score plus the bound of the packing's error is below a score
    that is in the result. All others are scored from the rows themselves.

    Attributes:
        pairs: pairs of a query and a row that were looked at: all of them, unless one was excluded.
        scored: pairs that the bound could not decide; their exact score was computed.
        fallbacks: queries for which the packed rows were too coarse and the rows themselves were scanned.
        nans: pairs whose score is NaN; they are below every other pair and never in a result.
        bound: largest distance of a packed row, scaled to length 1, from the row itself; 0 without packed rows.
    """

    pairs: int = 0
    scored: int = 0
    fallbacks: int = 0
    nans: int = 0
    bound: float = 0.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.pairs + other.pairs,
            self.scored + other.scored,
            self.fallbacks + other.fallbacks,
            self.nans + other.nans,
            max(self.bound, other.bound),
        )

    @staticmethod
    def of(statistics: Statistics, bound: float) -> Stats:
        return Stats(statistics.pairs, statistics.scored, statistics.fallbacks, statistics.nans, bound)


class TopK(tuple):
    """``(scores, indices)`` of a search, with its :class:`Stats` as ``.stats``.

    scores: float32 [Q, k], best first; -inf where there is no pair.
    indices: int64 [Q, k]; -1 where there is no pair.
    """

    stats: Stats

    def __new__(cls, scores: Any, indices: Any, stats: Stats) -> TopK:
        self = super().__new__(cls, (scores, indices))
        self.stats = stats
        return self

    def __getnewargs__(self) -> tuple[Any, Any, Stats]:
        return self[0], self[1], self.stats

    @property
    def scores(self) -> Any:
        return self[0]

    @property
    def indices(self) -> Any:
        return self[1]

    def numpy(self) -> TopK:
        return TopK(self.scores.cpu().numpy(), self.indices.cpu().numpy(), self.stats)


class Pairs(NamedTuple):
    """Pairs above a threshold: those of query i stand at ``offsets[i]`` to ``offsets[i + 1]``, by index.

    offsets: int64 [Q + 1]. indices: int64 [pairs]. scores: float32 [pairs].
    """

    offsets: Any
    indices: Any
    scores: Any
    stats: Stats

    def numpy(self) -> Pairs:
        offsets, indices, scores = (x.cpu().numpy() for x in self[:3])
        return Pairs(offsets, indices, scores, self.stats)


class TopPairs(NamedTuple):
    """The best pairs of a self-join, best first; equal scores by the first row, then by the second.

    scores: float32 [P]. first, second: int64 [P], first < second.
    """

    scores: Any
    first: Any
    second: Any
    stats: Stats

    def numpy(self) -> TopPairs:
        scores, first, second = (x.cpu().numpy() for x in self[:3])
        return TopPairs(scores, first, second, self.stats)


def best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, of candidates in which equal scores stand by rising index; -1 is no candidate."""
    # A missing candidate has the score -inf, and so may a real one.
    keys = scores.double().clamp(min=-1e300).masked_fill(indices < 0, float("-inf"))
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


def empty_topk(queries: int, k: int) -> tuple[Tensor, Tensor]:
    scores = torch.full((queries, k), float("-inf"), dtype=torch.float32, device="cpu")
    return scores, torch.full((queries, k), -1, dtype=torch.int64, device="cpu")
