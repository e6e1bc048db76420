"""The pairs that paraphrase mining keeps: those of sentence-transformers' bounded heap, without the heap."""

from __future__ import annotations

import numpy as np


class BestPairs:
    """The best pairs out of the nearest rows of each row.

    A heap of `cap` entries drops the smallest (score, i, j) whenever one more comes in, and takes no entry with the
    score that was dropped last or a lower one. What it holds in the end follows from the entries alone: all above the
    cap-th score, and of those with that score the largest (i, j) among the first cap + 1 entries that reach it.

    Args:
        rows: the number of rows.
        most: entries to keep.
        once: a pair enters once, and from -inf on (6.2). Else in both directions and from -1 on, with one place less,
            and is made one pair at the end.
        limit: entries below it are left out; right if the pairs are `full` in the end.
    """

    def __init__(self, rows: int, most: int, once: bool, limit: float = -np.inf):
        self.once = once
        self.cap = most if once else most - 1
        least = float(np.nextafter(np.float32(-np.inf if once else -1), np.float32(np.inf)))
        self.limit = max(limit, least)
        self._scores = np.empty(0, np.float32)
        self._first = np.empty(0, np.int64)
        self._second = np.empty(0, np.int64)
        self._last_scores = np.empty(rows, np.float32)
        self._last_rows = np.empty(rows, np.int64)

    @property
    def full(self) -> bool:
        """Whether there were as many entries as are kept."""
        return len(self._scores) >= self.cap

    def add(self, start: int, scores: np.ndarray, indices: np.ndarray) -> None:
        """The nearest rows of the rows from `start` on, as a search returns them."""
        first = np.arange(start, start + len(scores))
        if self.once:
            self._last_scores[first], self._last_rows[first] = scores[:, -1], indices[:, -1]
        keep = (indices >= 0) & (indices != first[:, None]) & (scores >= self.limit)
        if self.once:
            keep &= ~self._came_before(first[:, None], indices, scores)
        number = np.broadcast_to(first[:, None], indices.shape)[keep]
        self._scores = np.concatenate([self._scores, scores[keep]])
        self._first = np.concatenate([self._first, number])
        self._second = np.concatenate([self._second, indices[keep]])
        if len(self._scores) > 2 * self.cap + 2:
            self._cut()

    def _came_before(self, first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Whether an earlier row has found this one: it finds all rows that are no worse than its last."""
        last, row = self._last_scores[second], self._last_rows[second]
        found = (row < 0) | (scores > last) | ((scores == last) & (first <= row))
        return (second < first) & found

    def _cut(self) -> None:
        """Drops the entries that cannot be in the result whatever comes."""
        if self.cap <= 0:
            keep = np.zeros(len(self._scores), dtype=bool)
        elif len(self._scores) > self.cap:
            last = np.partition(self._scores, -self.cap)[-self.cap]
            self.limit = max(self.limit, float(last))
            reach = self._scores >= last
            early = np.cumsum(reach) <= self.cap + 1
            keep = (self._scores > last) | (reach & early)
        else:
            return
        self._scores, self._first, self._second = self._scores[keep], self._first[keep], self._second[keep]

    def result(self) -> list[list[float | int]]:
        """[score, i, j] with i < j, by score descending, then by i and j (not `once`: in the direction found first)."""
        self._cut()
        low, high = np.minimum(self._first, self._second), np.maximum(self._first, self._second)
        one, two = (low, high) if self.once else (self._first, self._second)
        order = np.lexsort((two, one, self._scores))[::-1][: max(0, self.cap)]  # of equal scores, the largest rows
        order = order[np.lexsort((two[order], one[order], -self._scores[order]))]
        scores, low, high = self._scores[order], low[order], high[order]
        if not self.once and len(low):
            # The first of the two directions, in the order of the rows.
            _, first = np.unique(low * (high.max() + 1) + high, return_index=True)
            first.sort()
            scores, low, high = scores[first], low[first], high[first]
        return list(map(list, zip(scores.tolist(), low.tolist(), high.tolist(), strict=True)))
