"""Pooling of token embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.similarity import NORMALIZE_EPS, normalize_backward

# The integer that stands for a pooling mode in an operator's schema is its index here.
POOLING_MODES = ("mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
MEAN, MAX, CLS, LASTTOKEN, WEIGHTEDMEAN, MEAN_SQRT_LEN_TOKENS = range(6)


class _Tokens:
    """Which rows of a batch a pooling mode reads: the one place where padded and packed layouts differ.

    Attributes (B sequences; rows are numbered in the flattened input, so a padded batch has B * length of them):
        row, sequence, position: [R] of each row in use: its number, its sequence, its place counted from the
            sequence's first token (before prompt exclusion).
        count, weight: [B] rows in use and [R] weight of `weightedmean`, in the accumulation dtype.
        first, last: [B] row number for `cls` and `lasttoken`, -1 where the result is the zero vector.
        origin: [B] row number from which `argmax` counts.
    """

    def __init__(
        self,
        shape: Sequence[int],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        prompt_length: int,
        acc: torch.dtype,
        device: torch.device,
    ):
        """shape: (B, length) of a padded batch or (total tokens,) of a packed one."""
        if cu_seqlens is None:
            if attention_mask is None:
                attention_mask = torch.ones(*shape, dtype=torch.bool, device=device)
            self._padded(attention_mask != 0, prompt_length)
        else:
            self._packed(shape[0], cu_seqlens, prompt_length)
        self.acc = acc
        self.count = torch.bincount(self.sequence, minlength=self.batch).to(acc)
        self.weight = (self.position + 1).to(acc)

    def _padded(self, mask: Tensor, prompt_length: int) -> None:
        self.batch, length = mask.shape
        column = torch.arange(length, device=mask.device).expand(self.batch, length)
        self.origin = torch.arange(self.batch, device=mask.device) * length
        left_pad = mask.int().argmax(dim=1) if length else torch.zeros_like(self.origin)
        used = mask & (column >= (left_pad + prompt_length).unsqueeze(1))
        self.sequence, position = used.nonzero(as_tuple=True)
        self.position = position - left_pad[self.sequence]
        self.row = self.origin[self.sequence] + position
        if length == 0:
            self.first = self.last = torch.full_like(self.origin, -1)
            return
        # As sentence-transformers: with nothing left to read, `cls` is the row's first position, `lasttoken` is zero.
        self.first = self.origin + used.int().argmax(dim=1)
        last = self.origin + length - 1 - used.int().flip(1).argmax(dim=1)
        self.last = torch.where(used.any(dim=1), last, -1)

    def _packed(self, total: int, cu_seqlens: Tensor, prompt_length: int) -> None:
        start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        self.batch, self.origin = start.numel(), start
        sequence = torch.repeat_interleave(torch.arange(self.batch, device=start.device), end - start)
        row = torch.arange(total, device=start.device)
        position = row - start[sequence]
        used = position >= prompt_length
        self.sequence, self.row, self.position = sequence[used], row[used], position[used]
        empty = start == end
        self.first = torch.where(empty, -1, start + torch.where(end - start > prompt_length, prompt_length, 0))
        # As sentence-transformers' flat path: the last token counts even where it belongs to the prompt.
        self.last = torch.where(empty, -1, end - 1)

    def sum(self, values: Tensor) -> Tensor:
        """[R, ...] -> [B, ...]."""
        out = torch.zeros(self.batch, *values.shape[1:], dtype=self.acc, device=values.device)
        return out.index_add(0, self.sequence, values)

    def scale(self, mode: int) -> Tensor:
        """1 / denominator of the three means, [B, 1]."""
        total = self.sum(self.weight) if mode == WEIGHTEDMEAN else self.count
        total = total.clamp(min=1e-9)
        return (total.sqrt() if mode == MEAN_SQRT_LEN_TOKENS else total).reciprocal().unsqueeze(1)

    def max(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value per sequence and column, NaN if there is one, and its first position (-1: no rows)."""
        index = self.sequence.unsqueeze(1).expand_as(rows)
        top = torch.full((self.batch, rows.shape[1]), float("-inf"), dtype=self.acc, device=rows.device)
        top = top.scatter_reduce(0, index, rows, reduce="amax")
        top_of_row = top[self.sequence]
        hit = (rows == top_of_row) | (rows.isnan() & top_of_row.isnan())
        none = torch.iinfo(torch.int64).max
        number = torch.where(hit, self.row.unsqueeze(1), none)
        first = torch.full_like(top, none, dtype=torch.int64).scatter_reduce(0, index, number, reduce="amin")
        return top, torch.where(first == none, -1, first - self.origin.unsqueeze(1)).int()


def pool_forward(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    modes: Sequence[int],
    prompt_length: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled rows, norms before normalisation ([B], empty unless ``normalize``), argmax ([B, D], empty unless max).

    x: [B, L, D] with attention_mask [B, L] or None, or [T, D] with cu_seqlens [B + 1]. out: [B, len(modes) * D].
    """
    acc, dim = accumulation_dtype(x.dtype), x.shape[-1]
    tokens = _Tokens(x.shape[:-1], attention_mask, cu_seqlens, prompt_length, acc, x.device)
    flat = x.flatten(0, -2)
    rows = flat[tokens.row].to(acc)
    argmax = x.new_empty(0, dtype=torch.int32)
    parts = []
    for mode in modes:
        if mode in (CLS, LASTTOKEN):
            number = tokens.first if mode == CLS else tokens.last
            part = torch.zeros(tokens.batch, dim, dtype=acc, device=x.device)
            part[number >= 0] = flat[number[number >= 0]].to(acc)
        elif mode == MAX:
            part, argmax = tokens.max(rows)
        else:
            values = rows * tokens.weight.unsqueeze(1) if mode == WEIGHTEDMEAN else rows
            part = tokens.sum(values) * tokens.scale(mode)
        parts.append(part)
    out = torch.cat(parts, dim=-1)
    norm = x.new_empty(0, dtype=acc)
    if normalize:
        norm = torch.linalg.vector_norm(out, dim=-1)
        out = out / norm.clamp(min=NORMALIZE_EPS).unsqueeze(-1)
    return out.to(x.dtype), norm, argmax


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
    """Gradient of :func:`pool_forward` to x, in grad's dtype: [B, length, D], or [length, D] with cu_seqlens."""
    acc, dim = accumulation_dtype(grad.dtype), grad.shape[-1] // len(modes)
    shape = (length,) if cu_seqlens is not None else (grad.shape[0], length)
    tokens = _Tokens(shape, attention_mask, cu_seqlens, prompt_length, acc, grad.device)
    pooled = grad.to(acc)
    if normalize:
        pooled = normalize_backward(pooled, out.to(acc), norm)
    grad_x = torch.zeros(*shape, dim, dtype=acc, device=grad.device)
    flat = grad_x.flatten(0, -2)
    for mode, part in zip(modes, pooled.unflatten(-1, (len(modes), dim)).unbind(-2), strict=True):
        if mode in (CLS, LASTTOKEN):
            number = tokens.first if mode == CLS else tokens.last
            flat.index_add_(0, number[number >= 0], part[number >= 0])
        elif mode == MAX:
            sequence, column = (argmax >= 0).nonzero(as_tuple=True)
            number = argmax[sequence, column] + tokens.origin[sequence]
            flat.index_put_((number, column), part[sequence, column], accumulate=True)
        else:
            values = (part * tokens.scale(mode))[tokens.sequence]
            if mode == WEIGHTEDMEAN:
                values = values * tokens.weight.unsqueeze(1)
            flat.index_add_(0, tokens.row, values)
    return grad_x.to(grad.dtype)
