"""The kernels of exact search: bounds of the scores of all pairs in tiles, of which only the best of each block of rows
is kept, and exact scores of the pairs of a block. docs/search-bounds.md says why nothing is left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.reference import search as definition
from sentfast.reference.similarity import COSINE, DOT, EUCLIDEAN, NORMALIZE_EPS

from .normalize import at_least
from .triton_utils import loop_bound

_COSINE = tl.constexpr(COSINE)
_DOT = tl.constexpr(DOT)
_EUCLIDEAN = tl.constexpr(EUCLIDEAN)
_EPS = tl.constexpr(NORMALIZE_EPS)
_INFINITY = tl.constexpr(float("inf"))
_SLACK = tl.constexpr(2.0**-18)  # more than all roundings to float32 around the products
_PANEL = tl.constexpr(definition.SEARCH_PANEL)
_GROUP = tl.constexpr(definition.SEARCH_GROUPS[8])
_FACTORS = tl.constexpr(definition.SEARCH_FACTORS)

_ROWS = 128  # of the corpus in a tile
_LARGE, _SMALL = 64, 16  # rows of a block
_MANY_BLOCKS = 16  # large blocks for each row that is wanted, or small ones are better
_LEAST_NORM = tl.constexpr(1e-12)  # between these two no product leaves float32
_MOST_NORM = tl.constexpr(1e12)
_INFINITE_NORM = tl.constexpr(2.0**64)
_TILES = {
    "few": {"BLOCK_Q": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "many": {"BLOCK_Q": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "few codes": {"BLOCK_Q": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    "many codes": {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
}
_FEW = 32


@triton.jit
def _norms_kernel(
    x,
    norms,
    rows,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms summed in float64, NaN where products can leave float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float64)
    for begin in range(0, loop_bound(columns), BLOCK_D):
        inside = (row < rows)[:, None] & (column + begin < columns)[None, :]
        place = row[:, None] * row_stride + ((column + begin) * column_stride)[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float64)
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1)).to(tl.float32)
    usable = (norm == 0) | ((norm >= _LEAST_NORM) & (norm <= _MOST_NORM))
    tl.store(norms + row, tl.where(usable, norm, float("nan")), mask=row < rows)


@triton.jit
def _scores_of_units(low, high, norm_q, norm_k, METRIC: tl.constexpr):
    """Bounds of the score from those of the product of the unit vectors."""
    if METRIC == _DOT:
        low *= norm_q * norm_k
        high *= norm_q * norm_k
    if METRIC == _EUCLIDEAN:
        squares = norm_q * norm_q + norm_k * norm_k
        twice = 2 * norm_q * norm_k
        low = -tl.sqrt_rn(tl.maximum(squares * (1 + _SLACK) - twice * low, 0.0)) * (1 + _SLACK)
        high = -tl.sqrt_rn(tl.maximum(squares * (1 - _SLACK) - twice * high, 0.0)) * (1 - _SLACK)
    return low, high


@triton.jit
def _best_of_blocks(bounds, inside, target, query, count, blocks, first, BLOCK: tl.constexpr):
    """Stores the largest bound of each block of a tile."""
    parts: tl.constexpr = bounds.shape[1] // BLOCK
    best = tl.max(tl.reshape(tl.where(inside, bounds, -_INFINITY), [bounds.shape[0], parts, BLOCK]), 2)
    block = first + tl.arange(0, parts)
    place = target + query.to(tl.int64)[:, None] * blocks + block[None, :]
    tl.store(place, best, mask=(query < count)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=["count", "first", "tiles_q", "blocks"])
def _bounds_kernel(
    queries,
    corpus,
    query_factors,
    row_norms,
    row_factors,
    highest,
    lower,
    upper,
    count,
    rows,
    columns,
    blocks,
    query_stride,
    query_step,
    row_stride,
    row_step,
    first,
    tiles_q,
    error,
    METRIC: tl.constexpr,
    CODES: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of queries and rows: the largest bounds of the scores in each block of rows.

    query_factors: float32 [5, count], norm (NaN: no bounds), and of the codes scale, norm of the residual, norm of the
    query off center, product with the center. row_norms: float32 [rows], NaN: no bounds.
    """
    # Neighbouring programs read the same rows of the corpus, so that it is read once from memory.
    tile_q = tl.program_id(0) % tiles_q
    tile_n = tl.program_id(0) // tiles_q
    query = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    steps = columns
    if JOIN:  # nothing to do where every row comes before its query
        steps = tl.where((tile_n.to(tl.int64) + 1) * BLOCK_N > first + tile_q * BLOCK_Q, columns, 0)
    query_tile = queries + query.to(tl.int64)[:, None] * query_stride
    if CODES:
        row_tile = corpus + (row // _PANEL * row_stride + row % _PANEL * _GROUP)[None, :]
        total = tl.zeros([BLOCK_Q, BLOCK_N], tl.int32)
    else:
        row_tile = corpus + row[None, :] * row_stride
        total = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for block in range(0, loop_bound(steps), BLOCK_K):
        column = (block + lane).to(tl.int64)
        inside_q = (query < count)[:, None] & (column < columns)[None, :]
        inside_k = (row < rows)[None, :] & (column < columns)[:, None]
        value_q = tl.load(query_tile + column[None, :] * query_step, mask=inside_q, other=0)
        if CODES:
            place = column // _GROUP * (_PANEL * _GROUP) + column % _GROUP
            value_k = tl.load(row_tile + place[:, None], mask=inside_k, other=128)
            total = tl.dot(value_q, (value_k ^ 128).to(tl.int8, bitcast=True), total, out_dtype=tl.int32)
        else:
            value_k = tl.load(row_tile + column[:, None] * row_step, mask=inside_k, other=0.0)
            total = tl.dot(value_q, value_k, total, input_precision="tf32")

    norm_q = tl.load(query_factors + query, mask=query < count, other=0.0)[:, None]
    norm_k = tl.load(row_norms + row, mask=row < rows, other=0.0)[None, :]
    if CODES:
        factors = row_factors + row // _PANEL * (_FACTORS * _PANEL) + row % _PANEL
        scale_k = tl.load(factors, mask=row < rows, other=0.0)[None, :]
        residual_k = tl.load(factors + _PANEL, mask=row < rows, other=0.0)[None, :]
        height_k = tl.load(factors + 2 * _PANEL, mask=row < rows, other=0.0)[None, :]
        tilt_k = tl.load(factors + 4 * _PANEL, mask=row < rows, other=0.0)[None, :]
        scale_q = tl.load(query_factors + count + query, mask=query < count, other=0.0)[:, None]
        residual_q = tl.load(query_factors + 2 * count + query, mask=query < count, other=0.0)[:, None]
        off_q = tl.load(query_factors + 3 * count + query, mask=query < count, other=0.0)[:, None]
        center_q = tl.load(query_factors + 4 * count + query, mask=query < count, other=0.0)[:, None]
        unit = total.to(tl.float32) * (scale_q * scale_k) + center_q + tilt_k
        unit = tl.where((norm_q > 0) & (norm_k > 0), unit, 0.0)
        width = off_q * residual_k + residual_q * height_k
        width += error + _SLACK * (height_k + residual_k)
    else:
        unit = total / at_least(norm_q, _EPS) / at_least(norm_k, _EPS)
        width = error
    low, high = _scores_of_units(unit - width, unit + width, norm_q, norm_k, METRIC)
    unknown = (norm_q != norm_q) | (norm_k != norm_k)
    low = tl.where(unknown, -_INFINITY, low)
    high = tl.where(unknown, _INFINITY, high)
    inside = (row < rows)[None, :] & (query < count)[:, None]
    if JOIN:
        inside = inside & (row[None, :] > first + query[:, None])
    first_block = tile_n * (BLOCK_N // BLOCK)
    if highest is not None:
        most = tl.load(highest + query, mask=query < count, other=0.0)[:, None]
        _best_of_blocks(high, inside & (low <= most), upper, query, count, blocks, first_block, BLOCK)
        _best_of_blocks(low, inside & (high <= most), lower, query, count, blocks, first_block, BLOCK)
    else:
        _best_of_blocks(high, inside, upper, query, count, blocks, first_block, BLOCK)
        if lower is not None:
            _best_of_blocks(low, inside, lower, query, count, blocks, first_block, BLOCK)


@triton.jit
def _divisor(norm, columns):
    """What a cosine divides by: infinite where float32 cannot hold the square; of one number nothing is squared."""
    eps = tl.full([], _EPS, tl.float64)
    return tl.where((norm >= _INFINITE_NORM) & (columns > 1), float("inf"), at_least(norm, eps))


@triton.jit
def _exact_kernel(
    queries,
    corpus,
    which,
    block,
    scores,
    rows,
    columns,
    query_stride,
    query_step,
    row_stride,
    row_step,
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per query and block of rows: scores in float64, rounded once."""
    item = tl.program_id(0).to(tl.int64)
    query = tl.load(which + item)
    lane = tl.arange(0, BLOCK)
    row = tl.load(block + item) * BLOCK + lane
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    products = tl.zeros([BLOCK, BLOCK_D], tl.float64)
    if METRIC == _COSINE:
        squares_q = tl.zeros([BLOCK_D], tl.float64)
        squares_k = tl.zeros([BLOCK, BLOCK_D], tl.float64)
    for begin in range(0, loop_bound(columns), BLOCK_D):
        inside = column + begin < columns
        q = tl.load(queries + query * query_stride + (column + begin) * query_step, mask=inside, other=0.0)
        place = corpus + row[:, None] * row_stride + ((column + begin) * row_step)[None, :]
        k = tl.load(place, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float64)
        q = q.to(tl.float64)
        if METRIC == _EUCLIDEAN:
            products += (q[None, :] - k) * (q[None, :] - k)
        else:
            products += q[None, :] * k
        if METRIC == _COSINE:
            squares_q += q * q
            squares_k += k * k
    score = tl.sum(products, 1)
    if METRIC == _COSINE:
        norm_q, norm_k = tl.sqrt(tl.sum(squares_q, 0)), tl.sqrt(tl.sum(squares_k, 1))
        score = score / (_divisor(norm_q, columns) * _divisor(norm_k, columns))
    if METRIC == _EUCLIDEAN:
        score = -tl.sqrt(score)
    tl.store(scores + item * BLOCK + lane, score.to(tl.float32))


class Rows(NamedTuple):
    """A corpus, and what the queries of a call share. first: of a corpus that is joined with itself, else negative."""

    values: Tensor
    norms: Tensor
    codes: Tensor | None
    factors: Tensor | None
    center: Tensor | None
    metric: int
    block: int
    first: int

    @property
    def blocks(self) -> int:
        return triton.cdiv(len(self.values), self.block)


class Found(NamedTuple):
    """Pairs by query and then by row, both rising."""

    which: Tensor
    ids: Tensor
    scores: Tensor


def _norms(x: Tensor) -> Tensor:
    """Norms in float32, NaN where products can leave float32."""
    norms = x.new_empty(len(x))
    height = 64
    _norms_kernel[(max(1, triton.cdiv(len(x), height)),)](
        x, norms, len(x), x.shape[1], *x.stride(), ROWS=height, BLOCK_D=32, num_warps=4
    )
    return norms


def prepare(
    corpus: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    center: Tensor | None,
    metric: int,
    wanted: int,
    first: int = -1,
) -> Rows:
    """wanted: the rows that each query looks for."""
    if codes is None or factors is None or codes.dtype != torch.uint8:
        # With bf16 codes the rows themselves are multiplied too: tf32 is as fast, and cuts less.
        codes = factors = center = None
        norms = _norms(corpus)
    else:
        norms = factors[:, 3].flatten()[: len(corpus)]
        usable = (norms == 0) | ((norms >= _LEAST_NORM.value) & (norms <= _MOST_NORM.value))
        norms = torch.where(usable, norms, float("nan"))
    block = _LARGE if len(corpus) >= _LARGE * _MANY_BLOCKS * wanted else _SMALL
    return Rows(corpus, norms, codes, factors, center, metric, block, first)


def _query_factors(queries: Tensor, corpus: Rows) -> tuple[Tensor, Tensor]:
    """The queries as the first pass multiplies them, and their factors [5, Q]."""
    factors = queries.new_zeros(5, len(queries))
    factors[0] = _norms(queries)
    if corpus.center is None:
        return queries, factors
    center = corpus.center.double()
    signed, values = definition.quantize(queries.double(), center, 8)
    unit, _ = definition.unit(queries.double())
    factors[1:3] = values[:2]
    factors[3] = (torch.linalg.vector_norm(unit - center, dim=1) * (1 + 2.0**-20)).float()
    factors[4] = (unit @ center).float()
    return signed.to(torch.int8), factors


def bounds(queries: Tensor, corpus: Rows, highest: Tensor | None, with_lower: bool) -> tuple[Tensor | None, Tensor]:
    """Per query and block of rows: a lower bound of its best score and an upper bound of all, float32 [Q, blocks]."""
    upper = queries.new_empty(len(queries), corpus.blocks)
    lower = torch.empty_like(upper) if with_lower else None
    values, factors = _query_factors(queries, corpus)
    operand = corpus.values if corpus.codes is None else corpus.codes
    dim = queries.shape[1]
    error = 2.0**-17
    if corpus.codes is None:
        # Two operands that are cut to 10 bits, and sums of which each step may cut the last bits.
        error += 2.0**-9 + dim * 2.0**-21
    config = _TILES[("few" if len(queries) <= _FEW else "many") + ("" if corpus.codes is None else " codes")]
    if corpus.metric == EUCLIDEAN:  # its bounds take more registers
        config = config | {"BLOCK_Q": min(config["BLOCK_Q"], 64)}
    tiles_q = triton.cdiv(len(queries), config["BLOCK_Q"])
    _bounds_kernel[(tiles_q * triton.cdiv(len(corpus.values), _ROWS),)](
        values,
        operand,
        factors,
        corpus.norms,
        corpus.factors,
        highest,
        lower,
        upper,
        len(queries),
        len(corpus.values),
        dim,
        corpus.blocks,
        *values.stride(),
        operand.stride(0),
        operand.stride(-1),
        corpus.first,
        tiles_q,
        error,
        METRIC=corpus.metric,
        CODES=corpus.codes is not None,
        JOIN=corpus.first >= 0,
        BLOCK=corpus.block,
        BLOCK_N=_ROWS,
        **config,
    )
    return lower, upper


def exact(queries: Tensor, corpus: Rows, which: Tensor, block: Tensor) -> Found:
    """Every pair of queries and the blocks of rows that go with them."""
    scores = queries.new_empty(len(which), corpus.block)
    _exact_kernel[(len(which),)](
        queries,
        corpus.values,
        which.contiguous(),
        block.contiguous(),
        scores,
        len(corpus.values),
        queries.shape[1],
        *queries.stride(),
        *corpus.values.stride(),
        METRIC=corpus.metric,
        BLOCK=corpus.block,
        BLOCK_D=2048 // corpus.block,
        num_warps=4,
    )
    ids = block.unsqueeze(1) * corpus.block + torch.arange(corpus.block, device=block.device)
    inside = ids < len(corpus.values)
    if corpus.first >= 0:
        inside &= ids > corpus.first + which.unsqueeze(1)
    return Found(which.unsqueeze(1).expand_as(ids)[inside], ids[inside], scores[inside])
