"""The packed encoder as differentiable steps: the same architectures, with dropout and for every gradient.

All of it runs over the model's own parameters, so everything that works on them does here too: optimisers, frozen
parameters, their hooks, DistributedDataParallel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from sentfast.encoder import adapters
from sentfast.encoder.examine import LayerParts, Parts
from sentfast.encoder.structure import asks_for_gradient
from sentfast.ops.attention import varlen_attention_qkvpacked
from sentfast.ops.layers import Normed, bias_activation, dropout, normed
from sentfast.ops.linear import activation_linear, linear, norm_linear, side_by_side
from sentfast.ops.seeds import draws, seed_of
from sentfast.reference import ACTIVATIONS

# Uses of one seed in a layer; the embeddings' comes before those of the first.
_ATTENTION, _OUTPUT, _GATE, _FEED_FORWARD = range(1, 5)
# Adapters' come behind all layers, so many for each layer that has some.
_ADAPTERS, _ADAPTERS_OF_LAYER = 1 << 16, 64


class _Batch(NamedTuple):
    """What every layer is told.

    angles: of global and of local layers, [T, d / 2] cosines and sines; visible: as for :func:`token_embeddings`.
    """

    parts: Parts
    cu_seqlens: Tensor
    longest: int
    seed: int
    bias: Tensor | None
    angles: tuple[tuple[Tensor, Tensor], ...]
    visible: Tensor | None


def token_embeddings(
    parts: Parts,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    visible: Tensor | None = None,
) -> Tensor:
    """[T, H] of packed sequences, differentiable in every parameter.

    Args:
        parts: of the model.
        input_ids, position_ids: integers [T] on the device of the model; token_type_ids likewise, None: all 0.
        cu_seqlens: int32 [B + 1] there; longest: length of the longest sequence.
        visible: bool [B, longest] there, for sequences that all have that length: the tokens that are seen by others.
    """
    # One seed per call that drops something, from the generator whose state checkpoints and cached gradients restore:
    # that of the CPU, also for a GPU, which nobody has to wait for then.
    seed = seed_of(next(filter(draws, _rates(parts)), 0.0), None)
    bias, angles = position_bias(parts, longest), _angles(parts, position_ids)
    batch = _Batch(parts, cu_seqlens, longest, seed, bias, angles, visible)
    x = Normed(_embed(batch, input_ids, token_type_ids, position_ids))
    for i, layer in enumerate(parts.layers):
        if getattr(layer.module, "gradient_checkpointing", False) and layer.module.training:
            run: Callable = vars(layer.module)["_gradient_checkpointing_func"]  # as transformers was told to checkpoint
            x = Normed(run(functools.partial(_checkpointed, batch, i), x.output))
        else:
            x = _layer(batch, i, x)
    return _norm(parts.final_norm, x.output).output


def _checkpointed(batch: _Batch, index: int, x: Tensor) -> Tensor:
    return _layer(batch, index, Normed(x)).output


def _embed(batch: _Batch, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor) -> Tensor:
    parts = batch.parts
    x = _look_up(parts.words, input_ids)
    if torch.is_grad_enabled() and asks_for_gradient(parts.words):
        x.requires_grad_(True)
    if parts.token_types is not None:
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = x + _look_up(parts.token_types, types)
    if parts.positions is not None:
        x = x + _look_up(parts.positions, position_ids)
    x = dropout(_norm(parts.embedding_norm, x).output, rate(parts.embedding_dropout), seed=batch.seed, stream=0)
    return x if parts.projection is None else _linear(batch, parts.projection, Normed(x))


def _look_up(table: nn.Embedding, ids: Tensor) -> Tensor:
    return embedding(
        ids, table.weight, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq, sparse=table.sparse
    )


def _norm(norm: nn.LayerNorm | None, x: Tensor, residual: Tensor | None = None, **options: Any) -> Normed:
    """options: the dropout of x, to which the residual is added."""
    return Normed(x) if norm is None else normed(x, residual, norm.weight, norm.bias, norm.eps, **options)


def position_bias(parts: Parts, longest: int) -> Tensor | None:
    """[heads, 2 * longest - 1] by the model's own rule of buckets."""
    if parts.bias is None:
        return None
    table = parts.bias.relative_attention_bias.weight
    distance = torch.arange(1 - longest, longest, device=table.device)
    return embedding(parts.bias.relative_position_bucket(distance), table).t()


def _angles(parts: Parts, position_ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    half = parts.hidden_size // parts.heads // 2
    found = []
    for angles in parts.rotary:
        cosines, sines = angles(position_ids.unsqueeze(0))
        found.append((cosines[0, :, None, :half], sines[0, :, None, :half]))
    return tuple(found)


def _layer(batch: _Batch, index: int, x: Normed) -> Normed:
    layer = batch.parts.layers[index]
    for part, use, norm, dropped in (
        (_attend, _OUTPUT, layer.attention_norm, layer.dropouts.output),
        (_feed_forward, _FEED_FORWARD, layer.feed_forward_norm, layer.dropouts.feed_forward),
    ):
        p, stream = rate(dropped), _stream(index, use)
        if batch.parts.architecture.pre_norm:
            change = part(batch, index, _norm(norm, x.output))
            x = Normed(x.output + dropout(change, p, seed=batch.seed, stream=stream))
        else:
            x = _norm(norm, part(batch, index, x), x.output, dropout_p=p, seed=batch.seed, stream=stream)
    return x


def _attend(batch: _Batch, index: int, x: Normed) -> Tensor:
    parts = batch.parts
    layer, heads = parts.layers[index], parts.heads
    qkv = _query_key_value(batch, layer, x).unflatten(1, (3, heads, -1))
    window = parts.windows[index] if parts.windows else -1
    if batch.angles:
        cosines, sines = batch.angles[int(window >= 0)]
        qkv = torch.cat([rotate(qkv[:, :2], cosines.unsqueeze(1), sines.unsqueeze(1)), qkv[:, 2:]], dim=1)
    if batch.visible is not None:
        return _linear(batch, layer.output, Normed(_attend_visible(batch, layer, qkv, window)))
    context = varlen_attention_qkvpacked(
        qkv,
        batch.cu_seqlens,
        batch.longest,
        bias=batch.bias,
        dropout_p=attention_rate(layer),
        window_size=(window, window),
        seed=batch.seed,
        stream=_stream(index, _ATTENTION),
    )
    return _linear(batch, layer.output, Normed(context.flatten(1)))


def _attend_visible(batch: _Batch, layer: LayerParts, qkv: Tensor, window: int) -> Tensor:
    """[T, H]: every row of the padded batch sees the visible ones, by PyTorch's attention or, as the model, without.

    PyTorch's has no second derivative.
    """
    assert batch.visible is not None
    (count, length), heads = batch.visible.shape, qkv.shape[2]
    q, k, v = qkv.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    seen = batch.visible[:, None, None, :]
    place = torch.arange(length, device=qkv.device)
    distance = place - place.unsqueeze(1)
    if window >= 0:
        seen = seen & (distance.abs() <= window)
    if batch.bias is not None:
        bias = batch.bias[:, distance + length - 1].to(q.dtype)
        seen = torch.where(seen, bias, float("-inf"))
    attend = _eager_attention if batch.parts.eager else scaled_dot_product_attention
    context = attend(q, k, v, seen, attention_rate(layer))
    return context.transpose(1, 2).reshape(count * length, -1)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout_p: float) -> Tensor:
    """seen: which keys count, or what is added to their scores."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    return nn.functional.dropout(scores.softmax(dim=-1), dropout_p) @ v


def _linear(batch: _Batch, module: Any, x: Normed) -> Tensor:
    """Of a plain layer, or of one with adapters."""
    terms = [] if type(module) is nn.Linear else adapters.terms(module)
    if terms is None:
        return module(x.output)
    y = norm_linear(x, module.weight, module.bias)
    for i, term in enumerate(terms):
        stream = _ADAPTERS + _ADAPTERS_OF_LAYER * batch.parts.adapted.index(module) + i
        low = linear(dropout(x.output, rate(term.dropout), seed=batch.seed, stream=stream), term.a)
        y = torch.addmm(y, low, term.b.t(), alpha=term.scaling)
    return y


def _query_key_value(batch: _Batch, layer: LayerParts, x: Normed) -> Tensor:
    if all(type(module) is nn.Linear for module in layer.qkv):
        return norm_linear(x, *_side_by_side(layer))
    return torch.cat([_linear(batch, module, x) for module in layer.qkv], dim=1)


def _side_by_side(layer: LayerParts) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of query, key and value: one product of a larger size runs faster than three."""
    if len(layer.qkv) == 1:
        return layer.qkv[0].weight, layer.qkv[0].bias
    weight = side_by_side(*(x.weight for x in layer.qkv))
    if all(x.bias is None for x in layer.qkv):
        return weight, None
    return weight, side_by_side(*(weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in layer.qkv))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x: [T, 2, heads, d]; the halves of a head are real and imaginary parts."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cosines - imaginary * sines, imaginary * cosines + real * sines], dim=-1).to(x.dtype)


def _feed_forward(batch: _Batch, index: int, x: Normed) -> Tensor:
    parts = batch.parts
    layer, activation = parts.layers[index], ACTIVATIONS[parts.activation]
    if parts.architecture.gated:
        y, gate = _linear(batch, layer.up, x).chunk(2, dim=-1)
        y = bias_activation(y, None, activation) * gate
        y = dropout(y, rate(layer.dropouts.gate), seed=batch.seed, stream=_stream(index, _GATE))
        return _linear(batch, layer.down, Normed(y))
    if type(layer.up) is type(layer.down) is nn.Linear:
        h = norm_linear(x, layer.up.weight)
        return activation_linear(h, layer.up.bias, activation, layer.down.weight, layer.down.bias)
    return _linear(batch, layer.down, Normed(bias_activation(_linear(batch, layer.up, x), None, activation)))


def rate(module: nn.Module | None) -> float:
    """The probability with which a Dropout drops now."""
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def attention_rate(layer: LayerParts) -> float:
    found = layer.dropouts.attention
    p = found.p if isinstance(found, nn.Dropout) else found
    return float(p) if layer.dropouts.attention_module.training else 0.0


def _rates(parts: Parts) -> Iterator[float]:
    """Of every dropout of a forward pass."""
    yield rate(parts.embedding_dropout)
    for layer in parts.layers:
        yield attention_rate(layer)
        yield from map(rate, (layer.dropouts.output, layer.dropouts.gate, layer.dropouts.feed_forward))
    for module in parts.adapted:
        yield from (rate(term.dropout) for term in adapters.terms(module) or ())


def _stream(index: int, use: int) -> int:
    return 4 * index + use
