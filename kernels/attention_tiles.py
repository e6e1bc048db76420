"""What attention's kernels share: where a sequence lies, tiles of rows, masked scores, and how a call is described."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import Dropout
from .rotary import turned
from .triton_utils import tf32_allowed

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
LARGEST_HEAD = 256  # a larger one has no tile that fits
_FAR = 2**30  # a window as wide as any sequence, in 32 bits


@triton.jit
def sequence_span(cu_seqlens, sequence, tokens):
    """First token (int64) and length of a sequence, within the tensor whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), first), tokens)
    return first.to(tl.int64), (end - first).to(tl.int32)


@triton.jit
def load_rows(x, row, length, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a sequence, [rows, BLOCK_D]; zeros past its end and past the head's columns."""
    column = tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (column < HEAD_DIM)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_turned_rows(
    x, row, length, stride, position_ids, cosines, sines, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a sequence turned by the angles of their positions: their two halves, [rows, BLOCK_D / 2]."""
    lane = tl.arange(0, BLOCK_D // 2)[None, :]
    inside = (row < length)[:, None] & (lane < HEAD_DIM // 2)
    position = tl.load(position_ids + row, mask=row < length, other=0)[:, None]
    x += row.to(tl.int64)[:, None] * stride + lane
    return turned(x, position, cosines, sines, inside, lane, HEAD_DIM // 2)


@triton.jit
def store_rows(x, row, length, stride, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (column < HEAD_DIM)[None, :]
    tl.store(x + row.to(tl.int64)[:, None] * stride + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def masked_scores(product, query, key, length, bias, scale, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Scores times log2(e), -inf where a query does not see a key, and whether it does.

    product: <q, k>; query and key: places that broadcast to its shape; bias: at distance 0.
    """
    seen = (query < length) & (key < length)
    if LEFT:
        seen = seen & (key >= query - left)
    if RIGHT:
        seen = seen & (key <= query + right)
    score = product * (scale * LOG2E)
    if bias is not None:
        score += tl.load(bias + (key - query), mask=seen, other=0.0) * LOG2E
    return tl.where(seen, score, -INFINITY), seen


class Plan(NamedTuple):
    """A call as its kernels take it."""

    parts: tuple[Tensor, ...]  # q, k, v (and grad), side by side in the last dimension
    arguments: tuple  # from `reach` to `keep_scale`
    constants: dict[str, Any]
    block_d: int
    float32: bool

    def strides(self) -> list[int]:
        return [x.stride(dim) for x in self.parts for dim in (0, 1)]


def plan(
    parts: tuple[Tensor, ...], bias: Tensor | None, softmax_scale: float, left: int, right: int, dropout: Dropout
) -> Plan:
    parts = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in parts)
    head_dim = parts[0].shape[-1]
    block_d = max(triton.next_power_of_2(head_dim), 16)
    reach = 1 if bias is None else (bias.shape[1] + 1) // 2
    constants = {
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "DROPOUT": dropout.active,
        # Three products of tf32 numbers have the error of float32's own.
        "PRECISION": "tf32" if tf32_allowed() else "tf32x3",
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    arguments = (reach, softmax_scale, min(left, _FAR), min(right, _FAR), *dropout[:4])
    return Plan(parts, arguments, constants, block_d, parts[0].dtype == torch.float32)
