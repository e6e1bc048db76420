"""Rotary position embedding in Triton: queries and keys are turned where they lie, or as attention loads them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.registry import implements

from .triton_utils import on_device

_TILE = 1024


@triton.jit
def turned(x, position, cosines, sines, inside, lane, HALF: tl.constexpr):
    """Real and imaginary parts of rows of a head, whose halves they are, turned by the angles of their positions.

    x: where the real parts lie, HALF columns before the imaginary ones; position: a column of integers.
    """
    angle = position.to(tl.int64) * HALF + lane
    cosine = tl.load(cosines + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sines + angle, mask=inside, other=0.0).to(tl.float32)
    real = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    imaginary = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    return (real * cosine - imaginary * sine).to(dtype), (imaginary * cosine + real * sine).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    qkv, position_ids, cosines, sines, rows, heads, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A row is a head of a query or key. The heads of a token's key follow those of its query."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    token = row // (2 * heads)
    inside = (row < rows)[:, None] & (lane < HALF)
    position = tl.load(position_ids + token, mask=row < rows, other=0)[:, None]
    qkv += ((token * 3 * heads + row % (2 * heads)) * 2 * HALF)[:, None] + lane
    real, imaginary = turned(qkv, position, cosines, sines, inside, lane, HALF)
    tl.store(qkv, real, mask=inside)
    tl.store(qkv + HALF, imaginary, mask=inside)


@implements("rotate_")
def rotate_(qkv: Tensor, position_ids: Tensor, cosines: Tensor, sines: Tensor) -> None:
    if not qkv.is_contiguous():
        return reference.rotate_(qkv, position_ids, cosines, sines)
    tokens, _, heads, head_dim = qkv.shape
    rows, half = tokens * 2 * heads, head_dim // 2
    if rows * half:
        block = triton.next_power_of_2(half)
        height = max(1, _TILE // block)
        position_ids, cosines, sines = (x.contiguous() for x in (position_ids, cosines, sines))
        with on_device(qkv):
            _rotate_kernel[(triton.cdiv(rows, height),)](
                qkv, position_ids, cosines, sines, rows, heads, HALF=half, ROWS=height, BLOCK=block, num_warps=4
            )
    return None
