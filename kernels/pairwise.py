"""Similarity of row i with row i in Triton, in one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.registry import implements

from .normalize import at_least, root, term
from .triton_utils import batch_offset, loop_bound, merge_batch, on_device, row_tile

COSINE = tl.constexpr(reference.COSINE)
DOT = tl.constexpr(reference.DOT)
EUCLIDEAN = tl.constexpr(reference.EUCLIDEAN)
MANHATTAN = tl.constexpr(reference.MANHATTAN)


@triton.jit
def in_range(norms):
    """Whether a sum of products of two rows has lost nothing to float32's range, by the product of their norms."""
    return (norms >= 1e-30) & (norms < float("inf"))


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
    ONE: tl.constexpr,
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
            total += term(value_a - value_b, ONE)
        elif METRIC == MANHATTAN:
            total += tl.abs(value_a - value_b)
        else:
            total += value_a * value_b
        if METRIC == COSINE:
            square_a += term(value_a, ONE)
            square_b += term(value_b, ONE)
    score = tl.sum(total, 1)
    if METRIC == COSINE:
        length_a = root(tl.sum(square_a, 1), ONE)
        length_b = root(tl.sum(square_b, 1), ONE)
        tl.store(norm_a + row, length_a, mask=row < rows)
        tl.store(norm_b + row, length_b, mask=row < rows)
        divisor_a = at_least(length_a, eps)
        divisor_b = at_least(length_b, eps)
        score = score / divisor_a / divisor_b
        outside = row < rows
        if not ONE:  # whose cosine is 1 or -1, which is not left to roundings
            outside = outside & ~in_range(length_a * length_b)
        if tl.max(outside.to(tl.int32), 0) > 0:
            # Rare: each element is divided before it is multiplied.
            total = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for block in range(0, loop_bound(columns), BLOCK_D):
                column = (block + lane)[None, :]
                inside = (row < rows)[:, None] & (column < columns)
                value_a = tl.load(a + column * a_column_stride, mask=inside, other=0.0).to(tl.float32)
                value_b = tl.load(b + column * b_column_stride, mask=inside, other=0.0).to(tl.float32)
                unit = (value_a / divisor_a[:, None]) * (value_b / divisor_b[:, None])
                total += tl.where(inside, unit, 0.0)
            score = tl.where(outside, tl.sum(total, 1), score)
    elif METRIC == EUCLIDEAN:
        score = -root(score, ONE)
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
                ONE=a.shape[-1] == 1,
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
