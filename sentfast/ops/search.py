"""Exact search over many rows: the k best, the pairs above a threshold, and how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks
from sentfast.reference import search as definition
from sentfast.registry import define

METRICS = {"cos": reference.COSINE, "dot": reference.DOT, "euclidean": reference.EUCLIDEAN}
BITS = {"int8": 8, "bf16": 16}  # of the codes of packed rows
PRECISIONS = (*BITS, "fp32")
MOST_ROWS = 2**31 - 1
MOST_INT8_DIMENSIONS = 32768  # whose sums of products of codes are an int32

_INPUTS = "Tensor queries, Tensor corpus, Tensor? codes, Tensor? factors, Tensor? center"


class Packed(NamedTuple):
    """The rows of a corpus as codes, for the first pass of a search.

    Row j = 64 * p + r is norm * (center + scale * codes + residual); codes are 0 where the norm is 0 or not finite.

    codes: for int8 uint8 [P, G, 64, 4], P = ceil(N / 64), G = ceil(D / 4): codes[p, g, r, i] is the code of dimension
        4 * g + i, plus 128. For bf16 bfloat16 [P, G, 64, 2], G = ceil(D / 2), the scale being 1. Codes of 0 in places
        beyond N and D.
    factors: float32 [P, 6, 64]: per row the scale; the norms, rounded up, of the residual and of scale * codes; the
        norm of the row itself; the product of center and what the unit row is off center; what the norm is off its
        float32. 0 beyond N.
    center: float32 [D], near the mean of the rows divided by their norms, and not longer than 1.
    """

    codes: Tensor
    factors: Tensor
    center: Tensor


class Statistics(NamedTuple):
    """What a search did."""

    pairs: int  # of a query and a row that were looked at
    scored: int  # pairs that the bounds could not decide, or that were wanted: their exact score was computed
    fallbacks: int  # queries that scanned some rows in float32 or float64, because their bounds were too wide
    nans: int  # pairs whose score is NaN


class TopK(NamedTuple):
    scores: Tensor  # float32 [Q, k], -inf where there is no pair
    ids: Tensor  # int64 [Q, k], -1 where there is no pair
    statistics: Statistics


class Pairs(NamedTuple):
    offsets: Tensor  # int64 [Q + 1]
    ids: Tensor  # int64, rising within a query
    scores: Tensor  # float32
    statistics: Statistics


class Counts(NamedTuple):
    counts: Tensor  # int64 [Q]
    statistics: Statistics


def pack_fake(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of :class:`Packed`."""
    group = definition.SEARCH_GROUPS[bits]
    panels = (rows.shape[0] + definition.SEARCH_PANEL - 1) // definition.SEARCH_PANEL
    groups = (rows.shape[1] + group - 1) // group
    dtype = torch.uint8 if bits == 8 else torch.bfloat16
    codes = rows.new_empty((panels, groups, definition.SEARCH_PANEL, group), dtype=dtype)
    return (
        codes,
        rows.new_empty((panels, definition.SEARCH_FACTORS, definition.SEARCH_PANEL)),
        rows.new_empty(rows.shape[1]),
    )


def _statistics_fake(queries):
    return queries.new_empty(4, dtype=torch.int64)


def _topk_fake(queries, corpus, codes, factors, center, k, metric, lowest, highest, excluded_offsets, excluded):
    scores = queries.new_empty((queries.shape[0], k))
    return scores, torch.empty_like(scores, dtype=torch.int64), _statistics_fake(queries)


def _pairs_fake(queries, corpus, codes, factors, center, lowest, metric, first):
    size = torch.library.get_ctx().new_dynamic_size()
    ids = queries.new_empty(size, dtype=torch.int64)
    offsets = queries.new_empty(queries.shape[0] + 1, dtype=torch.int64)
    return offsets, ids, queries.new_empty(size), _statistics_fake(queries)


def _count_fake(queries, corpus, codes, factors, center, lowest, metric):
    return queries.new_empty(queries.shape[0], dtype=torch.int64), _statistics_fake(queries)


_pack = define(
    "search_pack(Tensor rows, int bits) -> (Tensor, Tensor, Tensor)", reference=definition.search_pack, fake=pack_fake
)
_topk = define(
    f"search_topk({_INPUTS}, int k, int metric, Tensor? lowest, Tensor? highest,"
    " Tensor? excluded_offsets, Tensor? excluded) -> (Tensor, Tensor, Tensor)",
    reference=definition.search_topk,
    fake=_topk_fake,
)
_pairs = define(
    f"search_pairs({_INPUTS}, Tensor lowest, int metric, int first) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=definition.search_pairs,
    fake=_pairs_fake,
)
_count = define(
    f"search_count({_INPUTS}, Tensor lowest, int metric) -> (Tensor, Tensor)",
    reference=definition.search_count,
    fake=_count_fake,
)


def _check_rows(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {checks.describe(x)}")
    if x.dtype != torch.float32 or x.layout != torch.strided:
        raise TypeError(f"{name}: expected dense float32, got {checks.describe(x)}")
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [rows, D] with D >= 1, got {checks.describe(x)}")
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"{name}: expected at most {MOST_ROWS} rows, got {x.shape[0]}")
    return x.detach()


def _check_metric(metric: str) -> int:
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {tuple(METRICS)}, got {metric!r}")
    return METRICS[metric]


def _check_inputs(queries: Tensor, corpus: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor, Packed | None]:
    queries, corpus = _check_rows("queries", queries), _check_rows("corpus", corpus)
    checks.same_device("corpus", corpus, "queries", queries)
    if corpus.shape[0] == 0:
        raise ValueError("corpus: expected at least one row, got none")
    if corpus.shape[1] != queries.shape[1]:
        raise ValueError(f"corpus: expected the dimension of queries ({queries.shape[1]}), got {corpus.shape[1]}")
    if packed is not None:
        bits = 16 if packed.codes.dtype == torch.bfloat16 else 8
        for name, given, expected in zip(packed._fields, packed, pack_fake(corpus.to("meta"), bits), strict=True):
            if given.shape != expected.shape or given.dtype != expected.dtype or not given.is_contiguous():
                raise ValueError(
                    f"packed.{name}: expected contiguous {expected.dtype} of shape {list(expected.shape)},"
                    f" got {checks.describe(given)}"
                )
            checks.same_device(f"packed.{name}", given, "corpus", corpus)
    return queries, corpus, packed


def _per_query(name: str, value: float | Tensor | None, queries: Tensor) -> Tensor | None:
    """A limit per query, as float32 [Q]; NaN is refused where it can be seen."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if value != value:
            raise ValueError(f"{name}: expected a number, got {value}")
        return queries.new_full((queries.shape[0],), value)
    if value.dtype != torch.float32 or value.shape != queries.shape[:1]:
        raise ValueError(f"{name}: expected float32 of shape [{queries.shape[0]}], got {checks.describe(value)}")
    checks.same_device(name, value, "queries", queries)
    if checks.values_readable(value) and value.isnan().any():
        raise ValueError(f"{name}: expected numbers, got NaN")
    return value.detach().contiguous()


def _check_excluded(
    excluded: tuple[Tensor, Tensor] | None, queries: Tensor, corpus: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if excluded is None:
        return None, None
    offsets, ids = excluded
    for name, x in (("excluded[0]", offsets), ("excluded[1]", ids)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.ndim != 1:
            raise TypeError(f"{name}: expected int64 of one dimension, got {checks.describe(x)}")
        checks.same_device(name, x, "queries", queries)
    if offsets.shape[0] != queries.shape[0] + 1:
        raise ValueError(f"excluded[0]: expected shape [{queries.shape[0] + 1}], got {checks.describe(offsets)}")
    if checks.values_readable(offsets):
        if offsets[0] != 0 or offsets[-1] != ids.shape[0] or (offsets.diff() < 0).any():
            raise ValueError(f"excluded[0]: expected to rise from 0 to {ids.shape[0]} (the number of ids)")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= corpus.shape[0]):
            raise ValueError(f"excluded[1]: expected rows from 0 to {corpus.shape[0] - 1}")
        falls = (ids.diff() < 0).nonzero().squeeze(-1) + 1
        if falls.numel() and not torch.isin(falls, offsets).all():
            raise ValueError("excluded[1]: expected ids that rise within each query")
    return offsets.contiguous(), ids.contiguous()


def _parts(packed: Packed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if packed is None else (packed.codes, packed.factors, packed.center)


def _statistics(values: Tensor) -> Statistics:
    return Statistics(*values.tolist())


def pack(rows: Tensor, precision: str = "int8") -> Packed | None:
    """Packs the rows of a corpus for the first pass of a search: per row codes and the bounds of their error.

    The packed rows serve every metric. A corpus grows by further segments, each packed for itself and searched for
    itself: the results of a segment whose first row is `base` are ids + base, and `threshold` takes the k-th score of
    the segments before it.

    Args:
        rows: float32 [N, D], D at most 32768 for int8; any row stride.
        precision: "int8", "bf16", or "fp32" for a search that reads the rows themselves.

    Returns:
        :class:`Packed`, which states the layout; None for "fp32".
    """
    rows = _check_rows("rows", rows)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    if precision == "fp32":
        return None
    if precision == "int8" and rows.shape[1] > MOST_INT8_DIMENSIONS:
        raise ValueError(f"rows: expected at most {MOST_INT8_DIMENSIONS} dimensions for int8, got {rows.shape[1]}")
    return Packed(*_pack(rows, BITS[precision]))


def topk(
    queries: Tensor,
    corpus: Tensor,
    packed: Packed | None = None,
    *,
    k: int,
    metric: str = "cos",
    threshold: float | Tensor | None = None,
    highest: float | Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    r"""The k best rows of the corpus for each query: exact, by score descending, equal scores by index ascending.

    The score of a pair is :math:`q \cdot k / (\max(\lVert q \rVert, 10^{-12}) \max(\lVert k \rVert, 10^{-12}))`,
    :math:`q \cdot k` or :math:`-\lVert q - k \rVert`, summed in float64 over the float32 inputs and rounded once to
    float32. A first pass over `packed` only leaves out pairs whose score is proven to be too low.

    Args:
        queries: float32 [Q, D]; any row stride.
        corpus: float32 [N, D], N >= 1; any row stride. Rows are read where they lie, so a memory map works.
        packed: what :func:`pack` made of `corpus`; None: the rows themselves are scanned.
        k: 1 to N.
        metric: "cos", "dot" or "euclidean".
        threshold: only pairs with a score of at least this, a number or float32 [Q].
        highest: only pairs with a score of at most this, a number or float32 [Q].
        excluded: rows that are left out per query: int64 offsets [Q + 1] and ids, rising within each query.

    Returns:
        :class:`TopK`. A pair whose score is NaN is below every other: it is never in the result, only in the
        statistics. Memory beyond inputs and result stays below 64 MB, on a GPU below 256 MB; a call cannot be
        interrupted, so callers with many queries pass some at a time (1024 keep every core busy).

    Gradients: none. Errors: wrong dtypes, shapes, devices, k outside 1 to N, NaN limits.

    Follows ``sentence_transformers.util.semantic_search``.
    """
    queries, corpus, packed = _check_inputs(queries, corpus, packed)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= corpus.shape[0]:
        raise ValueError(f"k: expected an integer from 1 to {corpus.shape[0]} (the rows of corpus), got {k}")
    limits = _per_query("threshold", threshold, queries), _per_query("highest", highest, queries)
    left_out = _check_excluded(excluded, queries, corpus)
    scores, ids, statistics = _topk(queries, corpus, *_parts(packed), k, _check_metric(metric), *limits, *left_out)
    return TopK(scores, ids, _statistics(statistics))


def pairs_above(
    queries: Tensor,
    corpus: Tensor,
    packed: Packed | None = None,
    *,
    threshold: float | Tensor,
    metric: str = "cos",
    first: int | None = None,
) -> Pairs:
    """Every pair whose score is at least `threshold`, by query and then by index, as CSR.

    Args:
        queries, corpus, packed, metric: as of :func:`topk`.
        threshold: a number or float32 [Q].
        first: for a join of the corpus with itself: query i is row first + i of it, and only later rows are paired.

    Returns:
        :class:`Pairs`. The result is as large as there are pairs: callers bound it by the queries they pass at a time.

    Gradients: none. Errors: as of :func:`topk`.
    """
    queries, corpus, packed = _check_inputs(queries, corpus, packed)
    if first is not None and not 0 <= first <= corpus.shape[0] - queries.shape[0]:
        last = corpus.shape[0] - queries.shape[0]
        raise ValueError(f"first: expected 0 to {last} (the rows of corpus less those of queries), got {first}")
    lowest = _per_query("threshold", threshold, queries)
    arguments = lowest, _check_metric(metric), -1 if first is None else first
    offsets, ids, scores, statistics = _pairs(queries, corpus, *_parts(packed), *arguments)
    return Pairs(offsets, ids, scores, _statistics(statistics))


def count_above(
    queries: Tensor,
    corpus: Tensor,
    packed: Packed | None = None,
    *,
    threshold: float | Tensor,
    metric: str = "cos",
) -> Counts:
    """The number of rows whose score with each query is at least `threshold`, a number or float32 [Q].

    Args, errors: as of :func:`pairs_above`. Returns: :class:`Counts`. Gradients: none.
    """
    queries, corpus, packed = _check_inputs(queries, corpus, packed)
    lowest = _per_query("threshold", threshold, queries)
    counts, statistics = _count(queries, corpus, *_parts(packed), lowest, _check_metric(metric))
    return Counts(counts, _statistics(statistics))
