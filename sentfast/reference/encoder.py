"""The packed encoder, from token ids to embeddings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sentfast.reference.layers import ACTIVATION_FUNCTIONS
from sentfast.reference.pooling import pool_forward
from sentfast.reference.precision import accumulation_dtype

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

    Weights are matrices, float32 [N, K], or in panels (:func:`pack_panels`); biases and norms are float32, and empty
    where there is none. qkv: [3 * H] rows, those of query, key and value, or the query's alone if key and value follow;
    up: [I] rows, gated [2 * I] (I even for bfloat16), of which the activation gets the first half. The norms stand
    before attention and feed-forward part with `pre_norm`, else after.
    """

    qkv_weight: Tensor
    key_weight: Tensor
    value_weight: Tensor
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


def pack_panels(weight: Tensor, below: Sequence[Tensor], pairs: bool) -> Tensor:
    """[N, K] -> panels of 64 rows, columns side by side: float32 [N / 64, K, 64], pairs bfloat16 [.., K / 2, 64, 2].

    below: further matrices with the same columns, whose rows follow. Rows and, for pairs, columns are filled up with
    zeros. float64 stays float64 (not for pairs).
    """
    weight = torch.cat([weight, *below])
    pair = 2 if pairs else 1
    weight = weight.to(torch.bfloat16 if pairs else accumulation_dtype(weight.dtype))
    rows, columns = weight.shape
    weight = torch.nn.functional.pad(weight, (0, -columns % pair, 0, -rows % PANEL))
    panels = weight.view(weight.shape[0] // PANEL, PANEL, weight.shape[1] // pair, pair).transpose(1, 2).contiguous()
    return panels if pairs else panels.squeeze(-1)


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
        self.activation = ACTIVATION_FUNCTIONS[activation]

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor, rows: int) -> Tensor:
        weight = (panels if panels.ndim == 2 else unpack_panels(panels, rows, x.shape[-1])).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias.to(x.dtype) if bias.numel() else None)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The identity where there is no weight."""
        if weight.numel() == 0:
            return x
        shift = bias.to(x.dtype) if bias.numel() else None
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), shift, self.eps)

    def attention(self, qkv: Tensor, window: int, rotary: Tensor | None) -> Tensor:
        """One sequence: [L, 3 * H] -> [L, H]."""
        length, hidden = qkv.shape[0], qkv.shape[1] // 3
        q, k, v = qkv.view(length, 3, self.heads, hidden // self.heads).permute(1, 2, 0, 3)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        scores = q @ k.mT / math.sqrt(hidden // self.heads)
        place = torch.arange(length, device=qkv.device)
        distance = place - place.unsqueeze(1)
        bias = self.embedding.attention_bias
        if bias.numel():
            scores = scores + bias[:, distance + (bias.shape[1] + 1) // 2 - 1].to(scores.dtype)
        if window >= 0:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        return (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)

    def layer(self, x: Tensor, layer: Layer, spans: list[tuple[int, int]], positions: Tensor, window: int) -> Tensor:
        hidden = x.shape[1]
        y = self.norm(x, layer.attention_norm_weight, layer.attention_norm_bias) if self.pre_norm else x
        qkv_weight = layer.qkv_weight
        if layer.key_weight.numel():
            qkv_weight = torch.cat([qkv_weight, layer.key_weight, layer.value_weight])
        qkv = self.linear(y, qkv_weight, layer.qkv_bias, 3 * hidden)
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
        down = layer.down_weight
        intermediate = down.shape[1] if down.ndim == 2 else down[0].numel() // PANEL
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
        position_ids = torch.arange(input_ids.shape[0], device=start.device) - start + position_offset
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
