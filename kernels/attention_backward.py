"""The gradient of attention in Triton; the softmax is made again from the scores and their log-sum-exp.

With P the weights before dropout, D those after it, grad_p = dropout(grad v^T) and delta = <grad, out> of each query:
grad_s = P (grad_p - delta), grad_q = grad_s k, grad_k = grad_s^T q, grad_v = D^T grad. One kernel has a block of
queries per program, for grad_q, delta and the bias; the other a block of keys, for grad_k and grad_v. No program adds
to what another one writes, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.registry import implements

from .attention_tiles import LARGEST_HEAD, LOG2E, Plan, load_rows, masked_scores, plan, sequence_span, store_rows
from .dropout import SEED_ARGUMENTS, Dropout, kept
from .triton_utils import loop_bound, on_device

# By the padded head size: (block of queries or keys, step of the loop over the others, warps, stages); a block is one
# or two steps. Half numbers, up to 64 columns: two blocks per SM (255 registers, 76 KiB), three without bias.
_HALF = {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 3), 128: (64, 32, 8, 2), 256: (32, 16, 8, 1)}
# Three products keep both parts of each operand in registers.
_FLOAT32 = {16: (32, 16, 8, 1), 32: (32, 16, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
_MOST_SPLITS = 64


@triton.jit
def _turns(diagonals, turned, TURNS: tl.constexpr, STEP: tl.constexpr):
    return tl.sum(tl.where(turned // STEP == TURNS, diagonals, 0.0), 0)


@triton.jit(do_not_specialize=["tokens", "blocks", "reach", "left", "right", *SEED_ARGUMENTS])
def _queries_kernel(
    q,
    k,
    v,
    grad,
    out,
    lse,
    delta,
    grad_qkv,
    partial,
    cu_seqlens,
    bias,
    tokens,
    heads,
    blocks,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
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
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """grad_q and delta; and for each block of distances the sum of grad_s over this program's queries."""
    block = tl.program_id(0) % blocks
    begin = block * BLOCK
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sequence = tl.program_id(0) // blocks // heads
    first, length = sequence_span(cu_seqlens, sequence, tokens)
    length = tl.minimum(length, blocks * BLOCK)
    if begin >= length:
        return
    query = begin + tl.arange(0, BLOCK)
    here = head * tokens + first + query
    q_tile = load_rows(q + first * q_stride + head * q_head_stride, query, length, q_stride, HEAD_DIM, BLOCK_D)
    g_tile = load_rows(
        grad + first * grad_stride + head * grad_head_stride, query, length, grad_stride, HEAD_DIM, BLOCK_D
    )
    o_tile = load_rows(out + (first * heads + head) * HEAD_DIM, query, length, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    own_delta = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + here, own_delta, mask=query < length)
    own_lse = tl.load(lse + here, mask=query < length, other=0.0) * LOG2E
    k += first * k_stride + head * k_head_stride
    v += first * v_stride + head * v_head_stride
    first_key = 0
    end_key = length
    if bias is not None:
        bias += head * (2 * reach - 1) + reach - 1
        # Before this sequence there are at most first // BLOCK + sequence blocks, so the row is nobody else's.
        place = (first // BLOCK + sequence + block) * heads + head
        partial += place * (blocks + 1) * BLOCK + tl.arange(0, STEP)
        # Where each row of a tile is turned left by its number, a column is one distance, less STEP for each turn.
        turned = tl.arange(0, BLOCK)[:, None] + tl.arange(0, STEP)[None, :]
        end_key = tl.cdiv(length, BLOCK) * BLOCK
    else:
        if LEFT:
            first_key = tl.maximum(begin - left, 0).to(tl.int32) // STEP * STEP
        if RIGHT:
            end_key = tl.minimum(begin + BLOCK + right, length).to(tl.int32)

    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    next_sum = tl.zeros([STEP], tl.float32)
    later_sum = tl.zeros([STEP], tl.float32)
    for start in range(loop_bound(first_key), loop_bound(end_key), STEP):
        key = start + tl.arange(0, STEP)
        k_tile = load_rows(k, key, length, k_stride, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v, key, length, v_stride, HEAD_DIM, BLOCK_D)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        score, seen = masked_scores(
            product, query[:, None], key[None, :], length, bias, softmax_scale, left, right, LEFT, RIGHT
        )
        grad_p = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(first + query, start, head, seed, stream, limit, STEP)
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
        weight = tl.exp2(score - own_lse[:, None])
        grad_s = tl.where(seen, weight * (grad_p - own_delta[:, None]), 0.0)
        result = tl.dot(grad_s.to(k_tile.dtype), k_tile, result, input_precision=PRECISION)
        if bias is not None:
            diagonals = tl.gather(grad_s, turned % STEP, 1)
            tl.store(partial + start, next_sum + _turns(diagonals, turned, BLOCK // STEP, STEP))
            next_sum = later_sum
            if BLOCK > STEP:
                next_sum += _turns(diagonals, turned, 1, STEP)
                later_sum = _turns(diagonals, turned, 0, STEP)
            else:
                next_sum += _turns(diagonals, turned, 0, STEP)
    if bias is not None:
        tl.store(partial + end_key, next_sum)
        if BLOCK > STEP:
            tl.store(partial + end_key + STEP, later_sum)
    target = grad_qkv + (first * 3 * heads + head) * HEAD_DIM
    store_rows(target, query, length, 3 * heads * HEAD_DIM, result * softmax_scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "blocks", "reach", "left", "right", *SEED_ARGUMENTS])
def _keys_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    grad_qkv,
    cu_seqlens,
    bias,
    tokens,
    heads,
    blocks,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
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
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """grad_k and grad_v. Tiles have a row per key, so that the weights need not be turned before the products."""
    begin = tl.program_id(0) % blocks * BLOCK
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    first, length = sequence_span(cu_seqlens, tl.program_id(0) // blocks // heads, tokens)
    length = tl.minimum(length, blocks * BLOCK)
    if begin >= length:
        return
    key = begin + tl.arange(0, BLOCK)
    k_tile = load_rows(k + first * k_stride + head * k_head_stride, key, length, k_stride, HEAD_DIM, BLOCK_D)
    v_tile = load_rows(v + first * v_stride + head * v_head_stride, key, length, v_stride, HEAD_DIM, BLOCK_D)
    q += first * q_stride + head * q_head_stride
    grad += first * grad_stride + head * grad_head_stride
    lse += head * tokens + first
    delta += head * tokens + first
    if bias is not None:
        bias += head * (2 * reach - 1) + reach - 1
    first_query = 0
    end_query = length
    if RIGHT:
        first_query = tl.maximum(begin - right, 0).to(tl.int32) // STEP * STEP
    if LEFT:
        end_query = tl.minimum(begin + BLOCK + left, length).to(tl.int32)

    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(loop_bound(first_query), loop_bound(end_query), STEP):
        query = start + tl.arange(0, STEP)
        q_tile = load_rows(q, query, length, q_stride, HEAD_DIM, BLOCK_D)
        g_tile = load_rows(grad, query, length, grad_stride, HEAD_DIM, BLOCK_D)
        own_lse = tl.load(lse + query, mask=query < length, other=0.0) * LOG2E
        own_delta = tl.load(delta + query, mask=query < length, other=0.0)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        score, seen = masked_scores(
            product, query[None, :], key[:, None], length, bias, softmax_scale, left, right, LEFT, RIGHT
        )
        weight = tl.where(seen, tl.exp2(score - own_lse[None, :]), 0.0)
        grad_p = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        dropped = weight
        if DROPOUT:
            keep = tl.trans(kept(first + query, begin, head, seed, stream, limit, BLOCK))
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
            dropped = tl.where(keep, weight, 0.0)
        grad_v = tl.dot(dropped.to(g_tile.dtype), g_tile, grad_v, input_precision=PRECISION)
        grad_s = weight * (grad_p - own_delta[None, :])
        grad_k = tl.dot(grad_s.to(q_tile.dtype), q_tile, grad_k, input_precision=PRECISION)
    target = grad_qkv + (first * 3 * heads + heads + head) * HEAD_DIM
    stride = 3 * heads * HEAD_DIM
    store_rows(target, key, length, stride, grad_k * softmax_scale, HEAD_DIM, BLOCK_D)
    store_rows(target + heads * HEAD_DIM, key, length, stride, grad_v * keep_scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "blocks", "sequences", "reach"])
def _bias_kernel(partial, sums, cu_seqlens, tokens, heads, blocks, sequences, reach, BLOCK: tl.constexpr):
    """The sum of a head's parts for one block of distances, over one share of the sequences."""
    distances = tl.program_id(0) % (2 * blocks) - blocks  # in blocks
    head = (tl.program_id(0) // (2 * blocks)).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    share = tl.cdiv(sequences, tl.num_programs(1))
    start = tl.program_id(1) * share
    for sequence in range(loop_bound(start), loop_bound(tl.minimum(start + share, sequences)), 1):
        first, length = sequence_span(cu_seqlens, sequence, tokens)
        count = tl.cdiv(tl.minimum(length, blocks * BLOCK), BLOCK)
        place = (first // BLOCK + sequence) * heads + head
        # Of query block i it is part distances + 1 + i, of which there are count + 1.
        begin = tl.maximum(-1 - distances, 0)
        for block in range(loop_bound(begin), loop_bound(tl.minimum(count, count - distances)), 1):
            row = partial + (place + tl.full([], block, tl.int64) * heads) * (blocks + 1) * BLOCK
            total += tl.load(row + (distances + 1 + block) * BLOCK + lane)
    column = reach - 1 + distances * BLOCK + lane
    inside = (column >= 0) & (column < 2 * reach - 1)
    sums += (tl.program_id(1) * heads + head) * (2 * reach - 1)
    tl.store(sums + column, total, mask=inside)


def _tiles(call: Plan) -> dict[str, int]:
    block, step, warps, stages = (_FLOAT32 if call.float32 else _HALF)[call.block_d]
    return {"BLOCK": block, "STEP": step, "num_warps": warps, "num_stages": stages}


def _grad_bias(partial: Tensor, cu_seqlens: Tensor, tokens: int, blocks: int, bias: Tensor, block: int) -> Tensor:
    heads, width = bias.shape
    sequences = cu_seqlens.shape[0] - 1
    splits = min(sequences, _MOST_SPLITS)
    sums = torch.zeros(splits, heads, width, dtype=torch.float32, device=bias.device)
    _bias_kernel[(heads * 2 * blocks, splits)](
        partial, sums, cu_seqlens, tokens, heads, blocks, sequences, (width + 1) // 2, BLOCK=block, num_warps=1
    )
    return sums.sum(dim=0)


@implements("varlen_attention_backward")
def varlen_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    tokens, heads, head_dim = q.shape
    if not 0 < head_dim <= LARGEST_HEAD:
        return reference.varlen_attention_backward(
            grad, q, k, v, out, lse, cu_seqlens, max_seqlen, bias, softmax_scale, left, right, dropout_p, seed, stream
        )
    grad_qkv = q.new_empty(tokens, 3, heads, head_dim)
    call = plan((q, k, v, grad), bias, softmax_scale, left, right, Dropout.of(dropout_p, seed, stream))
    tiles = _tiles(call)
    block = tiles["BLOCK"]
    blocks = triton.cdiv(max_seqlen, block)
    sequences = cu_seqlens.shape[0] - 1
    programs = blocks * heads * sequences
    if not programs:
        return grad_qkv, lse.new_zeros((0, 0) if bias is None else bias.shape)
    delta = torch.empty_like(lse)
    cu_seqlens = cu_seqlens.contiguous()
    partial = None
    if bias is not None:
        bias = bias.contiguous()
        partial = lse.new_empty(tokens // block + sequences, heads, (blocks + 1) * block)
    sizes = tokens, heads, blocks, *call.strides(), *call.arguments
    with on_device(q):
        _queries_kernel[(programs,)](
            *call.parts,
            out.contiguous(),
            lse,
            delta,
            grad_qkv,
            partial,
            cu_seqlens,
            bias,
            *sizes,
            **call.constants,
            **tiles,
        )
        _keys_kernel[(programs,)](
            *call.parts, lse, delta, grad_qkv, cu_seqlens, bias, *sizes, **call.constants, **tiles
        )
        if bias is None or partial is None:
            return grad_qkv, lse.new_empty(0, 0)
        return grad_qkv, _grad_bias(partial, cu_seqlens, tokens, blocks, bias, block)
