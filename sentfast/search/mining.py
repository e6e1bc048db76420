"""The best pairs of a corpus with itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sentfast.ops import checks
from sentfast.search import arguments, segments
from sentfast.search.corpus import Corpus
from sentfast.search.functions import Metric, searched
from sentfast.search.results import Stats, TopPairs

_SAMPLE = 256  # rows whose scores say where the threshold may lie
_MARGIN = 1.25  # so many times the pairs that are wanted are aimed at
_PAIRS_AT_ONCE = 1 << 21  # 40 MB while they are put in order


def top_pairs(corpus: Any, count: int, *, metric: Metric | None = None, progress: bool = False) -> TopPairs:
    """The `count` best pairs of different rows, best first; equal scores by the first row, then by the second.

    A threshold is estimated from a sample of the rows, and each row is paired with those after it. The threshold rises
    as better pairs are found; had it been too high, the search starts again below it. So the result is exact.

    Args:
        corpus: [N, D] rows or a :class:`Corpus`, N >= 2.
        count: at least 1; there are N (N - 1) / 2 pairs.
        metric, progress: as of :func:`sentfast.search.topk`.

    Returns:
        :class:`TopPairs` of ``min(count, N (N - 1) / 2)`` pairs, fewer where scores are NaN.

    Raises: as :func:`sentfast.search.topk`.
    """
    within = corpus if isinstance(corpus, Corpus) else arguments.rows("corpus", corpus)
    within = searched(within, len(within))
    checks.flag("progress", progress)
    count = min(checks.whole("count", count, 1), len(within) * (len(within) - 1) // 2)
    wanted = within.metric_of(metric)
    aim, stats = _MARGIN, Stats()
    while True:
        limit = _estimate(within, wanted, count, aim)
        pool = _Pool(count, limit, within.device)
        for rows, first in _blocks(within, pool, progress):
            found = segments.pairs_above(within.segments, rows, pool.limit, wanted, first=first)
            stats += found[-1]
            pool.add(first, *found[:3])
        if len(pool) == count or limit == -float("inf"):
            break
        aim = aim * 4 if aim < 1e6 else float("inf")
    within.stats += stats
    result = TopPairs(*pool.best(), stats)
    return result.numpy() if arguments.wants_numpy(corpus) else result


class _Pool:
    """The best pairs so far, and the score that another one has to reach."""

    def __init__(self, count: int, limit: float, device: torch.device):
        self.count, self.limit = count, limit
        self._scores = torch.empty(0, dtype=torch.float32, device=device)
        self._first, self._second = self._scores.long(), self._scores.long()
        self.last = 0  # pairs that the last rows brought
        self.last_rows = 0

    def __len__(self) -> int:
        return min(self.count, len(self._scores))

    def add(self, first: int, counts: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Pairs of rows after those of all earlier calls: among equal scores the earlier pairs come first."""
        self.last, self.last_rows = len(rows), len(counts)
        own = torch.repeat_interleave(torch.arange(first, first + len(counts), device=counts.device), counts)
        self._scores = torch.cat([self._scores, scores])
        self._first, self._second = torch.cat([self._first, own]), torch.cat([self._second, rows])
        if len(self._scores) > self.count + min(self.count, _PAIRS_AT_ONCE):
            self._cut()

    def _cut(self) -> None:
        order = self._scores.sort(descending=True, stable=True).indices[: self.count]
        if len(order) == self.count:
            # A later pair of the same score would come after all of these.
            last = self._scores[order[-1]]
            self.limit = max(self.limit, float(torch.nextafter(last, torch.full_like(last, float("inf")))))
        order = order.sort().values  # by row again
        self._scores, self._first, self._second = self._scores[order], self._first[order], self._second[order]

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        order = self._scores.sort(descending=True, stable=True).indices[: self.count]
        return self._scores[order], self._first[order], self._second[order]


def _blocks(within: Corpus, pool: _Pool, progress: bool):
    """Rows with the number of the first of them: as many as bring pairs for one block, going by the last ones."""
    bar = segments.bar(len(within), "Pairing") if progress else None
    most = segments.height(len(within), within.dim, within.device)
    try:
        for segment in within.segments:
            start = 0
            while start < len(segment.rows):
                per_row = pool.last / pool.last_rows if pool.last_rows else len(within)
                height = int(min(_PAIRS_AT_ONCE / (per_row + 1), 4 * pool.last_rows or most, most))
                rows = segment.rows[start : start + max(16, height)]
                yield rows, segment.first + start
                start += len(rows)
                if bar is not None:
                    bar.update(len(rows))
    finally:
        if bar is not None:
            bar.close()


def _estimate(within: Corpus, metric: str, count: int, aim: float) -> float:
    """A threshold above which about `aim` times `count` pairs lie, going by a sample of the rows."""
    size = len(within)
    sample = min(_SAMPLE, size)
    places = count * aim * 2 / size * sample  # of the sample's scores; each pair stands in two rows
    k = min(size, int(4 * places / sample) + 33)
    if places >= sample * (size - 1) * 0.5 or k * sample > _PAIRS_AT_ONCE:
        return -float("inf")
    numbers = segments.evenly(size, sample, within.device)
    queries = within.rows(numbers.tolist())
    own = torch.arange(sample + 1, device=within.device), numbers
    scores, _, _ = segments.topk(within.segments, queries, k, metric, excluded=own)
    ordered = scores.flatten().sort(descending=True).values
    return float(ordered[min(int(places), len(ordered) - 1)])
