"""Dropout in Triton: the mask of ``reference/random.py``, which the other kernels share, and the operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast.reference import random
from sentfast.registry import implements

from .triton_utils import batch_offset, elementwise_tile, merge_batch, on_device

ROUNDS = tl.constexpr(random.ROUNDS)
SEED_ARGUMENTS = ["seed", "stream", "limit"]  # never compiled in


class Dropout(NamedTuple):
    """What a kernel is told of dropout; its mask is that of :func:`kept`."""

    seed: int
    stream: int
    limit: int  # the largest random number that drops an element
    scale: float  # of the elements that stay
    active: bool

    @classmethod
    def of(cls, p: float, seed: int, stream: int) -> Dropout:
        threshold = int(p * 2**32)
        return cls(seed, stream, max(threshold - 1, 0), random.scale(p), threshold > 0)


@triton.jit
def kept(row, column, head, seed, stream, limit, WIDTH: tl.constexpr):
    """Whether rows [N] keep the WIDTH columns from `column`; WIDTH, a power of two from 16, divides it. [N, WIDTH].

    A counter is computed once for the four columns that it serves, so the words are put in order, not looked up.
    """
    COUNTERS: tl.constexpr = WIDTH // 4 if WIDTH >= 64 else 16
    counter = column // 64 * 16 + tl.arange(0, COUNTERS)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, counter[None, :], row.to(tl.uint32)[:, None], tl.cast(head, tl.uint32), tl.cast(stream, tl.uint32), ROUNDS
    )
    limit = tl.cast(limit, tl.uint32)
    keep_0 = word_0 > limit
    keep_1 = word_1 > limit
    keep_2 = word_2 > limit
    keep_3 = word_3 > limit
    late = column % 64 >= 32
    if WIDTH >= 64:
        words = tl.join(tl.join(keep_0, keep_2), tl.join(keep_1, keep_3))
        words = tl.reshape(words, [row.shape[0], WIDTH // 64, 16, 4])
        result = tl.reshape(tl.permute(words, [0, 1, 3, 2]), [row.shape[0], WIDTH])
    elif WIDTH == 32:
        words = tl.join(tl.where(late, keep_2, keep_0), tl.where(late, keep_3, keep_1))
        result = tl.reshape(tl.permute(words, [0, 2, 1]), [row.shape[0], WIDTH])
    else:
        even = tl.where(late, keep_2, keep_0)
        odd = tl.where(late, keep_3, keep_1)
        result = tl.where(column % 32 >= 16, odd, even)
    return result


@triton.jit(do_not_specialize=["rows", *SEED_ARGUMENTS])
def _dropout_kernel(
    x,
    y,
    rows,
    columns,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    column_stride,
    seed,
    stream,
    limit,
    scale,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK_D
    column = (first + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    x += batch_offset(row, size_1, size_2, stride_0, stride_1, stride_2)[:, None] + column * column_stride
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(kept(row, first, 0, seed, stream, limit, BLOCK_D), value * scale, 0.0)
    tl.store(y + row[:, None] * columns + column, value.to(y.dtype.element_ty), mask=inside)


@implements("dropout")
def dropout(x: Tensor, dropout_p: float, seed: int, stream: int) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    how = Dropout.of(dropout_p, seed, stream)
    if not how.active:
        return y.copy_(x)
    if y.numel():
        columns = x.shape[-1]
        (x,), inner, (stride,) = merge_batch([x], x.ndim - 1)
        block = elementwise_tile(columns)
        rows = y.numel() // columns
        grid = triton.cdiv(rows, block["ROWS"]), triton.cdiv(columns, block["BLOCK_D"])
        with on_device(x):
            _dropout_kernel[grid](x, y, rows, columns, *inner, *stride, x.stride(-1), *how[:4], **block)
    return y
