"""Every operator in plain PyTorch: the definition, the fallback and, called in float64, the oracle of the tests.

Each function has the name and the signature of the registered operator (see ``sentfast/ops``). Half inputs
accumulate in float32; every other dtype accumulates in itself, so float64 stays float64 throughout.
This module imports nothing from the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The integer that stands for a pooling mode in an operator's schema is its index here.
POOLING_MODES = ("mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
MEAN, MAX, CLS, LASTTOKEN, WEIGHTEDMEAN, MEAN_SQRT_LEN_TOKENS = range(6)

# The integer that stands for a pairwise metric in an operator's schema is its index here.
PAIRWISE_METRICS = ("cosine", "dot", "euclidean", "manhattan")
COSINE, DOT, EUCLIDEAN, MANHATTAN = range(4)

NORMALIZE_EPS = 1e-12  # torch.nn.functional.normalize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half inputs, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# ---- pooling ---------------------------------------------------------------------------------------------------


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
        pooled = _normalize_backward(pooled, out.to(acc), norm)
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


# ---- similarity ------------------------------------------------------------------------------------------------


def _normalize_backward(grad: Tensor, y: Tensor, norm: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """(grad - y <y, grad>) / norm; below eps the denominator is a constant, so only grad / eps remains."""
    norm = norm.unsqueeze(-1)
    along = (y * grad).sum(dim=-1, keepdim=True)
    return torch.where(norm < eps, grad / eps, (grad - y * along) / norm)


def l2_normalize_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / max(||x||, eps) along the last dimension, in x's dtype, and the norms [...] in the accumulation dtype."""
    values = x.to(accumulation_dtype(x.dtype))
    norm = torch.linalg.vector_norm(values, dim=-1)
    return (values / norm.clamp(min=eps).unsqueeze(-1)).to(x.dtype), norm


def l2_normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Gradient of :func:`l2_normalize_forward` to x, in x's dtype; grad may have another dtype."""
    y = x.to(norm.dtype) / norm.clamp(min=eps).unsqueeze(-1)
    return _normalize_backward(grad.to(norm.dtype), y, norm, eps).to(x.dtype)


def dot_similarity(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T: [..., N, D], [..., M, D] -> [..., N, M], float32 for half inputs."""
    dtype = torch.promote_types(accumulation_dtype(a.dtype), accumulation_dtype(b.dtype))
    return torch.matmul(a.to(dtype), b.to(dtype).mT)


def cosine_similarity_forward(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine of every row of a with every row of b, [..., N, M], and the norms of both, [..., N] and [..., M]."""
    a, norm_a = l2_normalize_forward(a.to(accumulation_dtype(a.dtype)), eps)
    b, norm_b = l2_normalize_forward(b.to(accumulation_dtype(b.dtype)), eps)
    return dot_similarity(a, b), norm_a, norm_b


def pairwise_similarity_forward(a: Tensor, b: Tensor, metric: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise similarity [...] of a and b [..., D], and the norms of both ([...], empty unless cosine)."""
    acc = accumulation_dtype(a.dtype)
    a, b = a.to(acc), b.to(acc)
    none = a.new_empty(0)
    if metric == COSINE:
        a, norm_a = l2_normalize_forward(a, eps)
        b, norm_b = l2_normalize_forward(b, eps)
        return (a * b).sum(dim=-1), norm_a, norm_b
    if metric == DOT:
        return (a * b).sum(dim=-1), none, none.clone()
    if metric == EUCLIDEAN:
        return -torch.linalg.vector_norm(a - b, dim=-1), none, none.clone()
    return -(a - b).abs().sum(dim=-1), none, none.clone()


def pairwise_similarity_backward(
    grad: Tensor, a: Tensor, b: Tensor, scores: Tensor, norm_a: Tensor, norm_b: Tensor, metric: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pairwise_similarity_forward` to a and b, in their dtype; 0 for a euclidean distance of 0."""
    acc = accumulation_dtype(a.dtype)
    dtype, a, b = a.dtype, a.to(acc), b.to(acc)
    grad = grad.to(acc).unsqueeze(-1)
    if metric == COSINE:
        y_a = a / norm_a.clamp(min=eps).unsqueeze(-1)
        y_b = b / norm_b.clamp(min=eps).unsqueeze(-1)
        grad_a = _normalize_backward(grad * y_b, y_a, norm_a, eps)
        grad_b = _normalize_backward(grad * y_a, y_b, norm_b, eps)
    elif metric == DOT:
        grad_a, grad_b = grad * b, grad * a
    else:
        difference = a - b
        if metric == EUCLIDEAN:
            distance = -scores.to(acc).unsqueeze(-1)
            grad_a = torch.where(distance == 0, 0, -grad * difference / distance)
        else:
            grad_a = -grad * difference.sign()
        grad_b = -grad_a
    return grad_a.to(dtype), grad_b.to(dtype)


# ---- encoder ---------------------------------------------------------------------------------------------------

# The integer that stands for an activation in an operator's schema is its index here.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_ACTIVATION_FUNCTIONS = (
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    torch.relu,
    torch.nn.functional.silu,
)

# The linear layers' weights come packed in panels of this many output features, in which a kernel reads them.
PANEL = 64


class Embedding(NamedTuple):
    """The first tensors of an encoder's `weights`; an empty tensor stands for what the architecture does not have.

    Attributes (P positions, E embedding size, H hidden size):
        positions, token_types: [P, E] and [types, E], in the dtype of the word embeddings.
        norm_weight, norm_bias: [E], float32 as every norm and bias.
        projection_weight, projection_bias: from E to H, in panels, and [H].
        attention_bias: [heads, 2 * R - 1], added to the score of query i and key j at column R - 1 + j - i.
        rotary: [2, P, head size], cosines of a position's angles, then their sines; for global and for local layers.
        final_norm_weight, final_norm_bias: [H], of the norm after the last layer (`pre_norm`).
    """

    positions: Tensor
    token_types: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    projection_weight: Tensor
    projection_bias: Tensor
    attention_bias: Tensor
    rotary: Tensor
    final_norm_weight: Tensor
    final_norm_bias: Tensor


class Layer(NamedTuple):
    """The tensors of one layer, after those of :class:`Embedding` in an encoder's `weights`.

    Weights are in panels (:func:`pack_panels`); biases and norms float32, empty where there is none.
    qkv: [3 * H] rows, those of query, key and value; up: [I] rows, gated [2 * I] (I even for bfloat16), of which the
    activation gets the first half. The norms stand before attention and feed-forward part with `pre_norm`, else after.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    feed_forward_norm_weight: Tensor
    feed_forward_norm_bias: Tensor


def pack_panels(weight: Tensor) -> Tensor:
    """[N, K] -> panels of 64 rows, columns side by side: [N / 64, K, 64], for bfloat16 [N / 64, K / 2, 64, 2].

    Rows and, for bfloat16, columns are filled up with zeros.
    """
    rows, columns = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    weight = torch.nn.functional.pad(weight, (0, -columns % pair, 0, -rows % PANEL))
    panels = weight.view(weight.shape[0] // PANEL, PANEL, weight.shape[1] // pair, pair).transpose(1, 2).contiguous()
    return panels if pair == 2 else panels.squeeze(-1)


def unpack_panels(panels: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_panels`."""
    if panels.ndim == 3:
        panels = panels.unsqueeze(-1)
    return panels.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns]


class _Encoder:
    """One call of :func:`encoder`, which explains the arguments."""

    def __init__(self, weights: Sequence[Tensor], heads: int, activation: int, pre_norm: bool, gated: bool, eps: float):
        head, per_layer = len(Embedding._fields), len(Layer._fields)
        self.embedding = Embedding(*weights[:head])
        self.layers = [Layer(*weights[i : i + per_layer]) for i in range(head, len(weights), per_layer)]
        self.heads, self.pre_norm, self.gated, self.eps = heads, pre_norm, gated, eps
        self.activation = _ACTIVATION_FUNCTIONS[activation]

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor, rows: int) -> Tensor:
        weight = unpack_panels(panels, rows, x.shape[-1]).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias.to(x.dtype) if bias.numel() else None)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The identity where there is no weight."""
        if weight.numel() == 0:
            return x
        bias = bias.to(x.dtype) if bias.numel() else None
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, self.eps)

    def attention(self, qkv: Tensor, window: int, rotary: Tensor | None) -> Tensor:
        """One sequence: [L, 3 * H] -> [L, H]."""
        length, hidden = qkv.shape[0], qkv.shape[1] // 3
        q, k, v = qkv.view(length, 3, self.heads, hidden // self.heads).permute(1, 2, 0, 3)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        scores = q @ k.mT / math.sqrt(hidden // self.heads)
        distance = torch.arange(length) - torch.arange(length).unsqueeze(1)
        bias = self.embedding.attention_bias
        if bias.numel():
            scores = scores + bias[:, distance + (bias.shape[1] + 1) // 2 - 1].to(scores.dtype)
        if window >= 0:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)

    def layer(self, x: Tensor, layer: Layer, spans: list[tuple[int, int]], positions: Tensor, window: int) -> Tensor:
        hidden = x.shape[1]
        y = self.norm(x, layer.attention_norm_weight, layer.attention_norm_bias) if self.pre_norm else x
        qkv = self.linear(y, layer.qkv_weight, layer.qkv_bias, 3 * hidden)
        tables = self.embedding.rotary
        rotary = tables[int(window >= 0)].to(x.dtype) if tables.numel() else None
        y = torch.empty_like(x)
        for start, end in spans:
            angles = None if rotary is None else rotary[positions[start:end]]
            y[start:end] = self.attention(qkv[start:end], window, angles)
        x = x + self.linear(y, layer.output_weight, layer.output_bias, hidden)
        if not self.pre_norm:
            x = self.norm(x, layer.attention_norm_weight, layer.attention_norm_bias)
        y = self.norm(x, layer.feed_forward_norm_weight, layer.feed_forward_norm_bias) if self.pre_norm else x
        intermediate = layer.down_weight[0].numel() // PANEL
        y = self.linear(y, layer.up_weight, layer.up_bias, intermediate * (2 if self.gated else 1))
        if self.gated:
            y, gate = y.chunk(2, dim=-1)
            y = self.activation(y) * gate
        else:
            y = self.activation(y)
        x = x + self.linear(y, layer.down_weight, layer.down_bias, hidden)
        return x if self.pre_norm else self.norm(x, layer.feed_forward_norm_weight, layer.feed_forward_norm_bias)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x: [heads, L, d]; the halves of a head are real and imaginary parts."""
    cos, sin = rotary.chunk(2, dim=-1)
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def encoder(
    word_embeddings: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    weights: Sequence[Tensor],
    heads: int,
    activation: int,
    windows: Sequence[int],
    pre_norm: bool,
    gated: bool,
    position_offset: int,
    eps: float,
    modes: Sequence[int],
    prompt_length: int,
    normalize: bool,
    padded_length: int,
) -> Tensor:
    """A transformer encoder over packed sequences, from token ids to token embeddings or pooled vectors.

    word_embeddings: [V, E]; its dtype is that of the result, and half dtypes accumulate in float32.
    input_ids: int32 [T]; cu_seqlens: int32 [B + 1]. token_type_ids: int32 [T], None: all 0.
    position_ids: int32 [T], None: the place in the sequence + position_offset.
    weights: the tensors of :class:`Embedding`, then those of :class:`Layer` for each layer.
    windows: per layer the largest distance of a key that a query sees, negative: any; empty: any in every layer.
    modes, prompt_length, normalize: as :func:`pool_forward`, the result is then [B, len(modes) * H].
    Without modes it is the token embeddings: [T, H], or [B, padded_length, H] with zeros after each sequence
    if padded_length is positive.
    """
    acc = accumulation_dtype(word_embeddings.dtype)
    model = _Encoder(weights, heads, activation, pre_norm, gated, eps)
    head = model.embedding
    ends = cu_seqlens.tolist()
    spans = list(itertools.pairwise(ends))
    if position_ids is None:
        start = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff().long())
        position_ids = torch.arange(input_ids.shape[0]) - start + position_offset
    x = word_embeddings[input_ids.long()].to(acc)
    if head.positions.numel():
        x = x + head.positions[position_ids.long()].to(acc)
    if head.token_types.numel():
        x = x + (head.token_types[0] if token_type_ids is None else head.token_types[token_type_ids.long()]).to(acc)
    x = model.norm(x, head.norm_weight, head.norm_bias)
    if head.projection_weight.numel():
        x = model.linear(x, head.projection_weight, head.projection_bias, head.projection_bias.numel())
    for i, layer in enumerate(model.layers):
        x = model.layer(x, layer, spans, position_ids, windows[i] if windows else -1)
    x = model.norm(x, head.final_norm_weight, head.final_norm_bias)
    if modes:
        return pool_forward(x, None, cu_seqlens, modes, prompt_length, normalize)[0].to(word_embeddings.dtype)
    x = x.to(word_embeddings.dtype)
    if padded_length <= 0:
        return x
    out = x.new_zeros(len(spans), padded_length, x.shape[1])
    for i, (start, end) in enumerate(spans):
        out[i, : end - start] = x[start:end]
    return out
