"""Pooling in Triton: one pass over the tokens in use, padded or packed, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.reference import NORMALIZE_EPS
from sentfast.registry import implements

from .normalize import normalize_rows, normalize_rows_backward
from .triton_utils import loop_bound, on_device

MEAN = tl.constexpr(reference.MEAN)
MAX = tl.constexpr(reference.MAX)
CLS = tl.constexpr(reference.CLS)
LASTTOKEN = tl.constexpr(reference.LASTTOKEN)
WEIGHTEDMEAN = tl.constexpr(reference.WEIGHTEDMEAN)
MEAN_SQRT_LEN_TOKENS = tl.constexpr(reference.MEAN_SQRT_LEN_TOKENS)
NO_POSITION = tl.constexpr(2**31 - 1)

_CONFIG = {"BLOCK_T": 32, "BLOCK_D": 128, "BLOCK_MASK": 512, "num_warps": 4}
_VALUES_NOT_COMPILED_IN = ["length", "prompt_length", "steps", "batch"]


# ---- which tokens a sequence uses -------------------------------------------------------------------------------
# Each function returns, as positions counted from the sequence's first row: `begin` and `end` of the rows in use,
# `first` and `last` for cls and lasttoken (-1: none), `origin` from which weights count, and the number and the sum of
# weights of the rows in use. Packed sequences can be scalars or one per row.


@triton.jit
def _unmasked_tokens(length, prompt_length, PACKED: tl.constexpr):
    count = tl.maximum(length - prompt_length, 0)
    weight = count.to(tl.int64) * (length.to(tl.int64) + prompt_length + 1) // 2
    first = tl.where(length == 0, -1, tl.where(count > 0, prompt_length, 0))
    # A packed sequence's last token counts even where it belongs to the prompt.
    last = length - 1 if PACKED else tl.where(count > 0, length - 1, -1)
    return prompt_length, length, first, last, length * 0, count, weight


@triton.jit
def _masked_tokens(mask, stride, length, prompt_length, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    left = tl.full([BLOCK], NO_POSITION, tl.int32)
    end = tl.zeros([BLOCK], tl.int32)
    for start in range(0, loop_bound(length), BLOCK):
        t = start + lane
        token = tl.load(mask + t.to(tl.int64) * stride, mask=t < length, other=0) != 0
        left = tl.minimum(left, tl.where(token, t, NO_POSITION))
        end = tl.maximum(end, tl.where(token, t + 1, 0))
    end = tl.max(end, 0)
    origin = tl.where(end > 0, tl.min(left, 0), 0)
    begin = tl.minimum(origin + prompt_length, end)

    first = tl.full([BLOCK], NO_POSITION, tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    weight = tl.zeros([BLOCK], tl.int64)
    for start in range(loop_bound(begin), loop_bound(end), BLOCK):
        t = start + lane
        token = tl.load(mask + t.to(tl.int64) * stride, mask=t < end, other=0) != 0
        first = tl.minimum(first, tl.where(token, t, NO_POSITION))
        count += tl.where(token, 1, 0)
        weight += tl.where(token, t - origin + 1, 0)
    count = tl.sum(count, 0)
    first = tl.where(count > 0, tl.min(first, 0), tl.where(length == 0, -1, 0))
    last = tl.where(count > 0, end - 1, -1)
    return begin, end, first, last, origin, count, tl.sum(weight, 0)


@triton.jit
def _scale(MODE: tl.constexpr, count, weight):
    """1 / denominator of the three means."""
    if MODE == WEIGHTEDMEAN:
        total = tl.maximum(weight.to(tl.float32), 1e-9)
    else:
        total = tl.maximum(count.to(tl.float32), 1e-9)
        if MODE == MEAN_SQRT_LEN_TOKENS:
            total = tl.sqrt_rn(total)
    return 1.0 / total


# ---- forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _first_largest(top, index):
    """Over the rows of a tile: the largest value, NaN if there is one, and the smallest index that has it (or -1)."""
    nan = top != top
    has_nan = tl.max(nan.to(tl.int32), 0) > 0
    value = tl.max(tl.where(nan, float("-inf"), top), 0)
    hit = tl.where(has_nan[None, :], nan, top == value[None, :]) & (index >= 0)
    first = tl.min(tl.where(hit, index, NO_POSITION), 0)
    return tl.where(has_nan, float("nan"), value), tl.where(first == NO_POSITION, -1, first)


@triton.jit(do_not_specialize=_VALUES_NOT_COMPILED_IN)
def _pool_kernel(
    x,
    attention_mask,
    cu_seqlens,
    out,
    argmax,
    length,
    prompt_length,
    columns,
    column_blocks,
    x_batch_stride,
    x_token_stride,
    x_column_stride,
    mask_batch_stride,
    mask_token_stride,
    cu_seqlens_stride,
    MODES: tl.constexpr,
    READ_SUM: tl.constexpr,
    READ_WEIGHTED: tl.constexpr,
    READ_MAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
):
    """One program per sequence and block of columns; length is that of a padded batch or the total of a packed one."""
    sequence = (tl.program_id(0) // column_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = column < columns
    if cu_seqlens is not None:
        # Bad values must not lead outside the tensor.
        ends = cu_seqlens + sequence * cu_seqlens_stride
        start = tl.minimum(tl.maximum(tl.load(ends), 0), length)
        stop = tl.minimum(tl.maximum(tl.load(ends + cu_seqlens_stride), start), length)
        begin, end, first, last, origin, count, weight = _unmasked_tokens(stop - start, prompt_length, True)
        x += start.to(tl.int64) * x_token_stride
    else:
        x += sequence * x_batch_stride
        if attention_mask is not None:
            mask = attention_mask + sequence * mask_batch_stride
            begin, end, first, last, origin, count, weight = _masked_tokens(
                mask, mask_token_stride, length, prompt_length, BLOCK_MASK
            )
        else:
            begin, end, first, last, origin, count, weight = _unmasked_tokens(length, prompt_length, False)
    x += column * x_column_stride

    if READ_SUM:
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if READ_WEIGHTED:
        weighted = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if READ_MAX:
        top = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
        index = tl.full([BLOCK_T, BLOCK_D], -1, tl.int32)
    if READ_SUM or READ_WEIGHTED or READ_MAX:
        for block in range(loop_bound(begin), loop_bound(end), BLOCK_T):
            t = block + tl.arange(0, BLOCK_T)
            used = t < end
            if attention_mask is not None:
                used = tl.load(mask + t.to(tl.int64) * mask_token_stride, mask=used, other=0) != 0
            rows = x[None, :] + t.to(tl.int64)[:, None] * x_token_stride
            use = used[:, None] & inside[None, :]
            value = tl.load(rows, mask=use, other=0.0).to(tl.float32)
            if READ_SUM:
                total += value
            if READ_WEIGHTED:
                weighted += value * (t - origin + 1).to(tl.float32)[:, None]
            if READ_MAX:
                larger = (value > top) | ((value != value) & (top == top)) | (index < 0)
                top = tl.where(use & larger, value, top)
                index = tl.where(use & larger, t[:, None], index)

    if READ_MAX:
        top, index = _first_largest(top, index)
        tl.store(argmax + sequence * columns + column, index, mask=inside)
    out += sequence * len(MODES) * columns + column
    for i in tl.static_range(len(MODES)):
        if MODES[i] == CLS:
            part = tl.load(x + first.to(tl.int64) * x_token_stride, mask=inside & (first >= 0), other=0.0)
        elif MODES[i] == LASTTOKEN:
            part = tl.load(x + last.to(tl.int64) * x_token_stride, mask=inside & (last >= 0), other=0.0)
        elif MODES[i] == MAX:
            part = top
        elif MODES[i] == WEIGHTEDMEAN:
            part = tl.sum(weighted, 0) * _scale(WEIGHTEDMEAN, count, weight)
        else:
            part = tl.sum(total, 0) * _scale(MODES[i], count, weight)
        tl.store(out + i * columns, part.to(tl.float32).to(out.dtype.element_ty), mask=inside)


def _as_integers(attention_mask: Tensor | None) -> Tensor | None:
    """The mask's bytes as signed integers: whether one is zero stays the same, and fewer kernels are compiled."""
    if attention_mask is None:
        return None
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return attention_mask.view(integers[attention_mask.element_size()])


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else tuple(x.stride())


@implements("pool_forward")
def pool_forward(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    modes: Sequence[int],
    prompt_length: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    length, columns = x.shape[-2:]
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # The norm needs whole rows, so it is a second kernel over the small result, which stays float32 until then.
    pooled = x.new_empty(batch, len(modes) * columns, dtype=torch.float32 if normalize else x.dtype)
    read_max = reference.MAX in modes
    argmax = x.new_empty((batch, columns) if read_max else (0,), dtype=torch.int32)
    if pooled.numel():
        mask = _as_integers(attention_mask)
        column_blocks = triton.cdiv(columns, _CONFIG["BLOCK_D"])
        with on_device(x):
            _pool_kernel[(batch * column_blocks,)](
                x,
                mask,
                cu_seqlens,
                pooled,
                argmax,
                length,
                min(prompt_length, length),
                columns,
                column_blocks,
                *(x.stride() if cu_seqlens is None else (0, *x.stride())),
                *_strides(mask, 2),
                *_strides(cu_seqlens, 1),
                MODES=tuple(modes),
                READ_SUM=reference.MEAN in modes or reference.MEAN_SQRT_LEN_TOKENS in modes,
                READ_WEIGHTED=reference.WEIGHTEDMEAN in modes,
                READ_MAX=read_max,
                **_CONFIG,
            )
    if not normalize:
        return pooled, x.new_empty(0, dtype=torch.float32), argmax
    out, norm = normalize_rows(pooled, NORMALIZE_EPS, x.dtype)
    return out, norm, argmax


# ---- backward ---------------------------------------------------------------------------------------------------


@triton.jit
def _sequence_of(row, cu_seqlens, stride, batch, steps):
    """The sequence that holds each row, by bisection."""
    low = tl.zeros_like(row)
    high = low + batch
    for _ in range(loop_bound(steps)):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens + middle.to(tl.int64) * stride) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return tl.minimum(low, batch - 1).to(tl.int64)


@triton.jit(do_not_specialize=_VALUES_NOT_COMPILED_IN)
def _pool_backward_kernel(
    grad,
    argmax,
    attention_mask,
    cu_seqlens,
    grad_x,
    length,
    prompt_length,
    batch,
    steps,
    columns,
    column_blocks,
    grad_row_stride,
    grad_column_stride,
    argmax_row_stride,
    argmax_column_stride,
    mask_batch_stride,
    mask_token_stride,
    cu_seqlens_stride,
    MODES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
):
    """One program per block of rows and of columns: every element is written once, zero where no mode read it."""
    block = tl.program_id(0) // column_blocks
    column = (tl.program_id(0) % column_blocks) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = column < columns
    if cu_seqlens is not None:
        row = block * BLOCK_T + tl.arange(0, BLOCK_T)
        written = row < length
        sequence = _sequence_of(row, cu_seqlens, cu_seqlens_stride, batch, steps)
        ends = cu_seqlens + sequence * cu_seqlens_stride
        start = tl.minimum(tl.maximum(tl.load(ends), 0), length)
        stop = tl.minimum(tl.maximum(tl.load(ends + cu_seqlens_stride), start), length)
        begin, end, first, last, origin, count, weight = _unmasked_tokens(stop - start, prompt_length, True)
        t = row - start
        used = (t >= begin) & (t < end)
        row = row.to(tl.int64)
    else:
        blocks = tl.cdiv(length, BLOCK_T)
        sequence = (block // blocks).to(tl.int64)
        t = (block % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
        written = t < length
        row = sequence * length + t
        if attention_mask is not None:
            mask = attention_mask + sequence * mask_batch_stride
            begin, end, first, last, origin, count, weight = _masked_tokens(
                mask, mask_token_stride, length, prompt_length, BLOCK_MASK
            )
            used = (t >= begin) & (t < end)
            used = tl.load(mask + t.to(tl.int64) * mask_token_stride, mask=used, other=0) != 0
        else:
            begin, end, first, last, origin, count, weight = _unmasked_tokens(length, prompt_length, False)
            used = (t >= begin) & (t < end)
        sequence += tl.zeros_like(row)

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in tl.static_range(len(MODES)):
        factor = tl.full([BLOCK_T], 1.0, tl.float32)
        if MODES[i] == MAX:
            winner = argmax + sequence[:, None] * argmax_row_stride + (column * argmax_column_stride)[None, :]
            hit = tl.load(winner, mask=used[:, None] & inside[None, :], other=-1) == t[:, None]
        else:
            if MODES[i] == CLS:
                reads = t == first
            elif MODES[i] == LASTTOKEN:
                reads = t == last
            else:
                reads = used
                factor = tl.zeros([BLOCK_T], tl.float32) + _scale(MODES[i], count, weight)
                if MODES[i] == WEIGHTEDMEAN:
                    factor *= (t - origin + 1).to(tl.float32)
            hit = reads[:, None] & inside[None, :]
        part = grad + sequence[:, None] * grad_row_stride + ((column + i * columns) * grad_column_stride)[None, :]
        total += tl.load(part, mask=hit & written[:, None], other=0.0).to(tl.float32) * factor[:, None]
    target = grad_x + row[:, None] * columns + column[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=written[:, None] & inside[None, :])


@implements("pool_backward")
def pool_backward(
    grad: Tensor,
    out: Tensor,
    norm: Tensor,
    argmax: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    modes: Sequence[int],
    prompt_length: int,
    length: int,
    normalize: bool,
) -> Tensor:
    batch, columns = grad.shape[0], grad.shape[-1] // len(modes)
    grad_x = grad.new_empty((length, columns) if cu_seqlens is not None else (batch, length, columns))
    if batch == 0 or grad_x.numel() == 0:
        return grad_x.zero_()
    if normalize:
        grad = normalize_rows_backward(grad, out, norm, NORMALIZE_EPS, torch.float32, unit=True)
    mask = _as_integers(attention_mask)
    row_blocks = triton.cdiv(length, _CONFIG["BLOCK_T"]) * (1 if cu_seqlens is not None else batch)
    column_blocks = triton.cdiv(columns, _CONFIG["BLOCK_D"])
    with on_device(grad):
        _pool_backward_kernel[(row_blocks * column_blocks,)](
            grad,
            argmax,
            mask,
            cu_seqlens,
            grad_x,
            length,
            min(prompt_length, length),
            batch,
            (batch - 1).bit_length(),
            columns,
            column_blocks,
            *grad.stride(),
            *(argmax.stride() if argmax.ndim == 2 else (0, 0)),
            *_strides(mask, 2),
            *_strides(cu_seqlens, 1),
            MODES=tuple(modes),
            **_CONFIG,
        )
    return grad_x
