"""Searching a corpus that lies in segments, some queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sentfast import native
from sentfast.ops import search as ops
from sentfast.search.results import Stats, best

_CALL_PRODUCTS = 1 << 37  # multiply-adds of one operator call: half a second or less, so that a search can be stopped
_GPU_CALL_PRODUCTS = 1 << 42
_LEAST_QUERIES = 256
# Queries from which on packing rows for one search pays, with instructions for products of bytes and without.
_WORTH_PACKING = {"avx512_vnni": 192, "avx512_bf16": 192}
_WORTH_PACKING_OTHERWISE = 512
_NARROWEST = 8  # columns; codes of fewer tell too few rows apart
_SMALL = 1 << 22  # products of a search too small for that

Excluded = tuple[Tensor, Tensor]
Found = tuple[Tensor, Tensor]


class Segment(NamedTuple):
    """Rows of a corpus that are packed together.

    first: number of the first of them in the corpus.
    bound: largest distance of a packed row from the row itself, which has length 1; 0 for rows that are not packed.
    """

    rows: Tensor
    packed: ops.Packed | None
    first: int
    bound: float


def segment(rows: Tensor, packed: ops.Packed | None, first: int = 0) -> Segment:
    return Segment(rows, packed, first, 0.0 if packed is None else float(packed.factors[:, 1].max()))


def for_one_search(rows: Tensor, queries: int) -> Segment:
    """Rows that are searched once: packed if that takes less time than it saves, which it never does on a GPU."""
    least = _WORTH_PACKING.get(native.isa(), _WORTH_PACKING_OTHERWISE)
    many = rows.is_cpu and queries >= least and queries * rows.numel() >= _SMALL and rows.shape[1] >= _NARROWEST
    return segment(rows, ops.pack(rows) if many and rows.shape[1] <= ops.MOST_INT8_DIMENSIONS else None)


def slices(queries: Tensor, rows: int, progress: str = "") -> Iterator[slice]:
    """The queries of one operator call after the other. A KeyboardInterrupt is raised between two of them."""
    step = height(rows, queries.shape[1], queries.device)
    shown = bar(len(queries), progress) if progress else None
    try:
        for start in range(0, len(queries), step):
            part = slice(start, min(start + step, len(queries)))
            yield part
            if shown is not None:
                shown.update(part.stop - part.start)
    finally:
        if shown is not None:
            shown.close()


def height(rows: int, columns: int, device: torch.device) -> int:
    """The most queries of one operator call."""
    products = _CALL_PRODUCTS if device.type == "cpu" else _GPU_CALL_PRODUCTS
    return max(_LEAST_QUERIES, products // max(1, rows * columns))


def bar(total: int, text: str) -> Any:
    """The progress bar that sentence-transformers shows."""
    from tqdm.autonotebook import tqdm

    return tqdm(total=total, desc=text)


def topk(
    segments: list[Segment],
    queries: Tensor,
    k: int,
    metric: str,
    *,
    threshold: float | Tensor | None = None,
    highest: Tensor | None = None,
    excluded: Excluded | None = None,
    progress: str = "",
) -> tuple[Tensor, Tensor, Stats]:
    """The k best rows of all segments: scores [Q, k], their numbers [Q, k], and what the search did."""
    limits = threshold, highest, excluded
    if len(segments) == 1 and len(queries) <= _LEAST_QUERIES and not progress:  # one call, in the fewest steps
        found, stats = _one(segments[0], queries, slice(0, len(queries)), k, metric, *limits)
        return *found, stats
    scores = queries.new_empty(len(queries), k)
    numbers = torch.empty_like(scores, dtype=torch.int64)
    stats = Stats()
    for part in slices(queries, _rows(segments), progress):
        best_yet: Found | None = None
        for one in segments:
            lowest = _lowest(threshold, part, best_yet, k)
            found, more = _one(one, queries[part], part, k, metric, lowest, highest, excluded)
            best_yet = found if best_yet is None else _merged(best_yet, found, k)
            stats += more
        assert best_yet is not None
        scores[part], numbers[part] = best_yet
    return scores, numbers, stats


def _one(
    one: Segment,
    queries: Tensor,
    part: slice,
    k: int,
    metric: str,
    lowest: float | Tensor | None,
    highest: Tensor | None,
    excluded: Excluded | None,
) -> tuple[Found, Stats]:
    """The best rows of one segment for some of the queries."""
    result = ops.topk(
        queries,
        one.rows,
        one.packed,
        k=min(k, len(one.rows)),
        metric=metric,
        threshold=lowest,
        highest=None if highest is None else highest[part],
        excluded=None if excluded is None else _excluded(excluded, part, one),
    )
    ids = torch.where(result.ids >= 0, result.ids + one.first, -1) if one.first else result.ids
    return (result.scores, ids), Stats.of(result.statistics, one.bound)


def _merged(one: Found, other: Found, k: int) -> Found:
    return best(torch.cat([one[0], other[0]], dim=1), torch.cat([one[1], other[1]], dim=1), k)


def _rows(segments: list[Segment]) -> int:
    return sum(len(one.rows) for one in segments)


def _lowest(threshold: float | Tensor | None, part: slice, found: Found | None, k: int) -> float | Tensor | None:
    """A later segment's rows have to reach the k-th score so far, too."""
    given = threshold[part] if isinstance(threshold, Tensor) else threshold
    if found is None or found[0].shape[1] < k:
        return given
    last = found[0][:, -1].contiguous()
    return last if given is None else last.clamp(min=given)


def _excluded(excluded: Excluded, part: slice, segment: Segment) -> Excluded:
    """The ids of these queries that lie in the segment."""
    offsets, ids = excluded
    ends = offsets[part.start : part.stop + 1]
    mine = ids[ends[0] : ends[-1]]
    inside = (mine >= segment.first) & (mine < segment.first + len(segment.rows))
    before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    return before[ends - ends[0]], mine[inside] - segment.first


def pairs_above(
    segments: list[Segment],
    queries: Tensor,
    threshold: float | Tensor,
    metric: str,
    *,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Stats]:
    """Pairs of at least `threshold` for queries of one operator call: their number per query, rows, scores, statistics.

    first: the queries are the rows from there on, within one segment, and only later rows are paired.
    """
    counts = queries.new_zeros(len(queries), dtype=torch.int64)
    which, rows, scores, stats = [], [], [], Stats()
    for one in segments:
        own = None
        if first is not None:
            own = first - one.first
            if own >= len(one.rows):
                continue
            own = own if own >= 0 else None
        found = ops.pairs_above(queries, one.rows, one.packed, threshold=threshold, metric=metric, first=own)
        stats += Stats.of(found.statistics, one.bound)
        lengths = found.offsets.diff()
        counts += lengths
        which.append(torch.repeat_interleave(torch.arange(len(queries), device=queries.device), lengths))
        rows.append(found.ids + one.first)
        scores.append(found.scores)
    if len(which) == 1:
        return counts, rows[0], scores[0], stats
    order = torch.cat(which).argsort(stable=True)
    return counts, torch.cat(rows)[order], torch.cat(scores)[order], stats


def count_above(
    segments: list[Segment], queries: Tensor, threshold: float | Tensor, metric: str, progress: str = ""
) -> tuple[Tensor, Stats]:
    """The number of rows of at least `threshold` for each query, and the statistics."""
    counts, stats = queries.new_zeros(len(queries), dtype=torch.int64), Stats()
    for part in slices(queries, _rows(segments), progress):
        limit = threshold[part] if isinstance(threshold, Tensor) else threshold
        for one in segments:
            found = ops.count_above(queries[part], one.rows, one.packed, threshold=limit, metric=metric)
            counts[part] += found.counts
            stats += Stats.of(found.statistics, one.bound)
    return counts, stats


def evenly(rows: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: numbers of rows from the first to the last."""
    return torch.arange(count, device=device) * (rows - 1) // max(count - 1, 1)
