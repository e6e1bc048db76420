"""Similarity of all rows with all rows in Triton: one matrix product with the norms from the same reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.registry import implements

from .similarity_rows import at_least  # also enters the operators of that file into the table
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
    """One program per tile of one batch element's matrix; the norms come from the same reads as the product."""
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
    if IS_COSINE:
        square_a = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        square_b = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_K):
        inside = lane < columns - block
        value_a = tl.load(a_tile, mask=(row_a < rows_a)[:, None] & inside[None, :], other=0.0)
        value_b = tl.load(b_tile, mask=(row_b < rows_b)[None, :] & inside[:, None], other=0.0)
        if TO_FLOAT32:
            value_a = value_a.to(tl.float32)
            value_b = value_b.to(tl.float32)
        total = tl.dot(value_a, value_b, total, input_precision=PRECISION)
        if IS_COSINE:
            square_a += value_a.to(tl.float32) * value_a.to(tl.float32)
            square_b += value_b.to(tl.float32) * value_b.to(tl.float32)
        a_tile += tl.full([], BLOCK_K, tl.int64) * a_column_stride
        b_tile += tl.full([], BLOCK_K, tl.int64) * b_column_stride
    if IS_COSINE:
        length_a = tl.sqrt_rn(tl.sum(square_a, 1))
        length_b = tl.sqrt_rn(tl.sum(square_b, 0))
        tl.store(norm_a + batch * rows_a + row_a, length_a, mask=(row_a < rows_a) & (tile_m == 0))
        tl.store(norm_b + batch * rows_b + row_b, length_b, mask=(row_b < rows_b) & (tile_n == 0))
        total = total * (1.0 / at_least(length_a, eps))[:, None] * (1.0 / at_least(length_b, eps))[None, :]
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
    norm_a = scores.new_empty((*batch, rows_a) if cosine else (0,))
    norm_b = scores.new_empty((*batch, rows_b) if cosine else (0,))
    if scores.numel() or norm_a.numel() or norm_b.numel():
        (a, b), inner, strides = merge_batch([a, b], a.ndim - 2)
        mode, to_float32 = matrix_mode(a, b)
        config = dict(MATRIX_TILES[mode])
        # The norms hold each tile one step longer, so it takes one more buffer to load as far ahead.
        config["num_stages"] += cosine
        # At least one tile each way: the norms of one side exist where the other side is empty.
        tiles_n = max(triton.cdiv(rows_a, config["BLOCK_N"]), 1)
        tiles_m = max(triton.cdiv(rows_b, config["BLOCK_M"]), 1)
        with on_device(a):
            _matrix_kernel[(batch.numel() * tiles_n * tiles_m,)](
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
                *inner,
                *strides[0],
                *a.stride()[-2:],
                *strides[1],
                *b.stride()[-2:],
                eps,
                IS_COSINE=cosine,
                # The interpreter multiplies bfloat16 numbers wrongly.
                TO_FLOAT32=to_float32 or INTERPRETED,
                PRECISION="ieee" if mode == "half" else mode,
                GROUP=GROUP,
                **config,
            )
    return scores, norm_a, norm_b


@implements("dot_similarity")
def dot_similarity(a: Tensor, b: Tensor) -> Tensor:
    return _matrix(a, b, False, 1.0)[0]


@implements("cosine_similarity_forward")
def cosine_similarity_forward(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _matrix(a, b, True, eps)
