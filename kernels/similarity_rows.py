"""L2 normalisation and pairwise similarity in Triton: kernels that go row by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.registry import implements

from .triton_utils import batch_offset, loop_bound, merge_batch, on_device, row_tile

COSINE = tl.constexpr(reference.COSINE)
DOT = tl.constexpr(reference.DOT)
EUCLIDEAN = tl.constexpr(reference.EUCLIDEAN)
MANHATTAN = tl.constexpr(reference.MANHATTAN)


@triton.jit
def at_least(norm, eps):
    """max(norm, eps) that keeps NaN."""
    return tl.where(norm < eps, eps, norm)


# ---- normalisation ----------------------------------------------------------------------------------------------


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
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    x += batch_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)[:, None]
    square = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        value = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        square += value * value
    length = tl.sqrt_rn(tl.sum(square, 1))
    tl.store(norm + row, length, mask=row < rows)
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
    norm = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if norm.numel():
        (x,), inner, (stride,) = merge_batch([x], x.ndim - 1)
        tile = row_tile(x.shape[-1])
        with on_device(x):
            _normalize_kernel[(triton.cdiv(norm.numel(), tile["ROWS"]),)](
                x, y, norm, norm.numel(), x.shape[-1], *inner, *stride, x.stride(-1), eps, **tile
            )
    return y, norm


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


# ---- pairwise similarity ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _pairwise_kernel(
    a,
    b,
    scores,
    norm_a,
    norm_b,
    rows,
    columns,
    size_1,
    size_2,
    a_stride_0,
    a_stride_1,
    a_stride_2,
    a_column_stride,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    b_column_stride,
    eps,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    a += batch_offset(row, size_1, size_2, a_stride_0, a_stride_1, a_stride_2)[:, None]
    b += batch_offset(row, size_1, size_2, b_stride_0, b_stride_1, b_stride_2)[:, None]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if METRIC == COSINE:
        square_a = tl.zeros([ROWS, BLOCK_D], tl.float32)
        square_b = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(0, loop_bound(columns), BLOCK_D):
        column = (block + lane)[None, :]
        inside = (row < rows)[:, None] & (column < columns)
        value_a = tl.load(a + column * a_column_stride, mask=inside, other=0.0).to(tl.float32)
        value_b = tl.load(b + column * b_column_stride, mask=inside, other=0.0).to(tl.float32)
        if METRIC == EUCLIDEAN:
            total += (value_a - value_b) * (value_a - value_b)
        elif METRIC == MANHATTAN:
            total += tl.abs(value_a - value_b)
        else:
            total += value_a * value_b
        if METRIC == COSINE:
            square_a += value_a * value_a
            square_b += value_b * value_b
    score = tl.sum(total, 1)
    if METRIC == COSINE:
        length_a = tl.sqrt_rn(tl.sum(square_a, 1))
        length_b = tl.sqrt_rn(tl.sum(square_b, 1))
        tl.store(norm_a + row, length_a, mask=row < rows)
        tl.store(norm_b + row, length_b, mask=row < rows)
        score = score / at_least(length_a, eps) / at_least(length_b, eps)
    elif METRIC == EUCLIDEAN:
        score = -tl.sqrt_rn(score)
    elif METRIC == MANHATTAN:
        score = -score
    tl.store(scores + row, score, mask=row < rows)


@implements("pairwise_similarity_forward")
def pairwise_similarity_forward(a: Tensor, b: Tensor, metric: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    scores = a.new_empty(a.shape[:-1], dtype=torch.float32)
    norms = scores.shape if metric == reference.COSINE else (0,)
    norm_a, norm_b = scores.new_empty(norms), scores.new_empty(norms)
    if scores.numel():
        (a, b), inner, strides = merge_batch([a, b], a.ndim - 1)
        tile = row_tile(a.shape[-1])
        with on_device(a):
            _pairwise_kernel[(triton.cdiv(scores.numel(), tile["ROWS"]),)](
                a,
                b,
                scores,
                norm_a,
                norm_b,
                scores.numel(),
                a.shape[-1],
                *inner,
                *strides[0],
                a.stride(-1),
                *strides[1],
                b.stride(-1),
                eps,
                METRIC=metric,
                **tile,
            )
    return scores, norm_a, norm_b


@triton.jit(do_not_specialize=["rows"])
def _pairwise_backward_kernel(
    grad,
    a,
    b,
    scores,
    norm_a,
    norm_b,
    grad_a,
    grad_b,
    rows,
    columns,
    size_1,
    size_2,
    grad_stride_0,
    grad_stride_1,
    grad_stride_2,
    a_stride_0,
    a_stride_1,
    a_stride_2,
    a_column_stride,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    b_column_stride,
    eps,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad += batch_offset(row, size_1, size_2, grad_stride_0, grad_stride_1, grad_stride_2)
    a += batch_offset(row, size_1, size_2, a_stride_0, a_stride_1, a_stride_2)[:, None]
    b += batch_offset(row, size_1, size_2, b_stride_0, b_stride_1, b_stride_2)[:, None]
    column = lane[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    slope = tl.load(grad, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    value_a = tl.load(a + column * a_column_stride, mask=inside, other=0.0).to(tl.float32)
    value_b = tl.load(b + column * b_column_stride, mask=inside, other=0.0).to(tl.float32)
    if METRIC == COSINE:
        length_a = tl.load(norm_a + row, mask=row < rows, other=1.0)[:, None]
        length_b = tl.load(norm_b + row, mask=row < rows, other=1.0)[:, None]
        unit_a = value_a / at_least(length_a, eps)
        unit_b = value_b / at_least(length_b, eps)
        # The score is the product of the unit vectors: what the gradient has along each of them.
        score = tl.load(scores + row, mask=row < rows, other=0.0)[:, None]
        along_a = tl.where(length_a < eps, 0.0, unit_a * score)
        along_b = tl.where(length_b < eps, 0.0, unit_b * score)
        result_a = slope * (unit_b - along_a) / at_least(length_a, eps)
        result_b = slope * (unit_a - along_b) / at_least(length_b, eps)
    elif METRIC == DOT:
        result_a = slope * value_b
        result_b = slope * value_a
    else:
        difference = value_a - value_b
        if METRIC == EUCLIDEAN:
            distance = -tl.load(scores + row, mask=row < rows, other=0.0)[:, None]
            result_a = tl.where(distance == 0, 0.0, -slope * difference / distance)
        else:
            sign = tl.where(difference > 0, 1.0, 0.0) - tl.where(difference < 0, 1.0, 0.0)
            result_a = -slope * sign
        result_b = -result_a
    target = row[:, None] * columns + column
    tl.store(grad_a + target, result_a.to(grad_a.dtype.element_ty), mask=inside)
    tl.store(grad_b + target, result_b.to(grad_b.dtype.element_ty), mask=inside)


@implements("pairwise_similarity_backward")
def pairwise_similarity_backward(
    grad: Tensor, a: Tensor, b: Tensor, scores: Tensor, norm_a: Tensor, norm_b: Tensor, metric: int, eps: float
) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = a.new_empty(a.shape), b.new_empty(b.shape)
    if grad_a.numel():
        (grad, a, b), inner, strides = merge_batch([grad, a, b], a.ndim - 1)
        tile = row_tile(a.shape[-1])
        grid = triton.cdiv(grad.numel(), tile["ROWS"]), triton.cdiv(a.shape[-1], tile["BLOCK_D"])
        with on_device(a):
            _pairwise_backward_kernel[grid](
                grad,
                a,
                b,
                scores.contiguous(),
                norm_a.contiguous(),
                norm_b.contiguous(),
                grad_a,
                grad_b,
                grad.numel(),
                a.shape[-1],
                *inner,
                *strides[0],
                *strides[1],
                a.stride(-1),
                *strides[2],
                b.stride(-1),
                eps,
                METRIC=metric,
                **tile,
            )
    return grad_a, grad_b
