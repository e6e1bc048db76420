"""Similarity of all rows with all rows in Triton: one matrix product, scaled by the norms where it is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.registry import implements

from .normalize import at_least, row_norms
from .triton_utils import INTERPRETED, batch_offset, grouped_tile, loop_bound, merge_batch, on_device, tf32_allowed

# The tile of the matrix kernel by what the tensor cores multiply: half numbers, float32 rounded to tf32, or float32 in
# full, which has no tensor core.
MATRIX_TILES = {
    "half": {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "tf32": {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "tf32x3": {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    "ieee": {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
}
GROUP = 8
UNITS = {"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_K": 4, "num_warps": 4}


@triton.jit(do_not_specialize=["tiles_n", "tiles_m"])
def _matrix_kernel(
    a,
    b,
    scores,
    norm_a,
    norm_b,
    rows_a,
    rows_b,
    columns,
    tiles_n,
    tiles_m,
    size_1,
    size_2,
    a_stride_0,
    a_stride_1,
    a_stride_2,
    a_row_stride,
    a_column_stride,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    b_row_stride,
    b_column_stride,
    eps,
    IS_COSINE: tl.constexpr,
    TO_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of one batch element's matrix.

    A tile of a or b is read by the tensor cores alone, straight from shared memory and while the next ones arrive: sums
    of squares of the same tiles would read them at a moment that Triton's pipeline does not keep apart from the copies.
    """
    tiles = tiles_n * tiles_m
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_n, tile_m = grouped_tile(tl.program_id(0) % tiles, tiles_n, tiles_m, GROUP)
    row_a = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_b = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    column = lane.to(tl.int64)
    a += batch_offset(batch, size_1, size_2, a_stride_0, a_stride_1, a_stride_2)
    b += batch_offset(batch, size_1, size_2, b_stride_0, b_stride_1, b_stride_2)
    a_tile = a + row_a[:, None] * a_row_stride + (column * a_column_stride)[None, :]
    b_tile = b + row_b[None, :] * b_row_stride + (column * b_column_stride)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_K):
        inside = lane < columns - block
        value_a = tl.load(a_tile, mask=(row_a < rows_a)[:, None] & inside[None, :], other=0.0)
        value_b = tl.load(b_tile, mask=(row_b < rows_b)[None, :] & inside[:, None], other=0.0)
        if TO_FLOAT32:
            value_a = value_a.to(tl.float32)
            value_b = value_b.to(tl.float32)
        total = tl.dot(value_a, value_b, total, input_precision=PRECISION)
        a_tile += tl.full([], BLOCK_K, tl.int64) * a_column_stride
        b_tile += tl.full([], BLOCK_K, tl.int64) * b_column_stride
    if IS_COSINE:
        length_a = tl.load(norm_a + batch * rows_a + row_a, mask=row_a < rows_a, other=1.0)
        length_b = tl.load(norm_b + batch * rows_b + row_b, mask=row_b < rows_b, other=1.0)
        total = total * (1.0 / at_least(length_a, eps))[:, None] * (1.0 / at_least(length_b, eps))[None, :]
    target = scores + (batch * rows_a + row_a)[:, None] * rows_b + row_b[None, :]
    tl.store(target, total, mask=(row_a < rows_a)[:, None] & (row_b < rows_b)[None, :])


@triton.jit
def _beyond_range(norm):
    """Whether products with a row of this norm may leave float32's range, or its own squares have."""
    return ((norm < 1e-15) & (norm > 0)) | (norm > 1e19)


@triton.jit(do_not_specialize=["tiles_n", "tiles_m"])
def _units_kernel(
    a,
    b,
    scores,
    norm_a,
    norm_b,
    rows_a,
    rows_b,
    columns,
    tiles_n,
    tiles_m,
    size_1,
    size_2,
    a_stride_0,
    a_stride_1,
    a_stride_2,
    a_row_stride,
    a_column_stride,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    b_row_stride,
    b_column_stride,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The cosines of a tile with a norm beyond the range once more, each element divided before it is multiplied.

    A kernel of its own, whose programs end at once as a rule: the matrix kernel has no registers left for a second
    product, and the host would have to wait for the norms.
    """
    tiles = tiles_n * tiles_m
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row_a = (tl.program_id(0) % tiles // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_b = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    length_a = tl.load(norm_a + batch * rows_a + row_a, mask=row_a < rows_a, other=1.0)
    length_b = tl.load(norm_b + batch * rows_b + row_b, mask=row_b < rows_b, other=1.0)
    beyond = tl.max(_beyond_range(length_a).to(tl.int32), 0) + tl.max(_beyond_range(length_b).to(tl.int32), 0)
    if beyond > 0:
        a += batch_offset(batch, size_1, size_2, a_stride_0, a_stride_1, a_stride_2)
        b += batch_offset(batch, size_1, size_2, b_stride_0, b_stride_1, b_stride_2)
        divisor_a = at_least(length_a, eps)[:, None]
        divisor_b = at_least(length_b, eps)[:, None]
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        lane = tl.arange(0, BLOCK_K).to(tl.int64)
        for block in range(0, loop_bound(columns), BLOCK_K):
            column = (block + lane)[None, :]
            mask_a = (row_a < rows_a)[:, None] & (column < columns)
            mask_b = (row_b < rows_b)[:, None] & (column < columns)
            value_a = tl.load(a + row_a[:, None] * a_row_stride + column * a_column_stride, mask=mask_a, other=0.0)
            value_b = tl.load(b + row_b[:, None] * b_row_stride + column * b_column_stride, mask=mask_b, other=0.0)
            # A norm that is NaN would make NaN of what is not there.
            unit_a = tl.where(mask_a, value_a.to(tl.float32) / divisor_a, 0.0)
            unit_b = tl.where(mask_b, value_b.to(tl.float32) / divisor_b, 0.0)
            total += tl.sum(unit_a[:, None, :] * unit_b[None, :, :], 2)
        target = scores + (batch * rows_a + row_a)[:, None] * rows_b + row_b[None, :]
        tl.store(target, total, mask=(row_a < rows_a)[:, None] & (row_b < rows_b)[None, :])


def matrix_mode(a: Tensor, b: Tensor) -> tuple[str, bool]:
    """The row of MATRIX_TILES, and whether the operands are widened to float32 before they are multiplied."""
    if a.dtype != b.dtype:
        # A gradient in float32 and half vectors: halves are exact in tf32, three products keep the gradient's bits.
        return "tf32x3", True
    if a.dtype != torch.float32:
        return "half", False
    return "tf32" if tf32_allowed() else "ieee", False


def _matrix(a: Tensor, b: Tensor, cosine: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, (rows_a, columns), rows_b = a.shape[:-2], a.shape[-2:], b.shape[-2]
    scores = a.new_empty((*batch, rows_a, rows_b), dtype=torch.float32)
    norm_a, norm_b = (row_norms(a), row_norms(b)) if cosine else (scores.new_empty(0), scores.new_empty(0))
    if scores.numel():
        (a, b), inner, strides = merge_batch([a, b], a.ndim - 2)
        mode, to_float32 = matrix_mode(a, b)
        config = MATRIX_TILES[mode]
        tiles_n = triton.cdiv(rows_a, config["BLOCK_N"])
        tiles_m = triton.cdiv(rows_b, config["BLOCK_M"])
        batches = batch.numel()
        strides_of = [*inner, *strides[0], *a.stride()[-2:], *strides[1], *b.stride()[-2:]]
        given = (a, b, scores, norm_a, norm_b, rows_a, rows_b, columns)
        with on_device(a):
            _matrix_kernel[(batches * tiles_n * tiles_m,)](
                *given,
                tiles_n,
                tiles_m,
                *strides_of,
                eps,
                IS_COSINE=cosine,
                # The interpreter multiplies bfloat16 numbers wrongly.
                TO_FLOAT32=to_float32 or INTERPRETED,
                PRECISION="ieee" if mode == "half" else mode,
                GROUP=GROUP,
                **config,
            )
            if cosine and a.dtype != torch.float16:  # whose products stay in float32's range
                tiles_n, tiles_m = triton.cdiv(rows_a, UNITS["BLOCK_N"]), triton.cdiv(rows_b, UNITS["BLOCK_M"])
                _units_kernel[(batches * tiles_n * tiles_m,)](*given, tiles_n, tiles_m, *strides_of, eps, **UNITS)
    return scores, norm_a, norm_b


@implements("dot_similarity")
def dot_similarity(a: Tensor, b: Tensor) -> Tensor:
    return _matrix(a, b, False, 1.0)[0]


@implements("cosine_similarity_forward")
def cosine_similarity_forward(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _matrix(a, b, True, eps)
