"""Exact search in Triton: the blocks of rows that the bounds cannot decide are scored exactly, the best are kept.

A slice of the queries at a time; for each, the host waits once for the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sentfast.reference import search as definition
from sentfast.registry import implements

from .search_tiles import Found, Rows, bounds, exact, prepare
from .triton_utils import on_device

_BOUNDS = 1 << 22  # of blocks of rows, held at a time in two float32 each
_VALUES = 1 << 21  # of queries that are looked at together
_SCORES = 1 << 20  # exact ones that are held at a time
_DENSE = 0.25  # the share of blocks from which on every pair is scored


def _undecided(queries: Tensor, rows: Rows, upper: Tensor, limit: Tensor) -> Iterator[Found] | None:
    """The pairs of the blocks that reach the limit of their query, some at a time; None where there are too many."""
    which, block = (upper >= limit.unsqueeze(1)).nonzero(as_tuple=True)
    if len(which) > _DENSE * upper.numel():
        return None
    step = _SCORES // rows.block
    starts = range(0, max(1, len(which)), step)
    return (exact(queries, rows, which[i : i + step], block[i : i + step]) for i in starts)


def _slices(queries: Tensor, blocks: int) -> Iterator[slice]:
    height = max(1, min(_BOUNDS // blocks, _VALUES // queries.shape[1]))
    height = height // 128 * 128 or height  # whole tiles
    return (slice(i, min(i + height, len(queries))) for i in range(0, len(queries), height))


def _statistics(queries: Tensor, pairs: int) -> Tensor:
    return torch.tensor([pairs, 0, 0, 0], device=queries.device)


def _fell_back(statistics: Tensor, queries: int) -> Tensor:
    statistics[2] = queries
    return statistics


def _excluded_keys(offsets: Tensor | None, excluded: Tensor | None, count: int) -> Tensor | None:
    """Excluded pairs as rising numbers."""
    if offsets is None or excluded is None or not len(excluded):
        return None
    which = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff())
    return which * count + excluded


def _is_in(keys: Tensor, values: Tensor) -> Tensor:
    place = torch.searchsorted(keys, values).clamp(max=len(keys) - 1)
    return keys[place] == values


def _best(found: Found, k: int) -> tuple[Found, Tensor]:
    """The k best of each query, by score and among equal ones as they stand; and the place of each."""
    order = found.scores.sort(descending=True, stable=True).indices
    order = order[found.which[order].sort(stable=True).indices]
    which = found.which[order]
    place = torch.arange(len(which), device=which.device) - torch.searchsorted(which, which)
    kept = order[place < k]
    return Found(*(x[kept] for x in found)), place[place < k]


def _kth_lower(lower: Tensor, k: int, excluded: Tensor | None) -> Tensor:
    """A score that k rows reach which are not excluded, float32 [Q]: -inf where there are too few blocks."""
    wanted = torch.full((len(lower),), k, device=lower.device) if excluded is None else k + excluded
    most = min(lower.shape[1], k if excluded is None else int(wanted.max()))
    best = lower.topk(most, dim=1).values
    limit = best.gather(1, (wanted - 1).clamp(max=most - 1).unsqueeze(1)).squeeze(1)
    return limit.masked_fill(wanted > most, float("-inf"))


@implements("search_pack")
def search_pack(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own operations: a corpus is packed once."""
    return definition.search_pack(rows, bits)


@implements("search_topk")
def search_topk(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    k: int,
    metric: int,
    lowest: Tensor | None,
    highest: Tensor | None,
    excluded_offsets: Tensor | None,
    excluded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = _statistics(queries, 0)
    scores = queries.new_full((len(queries), k), float("-inf"))
    ids = torch.full_like(scores, -1, dtype=torch.int64)
    with on_device(queries):
        rows = prepare(corpus, codes, factors, center, metric, k)
        for part in _slices(queries, rows.blocks):
            limits = [None if x is None else x[part] for x in (lowest, highest)]
            left_out = None
            if excluded_offsets is not None and excluded is not None:
                ends = excluded_offsets[part.start : part.stop + 1]
                left_out = ends - ends[0], excluded[ends[0] : ends[-1]]
            found = _topk(queries[part], rows, k, limits[0], limits[1], left_out)
            scores[part], ids[part] = found[:2]
            statistics += found[2]
    return scores, ids, statistics


def _topk(
    queries: Tensor,
    rows: Rows,
    k: int,
    lowest: Tensor | None,
    highest: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    offsets, left_out = excluded or (None, None)
    undecided = None
    if k <= rows.blocks * _DENSE:
        lower, upper = bounds(queries, rows, highest, True)
        assert lower is not None
        limit = _kth_lower(lower, k, None if offsets is None else offsets.diff())
        undecided = _undecided(queries, rows, upper, limit if lowest is None else torch.maximum(limit, lowest))
    if undecided is None:
        found = definition.search_topk(
            queries, rows.values, None, None, None, k, rows.metric, lowest, highest, offsets, left_out
        )
        return *found[:2], _fell_back(found[2], len(queries))
    keys = _excluded_keys(offsets, left_out, len(rows.values))
    statistics = _statistics(queries, len(queries) * len(rows.values))
    none = torch.empty(0, dtype=torch.int64, device=queries.device)
    best, place = Found(none, none, queries.new_empty(0)), none
    for some in undecided:
        allowed = torch.ones_like(some.scores, dtype=torch.bool)
        if keys is not None:
            allowed = ~_is_in(keys, some.which * len(rows.values) + some.ids)
        statistics[1] += len(some.ids)
        statistics[3] += (some.scores.isnan() & allowed).sum()
        allowed &= ~some.scores.isnan()
        if lowest is not None:
            allowed &= some.scores >= lowest[some.which]
        if highest is not None:
            allowed &= some.scores <= highest[some.which]
        # Earlier rows come first.
        together = Found(*(torch.cat([x, y[allowed]]) for x, y in zip(best, some, strict=True)))
        best, place = _best(together, k)
    scores = queries.new_full((len(queries), k), float("-inf"))
    ids = torch.full_like(scores, -1, dtype=torch.int64)
    scores[best.which, place], ids[best.which, place] = best.scores, best.ids
    return scores, ids, statistics


@implements("search_pairs")
def search_pairs(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    lowest: Tensor,
    metric: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = torch.empty(0, dtype=torch.int64, device=queries.device)
    counts, ids, scores = [none.new_zeros(1)], [none], [queries.new_empty(0)]
    statistics = _statistics(queries, 0)
    with on_device(queries):
        rows = prepare(corpus, codes, factors, center, metric, 1, first)
        for part in _slices(queries, rows.blocks):
            own = rows if first < 0 else rows._replace(first=first + part.start)
            lengths, found, values, more = _pairs(queries[part], own, lowest[part])
            counts.append(lengths)
            ids.append(found)
            scores.append(values)
            statistics += more
    return torch.cat(counts).cumsum(0), torch.cat(ids), torch.cat(scores), statistics


def _pairs(queries: Tensor, rows: Rows, lowest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The number of pairs of each query, their rows, scores, statistics."""
    undecided = _undecided(queries, rows, bounds(queries, rows, None, False)[1], lowest)
    if undecided is None:
        ends, *found, more = definition.search_pairs(
            queries, rows.values, None, None, None, lowest, rows.metric, rows.first
        )
        return ends.diff(), found[0], found[1], _fell_back(more, len(queries))
    pairs = len(queries) * len(rows.values)
    if rows.first >= 0:
        pairs -= sum(range(rows.first + 1, rows.first + 1 + len(queries)))
    statistics = _statistics(queries, pairs)
    parts = []
    for some in undecided:
        reach = some.scores >= lowest[some.which]
        statistics[1] += len(some.ids)
        statistics[3] += some.scores.isnan().sum()
        parts.append([x[reach] for x in some])
    which, ids, scores = (torch.cat(x) for x in zip(*parts, strict=True))
    numbers = torch.arange(len(queries) + 1, device=queries.device)
    return torch.searchsorted(which, numbers).diff(), ids, scores, statistics


@implements("search_count")
def search_count(
    queries: Tensor,
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    lowest: Tensor,
    metric: int,
) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    statistics = _statistics(queries, 0)
    with on_device(queries):
        rows = prepare(corpus, codes, factors, center, metric, 1)
        for part in _slices(queries, rows.blocks):
            counts[part], more = _count(queries[part], rows, lowest[part])
            statistics += more
    return counts, statistics


def _count(queries: Tensor, rows: Rows, lowest: Tensor) -> tuple[Tensor, Tensor]:
    undecided = _undecided(queries, rows, bounds(queries, rows, None, False)[1], lowest)
    if undecided is None:
        counts, more = definition.search_count(queries, rows.values, None, None, None, lowest, rows.metric)
        return counts, _fell_back(more, len(queries))
    statistics = _statistics(queries, len(queries) * len(rows.values))
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    numbers = torch.arange(len(queries) + 1, device=queries.device)
    for some in undecided:
        statistics[1] += len(some.ids)
        statistics[3] += some.scores.isnan().sum()
        counts += torch.searchsorted(some.which[some.scores >= lowest[some.which]], numbers).diff()
    return counts, statistics
