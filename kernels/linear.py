"""A matrix product that ends in bias and activation, in Triton.

With a gate, a program takes rows of both halves of the weight in turn: a number and its gate are neighbours in one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sentfast.registry import implements

from .activation import activate
from .similarity import GROUP, MATRIX_TILES, matrix_mode
from .triton_utils import INTERPRETED, grouped_tile, loop_bound, on_device

# In half precision narrower than for scores. A sum over few features takes no longer than the activation after it, and
# that runs beside the sums of the two other blocks which fit an SM.
TILES = MATRIX_TILES | {"half": {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}}


@triton.jit(do_not_specialize=["rows", "tiles_n", "tiles_m"])
def _linear_kernel(
    x,
    weight,
    bias,
    y,
    rows,
    features,
    columns,
    tiles_n,
    tiles_m,
    x_row_stride,
    x_column_stride,
    weight_row_stride,
    weight_column_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TO_FLOAT32: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile of y. The tile and the order of its sum are the same for every number of rows."""
    tile_n, tile_m = grouped_tile(tl.program_id(0), tiles_n, tiles_m, GROUP)
    row = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if GATED:
        # Rows of the weight: the numbers first, then their gates.
        weight_row = tl.minimum(feature // 2, features - 1) + feature % 2 * features
    else:
        weight_row = tl.minimum(feature, features - 1)
    lane = tl.arange(0, BLOCK_K)
    column = lane.to(tl.int64)
    x_tile = x + row[:, None] * x_row_stride + (column * x_column_stride)[None, :]
    # Past the end the last feature is read again and not stored: no mask, fewer registers. Not so for x, whose last row
    # would be most of what a short text reads.
    weight_tile = weight + weight_row[None, :] * weight_row_stride
    weight_tile += (column * weight_column_stride)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_K):
        inside = lane < columns - block
        value = tl.load(x_tile, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        factor = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        if TO_FLOAT32:
            value = value.to(tl.float32)
            factor = factor.to(tl.float32)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
        x_tile += tl.full([], BLOCK_K, tl.int64) * x_column_stride
        weight_tile += tl.full([], BLOCK_K, tl.int64) * weight_column_stride
    if bias is not None:
        if GATED:
            total += tl.load(bias + weight_row).to(tl.float32)[None, :]
        else:
            total += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    if GATED:
        value, gate = tl.split(tl.reshape(total, [BLOCK_N, BLOCK_M // 2, 2]))
        result = (activate(value, ACTIVATION) * gate).to(y.dtype.element_ty)
        feature = tile_m.to(tl.int64) * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    else:
        result = activate(total, ACTIVATION).to(y.dtype.element_ty)
    target = y + row[:, None] * features + feature[None, :]
    tl.store(target, result, mask=(row < rows)[:, None] & (feature < features)[None, :])


@implements("linear_activation")
def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return _linear(x, weight, bias, activation, gated=False)


@implements("linear_gated_activation")
def linear_gated_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return _linear(x, weight, bias, activation, gated=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, *, gated: bool) -> Tensor:
    rows, columns = x.shape
    y = x.new_empty(rows, weight.shape[0] // (1 + gated))
    if y.numel():
        mode, to_float32 = matrix_mode(x, weight)
        tile = TILES[mode]
        tiles_n, tiles_m = triton.cdiv(rows, tile["BLOCK_N"]), triton.cdiv(weight.shape[0], tile["BLOCK_M"])
        with on_device(x):
            _linear_kernel[(tiles_n * tiles_m,)](
                x,
                weight,
                None if bias is None else bias.contiguous(),
                y,
                rows,
                y.shape[1],
                columns,
                tiles_n,
                tiles_m,
                *x.stride(),
                *weight.stride(),
                ACTIVATION=activation,
                GATED=gated,
                # The interpreter multiplies bfloat16 numbers wrongly.
                TO_FLOAT32=to_float32 or INTERPRETED,
                PRECISION="ieee" if mode == "half" else mode,
                GROUP=GROUP,
                **tile,
            )
    return y
