"""A covered model taken apart, as ``examine.py`` does it and everything else reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from sentfast.encoder.architecture import Architecture
from sentfast.encoder.tables import Tables


class Dropouts(NamedTuple):
    """Of one layer. Each is a module, None for none; attention's may be a number, that its module drops in training."""

    attention_module: nn.Module
    attention: Any
    output: nn.Module | None
    gate: nn.Module | None
    feed_forward: nn.Module | None


class LayerParts(NamedTuple):
    module: nn.Module
    dropouts: Dropouts
    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    attention_norm: nn.LayerNorm | None
    up: nn.Linear
    down: nn.Linear
    feed_forward_norm: nn.LayerNorm


@dataclass(frozen=True)
class Parts:
    """A covered model taken apart. Holds parts of the model, never the model itself.

    Attributes:
        adapted: the linear layers with LoRA adapters.
        activation: index in ``reference.ACTIVATIONS``.
        windows: per layer the largest distance of a key, -1 for any; empty if that holds in every layer.
        padding_idx: the token id that does not count as a position, None if all do.
        position_offset: position of a sequence's first token.
        bias: the module with the relative position bias.
        rotary: from position ids to cosines and sines, for global and for local layers.
        length: rows of the position table.
        eager: the model's own attention is not PyTorch's fused one.
        dtype, device: of every parameter.
    """

    architecture: Architecture
    adapted: tuple[nn.Module, ...]
    words: nn.Embedding
    positions: nn.Embedding | None
    token_types: nn.Embedding | None
    embedding_norm: nn.LayerNorm
    embedding_dropout: nn.Module
    projection: nn.Linear | None
    final_norm: nn.LayerNorm | None
    bias: Any
    rotary: tuple[Callable[[torch.Tensor], Any], ...]
    layers: tuple[LayerParts, ...]
    hidden_size: int
    heads: int
    activation: int
    windows: tuple[int, ...]
    eps: float
    padding_idx: int | None
    position_offset: int
    length: int
    eager: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def tables(self) -> Tables:
        types = 0 if self.token_types is None else self.token_types.weight.shape[0]
        return Tables(self.words.weight.shape[0], types, self.length, self.position_offset, self.padding_idx)
