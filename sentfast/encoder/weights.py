"""The operator's `weights` list, made of the model's own parameters.

Tables, norms and biases in the right dtype are the parameters themselves, and so are all matrices in float32. What has
to be copied, joined or computed is made of snapshots, and their bytes tell whether it still holds: whoever writes to a
parameter meanwhile is seen afterwards, even if he takes it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sentfast.encoder import adapters, watch
from sentfast.encoder.examine import LayerParts, Parts
from sentfast.encoder.structure import Versions
from sentfast.ops.encoder import pack_panels
from sentfast.reference import PANEL, Embedding, Layer


class Sources:
    """Parameters that copies are made of, and the bytes that they had then.

    Attributes:
        tensors: the parameters, kept alive, since their bytes are looked at.
        bytes: compares them with what the snapshots were.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.bytes = watch.bytes_of([])

    def snapshot(self, x: Tensor) -> Tensor:
        x = x.detach()
        copied = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            self.tensors.append(x)
            self.bytes.add(x.data_ptr(), x.numel() * x.element_size(), copied.data_ptr())
        return copied


class Weights(NamedTuple):
    """tensors: the operator's list. small, large: what copies in it are made of, large are matrices."""

    tensors: list[Tensor]
    small: Sources
    large: Sources
    written: Versions


def linears_of(parts: Parts) -> list[nn.Linear]:
    found = [linear for layer in parts.layers for linear in (*layer.qkv, layer.output, layer.up, layer.down)]
    return found + ([] if parts.projection is None else [parts.projection])


def parameters_of(parts: Parts) -> list[Tensor]:
    """Everything that the encoder reads."""
    modules: list[nn.Module | None] = [parts.words, parts.positions, parts.token_types, *_norms(parts)]
    modules += linears_of(parts) + ([] if parts.bias is None else [parts.bias.relative_attention_bias])
    return [x for module in modules if module is not None for x in module.parameters()]


def pack(parts: Parts, compute_dtype: torch.dtype) -> Weights:
    """compute_dtype: float32 or bfloat16, in which the products are computed."""
    stays = parts.dtype == compute_dtype == torch.float32
    # From before the work, as the snapshots are taken after it.
    written = Versions([] if stays else [linear.weight.detach() for linear in linears_of(parts)])
    packer = _Packer(stays, compute_dtype)
    return Weights(packer.tensors(parts), packer.small, packer.large, written)


def _norms(parts: Parts) -> list[nn.LayerNorm | None]:
    layers = [norm for layer in parts.layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
    return [parts.embedding_norm, parts.final_norm, *layers]


class _Packer:
    """stays: matrices are read where the model has them."""

    def __init__(self, stays: bool, dtype: torch.dtype):
        self._stays, self._dtype = stays, dtype
        self.small, self.large = Sources(), Sources()

    def tensors(self, parts: Parts) -> list[Tensor]:
        projection, final = parts.projection, parts.final_norm
        head = Embedding(
            positions=_table(parts.positions),
            token_types=_table(parts.token_types),
            norm_weight=self._float(parts.embedding_norm.weight),
            norm_bias=self._float(parts.embedding_norm.bias),
            projection_weight=_empty() if projection is None else self._matrix([projection]),
            projection_bias=_empty() if projection is None else self._bias([projection], always=True),
            attention_bias=self._attention_bias(parts),
            rotary=_rotary(parts),
            final_norm_weight=_empty() if final is None else self._float(final.weight),
            final_norm_bias=_empty() if final is None else self._float(final.bias),
        )
        weights = list(head)
        for layer in parts.layers:
            weights += self._layer(layer)
        return weights

    def _layer(self, layer: LayerParts) -> Layer:
        first, second = layer.attention_norm, layer.feed_forward_norm
        apart = self._stays and len(layer.qkv) > 1  # key and value, which panels hold below the query
        query, key, value = layer.qkv if apart else (None, None, None)
        return Layer(
            qkv_weight=self._matrix(layer.qkv if query is None else [query]),
            key_weight=_empty() if key is None else self._matrix([key]),
            value_weight=_empty() if value is None else self._matrix([value]),
            qkv_bias=self._bias(layer.qkv),
            output_weight=self._matrix([layer.output]),
            output_bias=self._bias([layer.output]),
            attention_norm_weight=_empty() if first is None else self._float(first.weight),
            attention_norm_bias=_empty() if first is None else self._float(first.bias),
            up_weight=self._matrix([layer.up]),
            up_bias=self._bias([layer.up]),
            down_weight=self._matrix([layer.down]),
            down_bias=self._bias([layer.down]),
            feed_forward_norm_weight=self._float(second.weight),
            feed_forward_norm_bias=self._float(second.bias),
        )

    def _matrix(self, linears: Sequence[nn.Linear]) -> Tensor:
        if not self._stays:
            return panels([adapters.weight(x, self.large.snapshot, self.small.snapshot) for x in linears], self._dtype)
        (linear,) = linears
        plain = type(linear) is nn.Linear
        return linear.weight.detach() if plain else adapters.weight(linear, self.small.snapshot, self.small.snapshot)

    def _float(self, parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return _empty()
        if parameter.dtype == torch.float32 and parameter.is_contiguous():
            return parameter.detach()
        return self.small.snapshot(parameter).float()

    def _bias(self, linears: Sequence[nn.Linear], always: bool = False) -> Tensor:
        """Side by side, zeros for one that has none; empty if none has one, unless it must be there."""
        if len(linears) == 1 and linears[0].bias is not None:
            return self._float(linears[0].bias)
        if not always and all(linear.bias is None for linear in linears):
            return _empty()
        rows = (
            torch.zeros(x.out_features, dtype=torch.float32, device="cpu")
            if x.bias is None
            else self.small.snapshot(x.bias)
            for x in linears
        )
        return torch.cat([row.float() for row in rows])

    def _attention_bias(self, parts: Parts) -> Tensor:
        """[heads, 2 * R - 1] for sequences of up to R tokens, by the model's own rule of buckets."""
        if parts.bias is None:
            return _empty()
        longest = parts.length - parts.position_offset
        distance = torch.arange(1 - longest, longest, device="cpu")
        table = self.small.snapshot(parts.bias.relative_attention_bias.weight).float()
        return table[parts.bias.relative_position_bucket(distance)].t().contiguous()


def panels(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The pieces' rows one below the other, in panels of `dtype`."""
    pieces = [piece.detach() for piece in pieces]
    if any(piece.shape[0] % PANEL for piece in pieces[:-1]):
        pieces = [torch.cat(pieces)]
    return pack_panels(pieces[0], pieces[1:], dtype == torch.bfloat16)


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")


def _table(embedding: nn.Embedding | None) -> Tensor:
    return _empty() if embedding is None else embedding.weight.detach().contiguous()


def _rotary(parts: Parts) -> Tensor:
    """[2, P, head size] by the model's own rule of angles; a cosine and its twin in the other half are the same."""
    if not parts.rotary:
        return _empty()
    positions = torch.arange(parts.length, device="cpu").unsqueeze(0)
    half = parts.hidden_size // parts.heads // 2
    tables = []
    for angles in parts.rotary:
        cosines, sines = angles(positions)
        tables.append(torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1).float())
    return torch.stack(tables)
