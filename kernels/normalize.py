"""Norms and L2 normalisation in Triton, row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.registry import implements

from .triton_utils import batch_offset, loop_bound, merge_batch, on_device, row_tile

_TINY = tl.constexpr(1e-15)  # the squares of smaller norms are lost to zero
_RAISED = tl.constexpr(2.0**100)


@triton.jit
def at_least(norm, eps):
    """max(norm, eps) that keeps NaN."""
    return tl.where(norm < eps, eps, norm)


@triton.jit
def term(value, ONE: tl.constexpr):
    """What a value adds to the sum whose :func:`root` is a norm.

    ONE: of a row of one column, which is not squared, as in PyTorch's vector_norm, so that it cannot leave the range.
    """
    return tl.abs(value) if ONE else value * value


@triton.jit
def root(total, ONE: tl.constexpr):
    return total if ONE else tl.sqrt_rn(total)


@triton.jit
def _tiny_norm(x, column_stride, row, rows, columns, lane, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The norms of rows so small that they can be taken times 2^100: 0 for rows of zeros alone."""
    square = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        value = tl.load(x + column * column_stride, mask=inside, other=0.0).to(tl.float32) * _RAISED
        square += value * value
    return tl.sqrt_rn(tl.sum(square, 1)) * (1.0 / _RAISED)


@triton.jit(do_not_specialize=["rows"])
def _normalize_kernel(
    x,
    y,
    norm,
    rows,
    columns,
    size_1,
    size_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_column_stride,
    eps,
    ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y None: the norms alone, of which 0 is that of a row of zeros."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    x += batch_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)[:, None]
    square = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        value = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        square += term(value, ONE)
    length = root(tl.sum(square, 1), ONE)
    if y is None:
        tiny = (row < rows) & (length < _TINY)
        if tl.max(tiny.to(tl.int32), 0) > 0:
            length = tl.where(tiny, _tiny_norm(x, x_column_stride, row, rows, columns, lane, ROWS, BLOCK_D), length)
    tl.store(norm + row, length, mask=row < rows)
    if y is not None:
        divisor = at_least(length, eps)[:, None]
        for block in range(0, loop_bound(columns), BLOCK_D):
            column = (block + lane)[None, :]
            inside = (row < rows)[:, None] & (column < columns)
            value = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
            unit = tl.div_rn(value, tl.broadcast_to(divisor, [ROWS, BLOCK_D]))
            tl.store(y + row[:, None] * columns + column, unit.to(y.dtype.element_ty), mask=inside)


def normalize_rows(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / max(||x||, eps) along the last dimension, rounded to dtype, and the norms in float32."""
    y = x.new_empty(x.shape, dtype=dtype)
    return y, _normalized(x, y, eps)


def row_norms(x: Tensor) -> Tensor:
    """The norms along the last dimension in float32; of norms below 1e-15 those that exact squares would have."""
    return _normalized(x, None, 0.0)


def _normalized(x: Tensor, y: Tensor | None, eps: float) -> Tensor:
    norm = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if norm.numel():
        (x,), inner, (stride,) = merge_batch([x], x.ndim - 1)
        tile = row_tile(x.shape[-1])
        with on_device(x):
            _normalize_kernel[(triton.cdiv(norm.numel(), tile["ROWS"]),)](
                x, y, norm, norm.numel(), x.shape[-1], *inner, *stride, x.stride(-1), eps, ONE=x.shape[-1] == 1, **tile
            )
    return norm


@implements("l2_normalize_forward")
def l2_normalize_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return normalize_rows(x, eps, x.dtype)


@triton.jit(do_not_specialize=["rows"])
def _normalize_backward_kernel(
    grad,
    x,
    norm,
    grad_x,
    rows,
    columns,
    size_1,
    size_2,
    grad_stride_0,
    grad_stride_1,
    grad_stride_2,
    grad_column_stride,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_column_stride,
    norm_stride_0,
    norm_stride_1,
    norm_stride_2,
    eps,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """UNIT: x holds the normalised vectors already."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    grad += batch_offset(row, size_1, size_2, grad_stride_0, grad_stride_1, grad_stride_2)[:, None]
    x += batch_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)[:, None]
    norm += batch_offset(row, size_1, size_2, norm_stride_0, norm_stride_1, norm_stride_2)
    length = tl.load(norm, mask=row < rows, other=1.0)[:, None]
    divisor = at_least(length, eps)
    product = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        unit = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        if not UNIT:
            unit = unit / divisor
        product += unit * tl.load(grad + column * grad_column_stride, mask=inside, other=0.0).to(tl.float32)
    # Below eps the divisor is a constant, so the part along the vector stays.
    along = tl.sum(product, 1)[:, None]
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        unit = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        if not UNIT:
            unit = unit / divisor
        value = tl.load(grad + column * grad_column_stride, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(length < eps, value, value - unit * along) / divisor
        tl.store(grad_x + row[:, None] * columns + column, value.to(grad_x.dtype.element_ty), mask=inside)


def normalize_rows_backward(
    grad: Tensor, x: Tensor, norm: Tensor, eps: float, dtype: torch.dtype, *, unit: bool
) -> Tensor:
    """Gradient of :func:`normalize_rows` to its input, in dtype. unit: x is the output, not the input."""
    grad_x = x.new_empty(x.shape, dtype=dtype)
    if grad_x.numel():
        (grad, x, norm), inner, strides = merge_batch([grad, x, norm], x.ndim - 1)
        tile = row_tile(x.shape[-1])
        with on_device(x):
            _normalize_backward_kernel[(triton.cdiv(norm.numel(), tile["ROWS"]),)](
                grad,
                x,
                norm,
                grad_x,
                norm.numel(),
                x.shape[-1],
                *inner,
                *strides[0],
                grad.stride(-1),
                *strides[1],
                x.stride(-1),
                *strides[2],
                eps,
                UNIT=unit,
                **tile,
            )
    return grad_x


@implements("l2_normalize_backward")
def l2_normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return normalize_rows_backward(grad, x, norm, eps, x.dtype, unit=False)
