"""Attention of packed sequences to themselves, and its gradient."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from sentfast.reference.layers import rotated
from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.random import kept, scale


class _Call(NamedTuple):
    """What a call is told beside its tensors; :func:`varlen_attention_forward` explains it."""

    cu_seqlens: Tensor
    bias: Tensor | None
    scale: float
    left: int
    right: int
    dropout_p: float
    seed: int
    stream: int

    def spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.cu_seqlens.tolist()))

    def distances(self, length: int) -> Tensor:
        """[L, L], key - query."""
        places = torch.arange(length, device=self.cu_seqlens.device)
        return places - places.unsqueeze(1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[heads, L, L] of one sequence's [L, heads, d]."""
        scores = torch.einsum("ihd,jhd->hij", q, k) * self.scale
        distance = self.distances(q.shape[0])
        if self.bias is not None:
            scores = scores + self.bias[:, distance + (self.bias.shape[1] + 1) // 2 - 1].to(scores.dtype)
        if self.left >= 0:
            scores = scores.masked_fill(distance < -self.left, float("-inf"))
        if self.right >= 0:
            scores = scores.masked_fill(distance > self.right, float("-inf"))
        return scores

    def dropout(self, x: Tensor, start: int) -> Tensor:
        """Of [heads, L, L], the weights or their gradient, of the sequence that starts at token `start`."""
        if self.dropout_p == 0.0:
            return x
        heads, length, _ = x.shape
        places = torch.arange(length, device=x.device)
        head = torch.arange(heads, device=x.device).view(-1, 1, 1)
        keep = kept((start + places).view(1, -1, 1), places, self.dropout_p, self.seed, self.stream, head)
        return torch.where(keep, x * scale(self.dropout_p), 0)


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
    """dropout(softmax(q k^T * softmax_scale + bias)) v for each sequence and head; and the log-sum-exp of the scores.

    q, k, v: [T, heads, d]; the sequences are the rows between the int32 numbers of cu_seqlens [B + 1].
    bias: [heads, 2 * R - 1], added to the score of query i and key j at column R - 1 + j - i.
    left, right: a query sees at most so many keys before and after itself; negative: all.
    dropout_p, seed, stream: of the weights (see ``random.py``): row is the query's token, column the key's place.

    Returns [T, heads, d] and, in the accumulation dtype, [heads, T].
    """
    call = _Call(cu_seqlens, bias, softmax_scale, left, right, dropout_p, seed, stream)
    acc = accumulation_dtype(q.dtype)
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0, dtype=acc)]
    for start, end in call.spans():
        scores = call.scores(q[start:end].to(acc), k[start:end].to(acc))
        weights = call.dropout(scores.softmax(dim=-1), start)
        outs.append(torch.einsum("hij,jhd->ihd", weights, v[start:end].to(acc)).to(q.dtype))
        lses.append(scores.logsumexp(dim=-1))
    # Rows of tokens that belong to no sequence, as a block of a CUDA graph has them, hold anything.
    rest = q[int(cu_seqlens[-1]) :]
    outs.append(torch.empty_like(rest))
    lses.append(q.new_empty(q.shape[1], rest.shape[0], dtype=acc))
    return torch.cat(outs), torch.cat(lses, dim=1)


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
    """Attention of queries and keys that are first turned by the angles of their token's position and rounded.

    position_ids: integers [T]; cosines, sines: [P, d / 2]; the rest as in :func:`varlen_attention_forward`.
    """
    q, k = (rotated(x, position_ids, cosines, sines) for x in (q, k))
    options = (cu_seqlens, max_seqlen, None, softmax_scale, left, right, 0.0, 0, 0)
    return varlen_attention_forward(q, k, v, *options)[0]


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
    """Gradients of q, k and v side by side, [T, 3, heads, d], and of the bias, empty without one.

    With P the weights before dropout, grad_p = dropout(grad v^T) and delta = <grad, out> of each query:
    grad_s = P (grad_p - delta), grad_v = dropout(P)^T grad, grad_q = grad_s k and grad_k = grad_s^T q, times the scale;
    the gradient of a bias is the sum of grad_s over the pairs that have it.
    """
    call = _Call(cu_seqlens, bias, softmax_scale, left, right, dropout_p, seed, stream)
    acc = lse.dtype
    tokens, heads, head_dim = q.shape
    grad_qkv = q.new_empty(tokens, 3, heads, head_dim)
    grad_bias = q.new_zeros((0, 0) if bias is None else bias.shape, dtype=acc)
    for start, end in call.spans():
        one = slice(start, end)
        queries, keys, values, g = (x[one].to(acc) for x in (q, k, v, grad))
        weights = (call.scores(queries, keys) - lse[:, one].unsqueeze(-1)).exp()
        delta = (g * out[one].to(acc)).sum(dim=-1).mT.unsqueeze(-1)
        grad_p = call.dropout(torch.einsum("ihd,jhd->hij", g, values), start)
        grad_s = weights * (grad_p - delta)
        grad_qkv[one, 0] = (torch.einsum("hij,jhd->ihd", grad_s, keys) * softmax_scale).to(q.dtype)
        grad_qkv[one, 1] = (torch.einsum("hij,ihd->jhd", grad_s, queries) * softmax_scale).to(q.dtype)
        grad_qkv[one, 2] = torch.einsum("hij,ihd->jhd", call.dropout(weights, start), g).to(q.dtype)
        if bias is not None:
            columns = call.distances(end - start) + (bias.shape[1] + 1) // 2 - 1
            grad_bias.index_add_(1, columns.flatten(), grad_s.flatten(1))
    return grad_qkv, grad_bias
