"""The packed encoder on a GPU, without a gradient: PyTorch's matrix products, and our operators between them.

A layer is seven launches: the product for query, key and value, attention, its output product, residual with norm, up
product with activation, and gate where there is one, down product, residual with norm. One more in large batches of
float32 (:func:`fuses_activation`), and one of rotary angles in large batches of long sequences (:func:`fuses_rotary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from sentfast.encoder import arguments
from sentfast.encoder.choice import precision_name
from sentfast.encoder.device import DeviceBatch, HostBatch, batch_of, send
from sentfast.encoder.examine import LayerParts, Parts
from sentfast.encoder.graphs import CudaCapture, Graphs, captures
from sentfast.encoder.structure import Versions
from sentfast.encoder.training import position_bias
from sentfast.encoder.weights import parameters_of
from sentfast.ops.attention import _rotary_attention, _varlen_attention
from sentfast.ops.layers import (
    _bias_activation,
    _dropout_add_layer_norm,
    _dropout_add_layer_norm_forward,
    _gated_activation,
    _rotate_,
)
from sentfast.ops.linear import _linear_activation, _linear_gated_activation
from sentfast.ops.pooling import _pool
from sentfast.reference import POOLING_MODES, accumulation_dtype

_NO_DROPOUT = (0.0, 0, 0)
# Up to so many tokens, those of CUDA graphs, launches count more than what one of them reads; see docs/design.md.
_SMALL = 2048
# Keys that a query sees, at most, where queries and keys are turned by attention.
_MOST_TURNED = 512


def fuses_activation(tokens: int, dtype: torch.dtype) -> bool:
    """Whether up product and activation are one launch of ours, or PyTorch's product and a pass over its result."""
    return dtype != torch.float32 or tokens <= _SMALL


def fuses_rotary(tokens: int, longest: int, window: int) -> bool:
    """Whether attention turns queries and keys as it loads them, each key once per block of queries that see it."""
    return tokens <= _SMALL or (longest if window < 0 else 2 * window) <= _MOST_TURNED


class Norm(NamedTuple):
    """Weights in the dtype of accumulation, as the operator reads them; None for no norm."""

    weight: Tensor | None
    bias: Tensor | None


class Layer(NamedTuple):
    """Matrices and their biases in the dtype of the products, up_bias in that of accumulation.

    after_attention, after_feed_forward: the norms that follow the residual sums; where norms come first, the second is
    that of the next layer.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    after_attention: Norm
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    after_feed_forward: Norm
    window: int


class Pooling(NamedTuple):
    """Numbers of the modes, tokens left out at the start of each sequence, and whether results have length 1."""

    modes: tuple[int, ...]
    prompt_length: int
    normalize: bool


class Composed:
    """Runs a model's layers over packed sequences on its GPU; ``Encoder`` is its counterpart for the CPU.

    The hidden state between the products has the model's dtype: with products in half precision and a float32 model it
    stays float32, as under autocast.

    Attributes:
        architecture: model type of transformers.
        hidden_size: width of the result.
        tables: sizes of the embedding tables.
        precision: "fp32", "bf16" or "fp16": in what the products are computed.
        dtype: that of the result.
        device: where the model is, and the result.
    """

    def __init__(self, parts: Parts, compute_dtype: torch.dtype):
        self.architecture = parts.architecture.model_type
        self.hidden_size = parts.hidden_size
        self.tables = parts.tables
        self.precision = precision_name(compute_dtype)
        self.dtype, self.device = parts.dtype, parts.device
        self._compute_dtype = compute_dtype
        self._heads, self._activation, self._eps = parts.heads, parts.activation, parts.eps
        self._pre_norm, self._gated = parts.architecture.pre_norm, parts.architecture.gated
        self._parts = parts
        self._pack()

    def _pack(self) -> None:
        parts = self._parts
        # From before the work, but told after it: until then another thread must not take the old copies for new ones.
        written = Versions([x.detach() for x in parameters_of(parts)])
        self._words, self._positions = parts.words.weight.detach(), _table(parts.positions)
        self._types = _table(parts.token_types)
        self._embedding_norm = _norm(parts.embedding_norm)
        self._projection = None if parts.projection is None else self._matrix([parts.projection])
        bias = position_bias(parts, max(self.max_length, 1))
        self._bias = None if bias is None else _copy(bias.detach().to(accumulation_dtype(self.dtype)))
        self._angles = _angles(parts)
        self._first_norm = _norm(parts.layers[0].attention_norm if self._pre_norm else None)
        self._layers = [self._layer(parts, index) for index in range(len(parts.layers))]
        self._graphs = Graphs(CudaCapture(self.device), self.device) if captures(self.device) else None
        self._written = written

    @property
    def max_length(self) -> int:
        return self.tables.max_length

    def run(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        modes: Sequence[str] = (),
        prompt_length: int = 0,
        normalize: bool = False,
        checked: bool = False,
    ) -> Tensor:
        """As ``Encoder.run``, of sequences that are still on the CPU; the result is on the GPU. Waits for nothing.

        A small batch to be pooled runs as a CUDA graph from the second of its shape on.
        """
        if not checked:
            arguments.check(self.tables, input_ids, cu_seqlens, token_type_ids, position_ids, modes, 0)
        if position_ids is None:
            position_ids = self.tables.count_positions(input_ids, cu_seqlens)
        types = None if token_type_ids is None or self._types is None else token_type_ids.numpy()
        host = HostBatch(input_ids.numpy(), types, position_ids.numpy(), cu_seqlens.numpy())
        pooling = Pooling(tuple(map(POOLING_MODES.index, modes)), prompt_length, normalize)
        return self.run_host(host, pooling if modes else None)

    def run_host(self, host: HostBatch, pooling: Pooling | None) -> Tensor:
        """[B, modes * H], without pooling [T, H], on the GPU."""
        if pooling is not None and self._graphs is not None:
            found = self._graphs.run(self.pooled, host, self._types is not None, pooling)
            if found is not None:
                return found
        sizes = (self._types is not None, host.tokens, host.sequences)
        batch = batch_of(send(host.block(*sizes), self.device), *sizes, host.longest)
        return self.hidden(batch) if pooling is None else self.pooled(batch, pooling)

    def current(self, whole: bool = False) -> bool:
        """As far as PyTorch counts changes; whole: whether to look at every byte, which nothing here does."""
        return self._written.same()

    def refresh(self) -> None:
        """Packs anew what is a copy."""
        self._pack()

    def pooled(self, batch: DeviceBatch, pooling: Pooling) -> Tensor:
        """[B, modes * H]."""
        modes, prompt_length, normalize = pooling
        return _pool(self.hidden(batch), None, batch.cu_seqlens, list(modes), prompt_length, normalize)

    def hidden(self, batch: DeviceBatch) -> Tensor:
        """[T, H], the token embeddings. Rows of tokens that belong to no sequence hold anything."""
        total = self._embed(batch)
        y, total = self._add_norm(self._first_norm, total, None)
        for layer in self._layers:
            y, total = self._add_norm(layer.after_attention, self._attend(layer, batch, y), total)
            y, total = self._add_norm(layer.after_feed_forward, self._feed_forward(layer, y), total)
        return y

    def _embed(self, batch: DeviceBatch) -> Tensor:
        x = embedding(batch.input_ids, self._words)
        if self._types is not None:
            types = torch.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
            x = x + embedding(types, self._types)
        positions = None if self._positions is None else embedding(batch.position_ids, self._positions)
        x = self._normalized(self._embedding_norm, x, positions)[0]
        return x if self._projection is None else self._product(x, *self._projection).to(self.dtype)

    def _add_norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and what the next sum starts from: the sum itself where norms come first."""
        if norm.weight is None:
            x = x if residual is None else x + residual
            return x, x
        return self._normalized(norm, x, residual)

    def _normalized(self, norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._pre_norm:
            return _dropout_add_layer_norm_forward(x, residual, *norm, self._eps, *_NO_DROPOUT)[:2]
        y = _dropout_add_layer_norm(x, residual, *norm, self._eps, *_NO_DROPOUT)
        return y, y

    def _attend(self, layer: Layer, batch: DeviceBatch, x: Tensor) -> Tensor:
        qkv = self._product(x, layer.qkv_weight, layer.qkv_bias).view(x.shape[0], 3, self._heads, -1)
        where, options = (batch.cu_seqlens, batch.longest), (qkv.shape[-1] ** -0.5, layer.window, layer.window)
        turns = (batch.position_ids, *self._angles[int(layer.window >= 0)]) if self._angles else ()
        if turns and fuses_rotary(x.shape[0], batch.longest, layer.window):
            y = _rotary_attention(*qkv.unbind(1), *turns, *where, *options)
        else:
            if turns:
                _rotate_(qkv, *turns)
            y = _varlen_attention(*qkv.unbind(1), *where, self._bias, *options, *_NO_DROPOUT)
        return self._product(y.flatten(1), layer.output_weight, layer.output_bias)

    def _feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        if fuses_activation(x.shape[0], self._compute_dtype):
            step = _linear_gated_activation if self._gated else _linear_activation
            h = step(x.to(self._compute_dtype), layer.up_weight, layer.up_bias, self._activation)
        else:
            step = _gated_activation if self._gated else _bias_activation
            h = step(self._product(x, layer.up_weight, None), layer.up_bias, self._activation)
        return self._product(h, layer.down_weight, layer.down_bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x.to(self._compute_dtype), weight, bias)

    def _layer(self, parts: Parts, index: int) -> Layer:
        layer: LayerParts = parts.layers[index]
        first, second = _norm(layer.attention_norm), _norm(layer.feed_forward_norm)
        if self._pre_norm:
            following = parts.layers[index + 1].attention_norm if index + 1 < len(parts.layers) else parts.final_norm
            first, second = second, _norm(following)
        up_bias = layer.up.bias
        return Layer(
            *self._matrix(layer.qkv),
            *self._matrix([layer.output]),
            first,
            self._matrix([layer.up])[0],
            None if up_bias is None else up_bias.detach().to(accumulation_dtype(self.dtype)),
            *self._matrix([layer.down]),
            second,
            parts.windows[index] if parts.windows else -1,
        )

    def _matrix(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """Weights and biases side by side in the dtype of the products; one alone in that dtype is the model's own."""
        weight = _joined([x.weight.detach() for x in linears]).to(self._compute_dtype)
        if all(x.bias is None for x in linears):
            return weight, None
        biases = [weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
        return weight, _joined(biases).to(self._compute_dtype)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(tuple(pieces))


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _table(found: nn.Embedding | None) -> Tensor | None:
    return None if found is None else found.weight.detach()


def _norm(norm: nn.LayerNorm | None) -> Norm:
    if norm is None:
        return Norm(None, None)
    acc = accumulation_dtype(norm.weight.dtype)
    return Norm(norm.weight.detach().to(acc), None if norm.bias is None else norm.bias.detach().to(acc))


def _angles(parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines of every position for global and for local layers, [P, d / 2]; by the model's rule."""
    half = parts.hidden_size // parts.heads // 2
    positions = torch.arange(parts.length, device=parts.device).unsqueeze(0)
    found = []
    for angles in parts.rotary:
        cosines, sines = (_copy(x.squeeze(0).narrow(1, 0, half)) for x in angles(positions))
        found.append((cosines, sines))
    return found
