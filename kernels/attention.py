"""Attention of packed sequences in Triton, forward: one pass over the keys with a running softmax.

A program has a block of queries of one head of one sequence; those past the end of their sequence return at once.
Where there are angles, queries and keys are turned as they are loaded, each key once for every block of queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.registry import implements

from .attention_tiles import (
    INFINITY,
    LARGEST_HEAD,
    Plan,
    load_rows,
    load_turned_rows,
    masked_scores,
    plan,
    sequence_span,
    store_rows,
)
from .dropout import SEED_ARGUMENTS, Dropout, kept
from .triton_utils import loop_bound, on_device

LN2 = tl.constexpr(0.6931471805599453)

# By the padded head size: (queries, keys, warps, stages). Sequences are short and the loop has few steps, so blocks per
# SM count more than steps under way. Half numbers, up to 64 columns: three blocks of 64 queries per SM (two on sm_100);
# or one or two of 128 by twice the warps, which read the keys half as often and are for sequences of more than 128.
# Keys are as many in both, so the bits of a result do not depend on the longest sequence beside it.
_HALF = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)}
_HALF_LONG = _HALF | {16: (128, 64, 8, 2), 32: (128, 64, 8, 2), 64: (128, 64, 8, 2)}
_FLOAT32 = {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}


@triton.jit(do_not_specialize=["tokens", "blocks", "reach", "left", "right", *SEED_ARGUMENTS])
def _attention_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    bias,
    position_ids,
    cosines,
    sines,
    tokens,
    heads,
    blocks,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    reach,
    softmax_scale,
    left,
    right,
    seed,
    stream,
    limit,
    keep_scale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    begin = tl.program_id(0) % blocks * QUERIES
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first, length = sequence_span(cu_seqlens, tl.program_id(0) // blocks // heads, tokens)
    if begin >= length:
        return
    query = begin + tl.arange(0, QUERIES)
    q += first * q_stride + head * q_head_stride
    if cosines is not None:
        position_ids += first
        q_real, q_imaginary = load_turned_rows(
            q, query, length, q_stride, position_ids, cosines, sines, HEAD_DIM, BLOCK_D
        )
    else:
        q_tile = load_rows(q, query, length, q_stride, HEAD_DIM, BLOCK_D)
    k += first * k_stride + head * k_head_stride
    v += first * v_stride + head * v_head_stride
    if bias is not None:
        bias += head * (2 * reach - 1) + reach - 1
    first_key = 0
    end_key = length
    if LEFT:
        first_key = tl.maximum(begin - left, 0).to(tl.int32) // KEYS * KEYS
    if RIGHT:
        end_key = tl.minimum(begin + QUERIES + right, length).to(tl.int32)

    top = tl.full([QUERIES], -INFINITY, tl.float32)
    shift = tl.zeros([QUERIES], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    for start in range(loop_bound(first_key), loop_bound(end_key), KEYS):
        key = start + tl.arange(0, KEYS)
        if cosines is not None:
            k_real, k_imaginary = load_turned_rows(
                k, key, length, k_stride, position_ids, cosines, sines, HEAD_DIM, BLOCK_D
            )
            product = tl.dot(q_real, tl.trans(k_real), input_precision=PRECISION)
            product = tl.dot(q_imaginary, tl.trans(k_imaginary), product, input_precision=PRECISION)
        else:
            k_tile = load_rows(k, key, length, k_stride, HEAD_DIM, BLOCK_D)
            product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        v_tile = load_rows(v, key, length, v_stride, HEAD_DIM, BLOCK_D)
        score, _ = masked_scores(
            product, query[:, None], key[None, :], length, bias, softmax_scale, left, right, LEFT, RIGHT
        )
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen no key yet must not make NaN of -inf - -inf.
        shift = tl.where(new_top == -INFINITY, 0.0, new_top)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weight, 1)
        if DROPOUT:
            weight = tl.where(kept(first + query, start, head, seed, stream, limit, KEYS), weight, 0.0)
        result = tl.dot(weight.to(v_tile.dtype), v_tile, result * shrink[:, None], input_precision=PRECISION)
        top = new_top

    # A max_seqlen that is too small leaves queries out: NaN shows it, where the rest would look like a result.
    total = tl.where(length > blocks * QUERIES, float("nan"), total)
    result = result * (keep_scale / total)[:, None]
    tl.store(lse + head * tokens + first + query, (top + tl.log2(total)) * LN2, mask=query < length)
    store_rows(out + (first * heads + head) * HEAD_DIM, query, length, heads * HEAD_DIM, result, HEAD_DIM, BLOCK_D)


def _tiles(plan: Plan, max_seqlen: int) -> dict[str, int]:
    table = _FLOAT32 if plan.float32 else _HALF_LONG if max_seqlen > 128 else _HALF
    queries, keys, warps, stages = table[plan.block_d]
    return {"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}


@implements("varlen_attention_forward")
def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    dropout_p: float,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    if not 0 < q.shape[-1] <= LARGEST_HEAD:
        return reference.varlen_attention_forward(
            q, k, v, cu_seqlens, max_seqlen, bias, softmax_scale, left, right, dropout_p, seed, stream
        )
    call = plan((q, k, v), bias, softmax_scale, left, right, Dropout.of(dropout_p, seed, stream))
    return _attend(call, _tiles(call, max_seqlen), cu_seqlens, max_seqlen, bias)


@implements("rotary_attention")
def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    cosines: Tensor,
    sines: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    left: int,
    right: int,
) -> Tensor:
    if not 0 < q.shape[-1] <= LARGEST_HEAD:
        return reference.rotary_attention(
            q, k, v, position_ids, cosines, sines, cu_seqlens, max_seqlen, softmax_scale, left, right
        )
    call = plan((q, k, v), None, softmax_scale, left, right, Dropout.of(0.0, 0, 0))
    # The halves of a head are the two sums of a score, and a tensor core's have at least 16 columns.
    call.constants["BLOCK_D"] = max(call.block_d, 32)
    angles = tuple(x.contiguous() for x in (position_ids, cosines, sines))
    return _attend(call, _tiles(call, max_seqlen), cu_seqlens, max_seqlen, None, angles)[0]


def _attend(
    call: Plan,
    tiles: dict[str, int],
    cu_seqlens: Tensor,
    max_seqlen: int,
    bias: Tensor | None,
    angles: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, Tensor]:
    q = call.parts[0]
    tokens, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    blocks = triton.cdiv(max_seqlen, tiles["QUERIES"])
    programs = blocks * heads * (cu_seqlens.shape[0] - 1)
    if programs:
        with on_device(q):
            _attention_kernel[(programs,)](
                *call.parts,
                out,
                lse,
                cu_seqlens.contiguous(),
                None if bias is None else bias.contiguous(),
                *angles,
                tokens,
                heads,
                blocks,
                *call.strides(),
                *call.arguments,
                **call.constants,
                **tiles,
            )
    return out, lse
