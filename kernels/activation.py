"""Bias and activation in Triton, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.reference import ACTIVATIONS
from sentfast.registry import implements

from .triton_utils import batch_offset, elementwise_tile, loop_bound, merge_batch, on_device, parts_of_rows

GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
RELU = tl.constexpr(ACTIVATIONS.index("relu"))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == RELU:
        y = tl.where(x <= 0, 0.0, x)
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == GELU_TANH:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == RELU:
        y = tl.where(x <= 0, 0.0, 1.0)
    else:
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    return y


@triton.jit(do_not_specialize=["rows"])
def _activation_kernel(
    x,
    bias,
    y,
    rows,
    columns,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    column_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = lane.to(tl.int64)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    x += batch_offset(row, size_1, size_2, stride_0, stride_1, stride_2)[:, None] + column * column_stride
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + lane, mask=lane < columns, other=0.0)[None, :]
    value = activate(value, ACTIVATION)
    tl.store(y + row[:, None] * columns + column, value.to(y.dtype.element_ty), mask=inside)


@implements("bias_activation")
def bias_activation(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        columns = x.shape[-1]
        rows = y.numel() // columns
        (x,), inner, (stride,) = merge_batch([x], x.ndim - 1)
        block = elementwise_tile(columns)
        grid = triton.cdiv(rows, block["ROWS"]), triton.cdiv(columns, block["BLOCK_D"])
        bias = None if bias is None else bias.contiguous()
        with on_device(x):
            _activation_kernel[grid](
                x, bias, y, rows, columns, *inner, *stride, x.stride(-1), ACTIVATION=activation, **block
            )
    return y


@triton.jit(do_not_specialize=["rows"])
def _gated_kernel(x, bias, y, rows, columns, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = lane < columns
    inside = (row < rows)[:, None] & used[None, :]
    x += row[:, None] * 2 * columns + lane[None, :]
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + lane, mask=used, other=0.0)[None, :]
        gate += tl.load(bias + columns + lane, mask=used, other=0.0)[None, :]
    value = activate(value, ACTIVATION) * gate
    tl.store(y + row[:, None] * columns + lane[None, :], value.to(y.dtype.element_ty), mask=inside)


@implements("gated_activation")
def gated_activation(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    columns = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], columns)
    if y.numel():
        rows = y.numel() // columns
        block = elementwise_tile(columns)
        grid = triton.cdiv(rows, block["ROWS"]), triton.cdiv(columns, block["BLOCK_D"])
        bias = None if bias is None else bias.contiguous()
        with on_device(x):
            _gated_kernel[grid](x.contiguous(), bias, y, rows, columns, ACTIVATION=activation, **block)
    return y


@triton.jit(do_not_specialize=["rows"])
def _activation_backward_kernel(
    grad,
    x,
    bias,
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
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_column_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program adds up the gradient of the bias over its rows and stores it as a row of `partial`."""
    lane = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = lane.to(tl.int64)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if bias is not None:
        added = tl.load(bias + lane, mask=lane < columns, other=0.0)[None, :]
    for block in range(loop_bound(tl.program_id(0)), loop_bound(tl.cdiv(rows, ROWS)), loop_bound(tl.num_programs(0))):
        row = tl.full([], block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)
        from_grad = grad + batch_offset(row, size_1, size_2, grad_stride_0, grad_stride_1, grad_stride_2)[:, None]
        from_x = x + batch_offset(row, size_1, size_2, x_stride_0, x_stride_1, x_stride_2)[:, None]
        slope = tl.load(from_grad + column * grad_column_stride, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(from_x + column * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += added
        result = slope * _slope(value, ACTIVATION)
        tl.store(grad_x + row[:, None] * columns + column, result.to(grad_x.dtype.element_ty), mask=inside)
        if bias is not None:
            total += tl.where(inside, result, 0.0)
    if bias is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * columns + lane, tl.sum(total, 0), mask=lane < columns)


@implements("bias_activation_backward")
def bias_activation_backward(grad: Tensor, x: Tensor, bias: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    none = x.new_empty(0, dtype=torch.float32)
    if not x.numel():
        return grad_x, none if bias is None else bias.new_zeros(bias.shape, dtype=torch.float32)
    columns = x.shape[-1]
    rows = x.numel() // columns
    (grad, x), inner, strides = merge_batch([grad, x], x.ndim - 1)
    block = elementwise_tile(columns)
    across = triton.cdiv(columns, block["BLOCK_D"])
    parts = parts_of_rows(x, triton.cdiv(rows, block["ROWS"]), across)
    partial = None if bias is None else x.new_empty(parts, columns, dtype=torch.float32)
    with on_device(x):
        _activation_backward_kernel[(parts, across)](
            grad,
            x,
            None if bias is None else bias.contiguous(),
            grad_x,
            partial,
            rows,
            columns,
            *inner,
            *strides[0],
            grad.stride(-1),
            *strides[1],
            x.stride(-1),
            ACTIVATION=activation,
            **block,
        )
    return grad_x, none if partial is None else partial.sum(dim=0)
