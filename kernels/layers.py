"""Layer norm with dropout and residual in Triton: whole rows, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.registry import implements

from .dropout import SEED_ARGUMENTS, Dropout, kept
from .triton_utils import batch_offset, loop_bound, merge_batch, on_device, parts_of_rows


def _whole_rows(columns: int, tile: int) -> dict[str, int]:
    """Whole rows stay in registers, `tile` numbers of them where they are short.

    16 numbers a thread forward and 8 backward, where more is kept, need at most 128 registers: 4 blocks per SM or more.
    """
    block = max(triton.next_power_of_2(columns), 64)
    return {"ROWS": max(tile // block, 1), "BLOCK_D": block, "num_warps": min(max(block // 512, 4), 32)}


@triton.jit(do_not_specialize=["rows", *SEED_ARGUMENTS])
def _norm_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    rows,
    columns,
    size_1,
    size_2,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_column_stride,
    residual_stride_0,
    residual_stride_1,
    residual_stride_2,
    residual_column_stride,
    eps,
    seed,
    stream,
    limit,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """total, mean and rstd are None where there is no gradient to come."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D)
    column = lane.to(tl.int64)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    x += batch_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)[:, None]
    value = tl.load(x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        value = tl.where(kept(row, 0, 0, seed, stream, limit, BLOCK_D), value * keep_scale, 0.0)
    if residual is not None:
        residual += batch_offset(row, size_1, size_2, residual_stride_0, residual_stride_1, residual_stride_2)[:, None]
        value += tl.load(residual + column * residual_column_stride, mask=inside, other=0.0).to(tl.float32)
    # The statistics are those of the sum as the gradient reads it, rounded to the dtype of y.
    stored = value.to(y.dtype.element_ty)
    target = row[:, None] * columns + column
    if total is not None:
        tl.store(total + target, stored, mask=inside)
    value = stored.to(tl.float32)
    middle = tl.sum(value, 1) / columns
    value = tl.where(inside, value - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / columns + eps)
    if total is not None:
        tl.store(mean + row, middle, mask=row < rows)
        tl.store(rstd + row, scale, mask=row < rows)
    result = value * scale[:, None] * tl.load(weight + lane, mask=lane < columns, other=0.0)[None, :]
    if bias is not None:
        result += tl.load(bias + lane, mask=lane < columns, other=0.0)[None, :]
    tl.store(y + target, result.to(y.dtype.element_ty), mask=inside)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    how: Dropout,
    y: Tensor,
    kept_for_gradient: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fills y, and the sum, mean and 1 / sqrt unless they are None."""
    if not y.numel():
        return
    columns = x.shape[-1]
    rows = x.numel() // columns
    tensors, inner, strides = merge_batch([x] if residual is None else [x, residual], x.ndim - 1)
    # Without a residual its strides are not used.
    x, added = tensors[0], tensors[-1]
    block = _whole_rows(columns, 2048)
    with on_device(x):
        _norm_kernel[(triton.cdiv(rows, block["ROWS"]),)](
            x,
            None if residual is None else added,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            *kept_for_gradient,
            rows,
            columns,
            *inner,
            *strides[0],
            x.stride(-1),
            *strides[-1],
            added.stride(-1),
            eps,
            *how[:4],
            DROPOUT=how.active,
            **block,
        )


@implements("dropout_add_layer_norm_forward")
def dropout_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _norm(x, residual, weight, bias, eps, Dropout.of(dropout_p, seed, stream), y, (total, mean, rstd))
    return y, total, mean, rstd


@implements("dropout_add_layer_norm")
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    stream: int,
) -> Tensor:
    y = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    _norm(x, residual, weight, bias, eps, Dropout.of(dropout_p, seed, stream), y, (None, None, None))
    return y


@triton.jit(do_not_specialize=["rows", *SEED_ARGUMENTS])
def _norm_backward_kernel(
    grad,
    total,
    mean,
    rstd,
    weight,
    grad_total,
    grad_x,
    partial,
    rows,
    columns,
    size_1,
    size_2,
    grad_stride_0,
    grad_stride_1,
    grad_stride_2,
    grad_column_stride,
    seed,
    stream,
    limit,
    keep_scale,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With g = grad * weight and z = (total - mean) * rstd: rstd (g - mean(g) - z mean(g z)).

    Each program adds up the gradients of weight and bias over its rows and stores them as a row of `partial`.
    """
    lane = tl.arange(0, BLOCK_D)
    column = lane.to(tl.int64)[None, :]
    factor = tl.load(weight + lane, mask=lane < columns, other=0.0)[None, :]
    sum_weight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(loop_bound(tl.program_id(0)), loop_bound(tl.cdiv(rows, ROWS)), loop_bound(tl.num_programs(0))):
        row = tl.full([], block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)
        from_grad = grad + batch_offset(row, size_1, size_2, grad_stride_0, grad_stride_1, grad_stride_2)[:, None]
        slope = tl.load(from_grad + column * grad_column_stride, mask=inside, other=0.0).to(tl.float32)
        target = row[:, None] * columns + column
        value = tl.load(total + target, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        z = tl.where(inside, (value - middle) * scale, 0.0)
        sum_weight += slope * z
        sum_bias += slope
        slope *= factor
        average = (tl.sum(slope, 1) / columns)[:, None]
        along = (tl.sum(slope * z, 1) / columns)[:, None]
        result = (slope - average - z * along) * scale
        tl.store(grad_total + target, result.to(grad_total.dtype.element_ty), mask=inside)
        if grad_x is not None:
            if DROPOUT:
                result = tl.where(kept(row, 0, 0, seed, stream, limit, BLOCK_D), result * keep_scale, 0.0)
            tl.store(grad_x + target, result.to(grad_x.dtype.element_ty), mask=inside)
    partial += tl.program_id(0).to(tl.int64) * 2 * columns + lane
    tl.store(partial, tl.sum(sum_weight, 0), mask=lane < columns)
    tl.store(partial + columns, tl.sum(sum_bias, 0), mask=lane < columns)


@implements("dropout_add_layer_norm_backward")
def dropout_add_layer_norm_backward(
    grad: Tensor,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    like: Tensor,
    dropout_p: float,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sum = torch.empty_like(grad, memory_format=torch.contiguous_format)
    how = Dropout.of(dropout_p, seed, stream)
    same = dropout_p == 0.0 and like.dtype == grad.dtype
    grad_x = like.new_empty(0 if same else grad.shape)
    columns = grad.shape[-1]
    if not grad.numel():
        grad_weight, grad_bias = mean.new_zeros(2, columns)
        return grad_sum, grad_x, grad_weight, grad_bias
    (grad,), inner, (stride,) = merge_batch([grad], grad.ndim - 1)
    block = _whole_rows(columns, 1024)
    parts = parts_of_rows(grad, triton.cdiv(mean.numel(), block["ROWS"]))
    partial = mean.new_empty(parts, 2, columns)
    with on_device(grad):
        _norm_backward_kernel[(parts,)](
            grad,
            sum.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            weight.contiguous(),
            grad_sum,
            None if same else grad_x,
            partial,
            mean.numel(),
            columns,
            *inner,
            *stride,
            grad.stride(-1),
            *how[:4],
            DROPOUT=how.active,
            **block,
        )
    grad_weight, grad_bias = partial.sum(dim=0)
    return grad_sum, grad_x, grad_weight, grad_bias
