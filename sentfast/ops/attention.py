"""Attention over packed sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
from sentfast.ops.seeds import check_dropout, seed_of
from sentfast.reference import accumulation_dtype
from sentfast.registry import KERNEL_DTYPES, define, result_of


def _forward_fake(q, k, v, cu_seqlens, max_seqlen, bias, softmax_scale, left, right, dropout_p, seed, stream):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype))


def _backward_fake(
    grad, q, k, v, out, lse, cu_seqlens, max_seqlen, bias, softmax_scale, left, right, dropout_p, seed, stream
):
    tokens, heads, head_dim = q.shape
    return q.new_empty(tokens, 3, heads, head_dim), lse.new_empty((0, 0) if bias is None else bias.shape)


def _cuda_refuses(q, k, v, cu_seqlens, max_seqlen, bias, softmax_scale, left, right, dropout_p, seed, stream) -> str:
    """csrc/cuda/attention.cuh is for what encoders of short texts do in half precision."""
    if q.dtype == torch.float32 or q.shape[-1] not in (32, 64):
        return f"made for heads of 32 and 64 in bfloat16 and float16, not for {q.shape[-1]} in {q.dtype}"
    if max_seqlen > 512:
        return f"made for up to 512 tokens, not for {max_seqlen}"
    return "made for no dropout, no window and no causal mask" if dropout_p or left >= 0 or right >= 0 else ""


_OPTIONS = (
    "Tensor cu_seqlens, int max_seqlen, Tensor? bias, float softmax_scale, int left, int right, float dropout_p,"
    " int seed, int stream"
)
_varlen_attention_forward = define(
    f"varlen_attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=reference.varlen_attention_forward,
    fake=_forward_fake,
    prefer_triton=KERNEL_DTYPES,  # until a measurement says otherwise; see docs/design.md
    cuda_refuses=_cuda_refuses,
)
_varlen_attention = result_of(_varlen_attention_forward)
_varlen_attention_backward = define(
    f"varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    reference=reference.varlen_attention_backward,
    fake=_backward_fake,
)


# Without a gradient, for the encoder on a GPU.
_rotary_attention = define(
    "rotary_attention(Tensor q, Tensor k, Tensor v, Tensor position_ids, Tensor cosines, Tensor sines,"
    " Tensor cu_seqlens, int max_seqlen, float softmax_scale, int left, int right) -> Tensor",
    reference=reference.rotary_attention,
    fake=lambda q, *rest: torch.empty_like(q, memory_format=torch.contiguous_format),
)


class _Options(NamedTuple):
    """What follows the bias in the operators' schemas."""

    softmax_scale: float
    left: int
    right: int
    dropout_p: float
    seed: int
    stream: int


class _VarlenAttention(torch.autograd.Function):
    """q, k and v, or with k and v None all three in one tensor [T, 3, heads, d]."""

    @staticmethod
    def forward(ctx: Any, q, k, v, cu_seqlens, max_seqlen, bias, options):
        parts = q.unbind(1) if k is None else (q, k, v)
        out, lse = _varlen_attention_forward(*parts, cu_seqlens, max_seqlen, bias, *options)
        ctx.save_for_backward(q, k, v, cu_seqlens, bias, out, lse)
        ctx.max_seqlen, ctx.options = max_seqlen, options
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        q, k, v, cu_seqlens, bias, out, lse = ctx.saved_tensors
        if twice.wanted():
            return _differentiable_gradients(ctx, grad, q, k, v, cu_seqlens, bias)
        parts = q.unbind(1) if k is None else (q, k, v)
        grad_qkv, grad_bias = _varlen_attention_backward(
            grad, *parts, out, lse, cu_seqlens, ctx.max_seqlen, bias, *ctx.options
        )
        grads = (grad_qkv, None, None) if k is None else grad_qkv.unbind(1)
        return *grads, None, None, None if bias is None else grad_bias, None


def _differentiable_gradients(ctx: Any, grad, q, k, v, cu_seqlens, bias):
    needs_q, needs_k, needs_v, _, _, needs_bias, _ = ctx.needs_input_grad
    parts = (q, k, v) if k is not None else q.unbind(1)
    needs = (needs_q, needs_k, needs_v) if k is not None else (needs_q,) * 3
    inputs, needed = (*parts, cu_seqlens, ctx.max_seqlen, bias), (*needs, False, False, needs_bias)
    *grads, _, _, grad_bias = twice.gradients(_varlen_attention, inputs, ctx.options, needed, grad)
    if k is None:
        grads = [torch.stack([x for x in grads if x is not None], dim=1) if needs_q else None, None, None]
    return *grads, None, None, grad_bias, None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    seed: int | None = None,
    stream: int = 0,
) -> Tensor:
    """Attention of packed sequences to themselves, without padding and without the matrix of scores.

    ``out = dropout(softmax(q k^T * softmax_scale + bias)) v`` for each sequence and head.

    Args:
        q, k, v: [T, heads, d] float32, bfloat16 or float16, the sequences one after the other; d of any size. No copy
            is made of the three parts of one [T, 3, heads, d]; see :func:`varlen_attention_qkvpacked` for its gradient.
        cu_seqlens: int32 [B + 1], where each sequence starts, and T. Sequences may be empty.
        max_seqlen: length of the longest sequence or more; None: found out, which on a GPU has to wait for it.
        bias: [heads, 2 * R - 1], differentiable: a bias by relative position, added to the score of query i and key j
            at column R - 1 + j - i. R is at least the length of the longest sequence.
        dropout_p: probability with which a weight is dropped.
        softmax_scale: None: 1 / sqrt(d).
        causal: a query sees no key after itself.
        window_size: at most so many keys before and after itself; -1 for all.
        seed: of the dropout; the same seed drops the same weights. None: drawn from PyTorch's default generator.
        stream: tells apart the calls that share a seed.

    Returns:
        [T, heads, d] in the dtype of q. Scores, softmax and sums are made in float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or range; the message names it.

    The gradient computes the softmax again from the log-sum-exp of the scores (Dao et al., "FlashAttention", 2022).
    Sums that several sequences add to, those of the bias, are made in a fixed order: two runs give the same bits.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floats(name, x, "[T, heads, d]", (3,))
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q {list(q.shape)}, got {list(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q ({q.dtype}), got {x.dtype}")
        checks.same_device(name, x, "q", q)
    options = _options(q, softmax_scale, causal, window_size, dropout_p, seed, stream)
    return _attend(q, k, v, cu_seqlens, max_seqlen, bias, options, q.shape[1])


def varlen_attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    seed: int | None = None,
    stream: int = 0,
) -> Tensor:
    """:func:`varlen_attention` of q, k and v side by side, [T, 3, heads, d], with the gradient in that shape too."""
    checks.floats("qkv", qkv, "[T, 3, heads, d]", (4,))
    if qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape [T, 3, heads, d], got {list(qkv.shape)}")
    options = _options(qkv, softmax_scale, causal, window_size, dropout_p, seed, stream)
    return _attend(qkv, None, None, cu_seqlens, max_seqlen, bias, options, qkv.shape[2])


def _options(
    x: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None,
    dropout_p: float,
    seed: int | None,
    stream: int,
) -> _Options:
    check_dropout(dropout_p, seed, stream)
    left, right = (-1, -1) if window_size is None else _window(window_size)
    if checks.flag("causal", causal):
        right = 0
    scale = max(x.shape[-1], 1) ** -0.5 if softmax_scale is None else checks.finite("softmax_scale", softmax_scale)
    return _Options(scale, left, right, float(dropout_p), seed_of(dropout_p, seed, x), stream)


def _window(size: object) -> tuple[int, int]:
    sides = checks.sequence("window_size", size, "two whole numbers")
    if len(sides) != 2:
        raise ValueError(f"window_size: expected two whole numbers, got {len(sides)}")
    left, right = (checks.whole("window_size", side, -1, 2**31 - 1) for side in sides)
    return left, right


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    bias: Tensor | None,
    options: _Options,
    heads: int,
) -> Tensor:
    checks.packed("cu_seqlens", cu_seqlens, "q", q)
    if max_seqlen is not None:
        max_seqlen = checks.whole("max_seqlen", max_seqlen, 0, 2**31 - 1)
    longest = _longest(cu_seqlens, max_seqlen, q.shape[0])
    if bias is not None:
        bias = _check_bias(bias, q, heads, longest if checks.values_readable(cu_seqlens) else 1)
    if checks.needs_function(q, k) or any(x is not None and checks.needs_function(x) for x in (v, bias)):
        return _VarlenAttention.apply(q, k, v, cu_seqlens, longest, bias, options)
    parts = q.unbind(1) if k is None else (q, k, v)
    return _varlen_attention(*parts, cu_seqlens, longest, bias, *options)


def _longest(cu_seqlens: Tensor, max_seqlen: int | None, total: int) -> int:
    """Length of the longest sequence or, where its value cannot be read, a bound of it."""
    if torch.compiler.is_compiling():
        return total if max_seqlen is None else max_seqlen
    if max_seqlen is not None and not checks.values_readable(cu_seqlens):
        return max_seqlen
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen: expected at least {longest}, the longest sequence, got {max_seqlen}")
    return longest if max_seqlen is None else max_seqlen


def _check_bias(bias: Tensor, q: Tensor, heads: int, longest: int) -> Tensor:
    """In the dtype that scores have."""
    checks.floats("bias", bias, "[heads, 2 * R - 1]", (2,))
    checks.same_device("bias", bias, "q", q)
    if bias.shape[0] != heads or bias.shape[1] % 2 == 0 or bias.shape[1] // 2 + 1 < longest:
        expected = f"[{heads}, 2 * R - 1] with R of at least {longest}, the longest sequence"
        raise ValueError(f"bias: expected shape {expected}, got {list(bias.shape)}")
    return bias.to(accumulation_dtype(q.dtype))
