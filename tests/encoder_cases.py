"""The encoder operator's arguments: configs, random weights for them, packed batches, and the table of cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops.encoder import encoder

VOCABULARY = 50
NONE = torch.empty(0)
MEAN, MAX, CLS, LASTTOKEN, WEIGHTEDMEAN, MEAN_SQRT_LEN_TOKENS = range(6)
GELU, GELU_TANH, RELU, SILU = range(4)


@dataclass(frozen=True)
class Config:
    """What the operator can be told about an architecture; the defaults are BERT's."""

    hidden: int = 64
    heads: int = 4
    intermediate: int = 96
    layers: int = 2
    embedding: int = 0  # other than hidden: with a projection
    positions: int = 80
    token_types: int = 2
    activation: int = GELU
    reach: int = 0  # longest sequence of a relative bias
    rotary: bool = False
    windows: tuple[int, ...] = ()
    pre_norm: bool = False
    gated: bool = False
    biases: bool = True
    position_offset: int = 0
    dtype: torch.dtype = torch.float32
    panels: torch.dtype | None = torch.float32  # None: matrices


def rotary_tables(positions: int, head_dim: int) -> Tensor:
    angles = 6 * torch.rand(2, positions, head_dim // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def random_weights(c: Config) -> list[Tensor]:
    """In the order of the operator's `weights`; nothing is left at 0 or 1, so what is forgotten is seen."""
    embedding = c.embedding or c.hidden

    def bias(count: int) -> Tensor:
        return 0.1 * torch.randn(count) if c.biases else NONE

    def norm(count: int) -> list[Tensor]:
        return [1 + 0.2 * torch.randn(count), bias(count)]

    def linear(rows: int, columns: int) -> list[Tensor]:
        weight = torch.randn(rows, columns) / columns**0.5
        if c.panels is None:
            return [weight, bias(rows)]
        return [reference.pack_panels(weight, [], c.panels == torch.bfloat16), bias(rows)]

    def query_key_value() -> list[Tensor]:
        weight, shift = linear(3 * c.hidden, c.hidden)
        return [*weight.split(c.hidden), shift] if c.panels is None else [weight, NONE, NONE, shift]

    weights = [torch.randn(c.positions, embedding).to(c.dtype) if c.positions else NONE]
    weights += [torch.randn(c.token_types, embedding).to(c.dtype) if c.token_types else NONE, *norm(embedding)]
    weights += linear(c.hidden, embedding) if c.embedding else [NONE, NONE]
    weights += [torch.randn(c.heads, 2 * c.reach - 1) if c.reach else NONE]
    weights += [rotary_tables(80, c.hidden // c.heads) if c.rotary else NONE]
    weights += norm(c.hidden) if c.pre_norm else [NONE, NONE]
    for i in range(c.layers):
        first_norm = [NONE, NONE] if c.pre_norm and i == 0 else norm(c.hidden)
        weights += [*query_key_value(), *linear(c.hidden, c.hidden), *first_norm]
        weights += linear((2 if c.gated else 1) * c.intermediate, c.hidden)
        weights += [*linear(c.hidden, c.intermediate), *norm(c.hidden)]
    return weights


class Model:
    """Random weights of a config, and the operator called with them."""

    def __init__(self, config: Config):
        self.config = config
        self.words = torch.randn(VOCABULARY, config.embedding or config.hidden).to(config.dtype)
        self.weights = random_weights(config)

    def double(self) -> Model:
        twin = object.__new__(Model)
        twin.config, twin.words = self.config, self.words.double()
        twin.weights = [x.double() for x in self.weights]
        return twin

    def arguments(self, batch: Batch, **options: Any) -> tuple[Any, ...]:
        c, b = self.config, batch
        shape = (c.heads, c.activation, list(c.windows), c.pre_norm, c.gated, c.position_offset, 1e-12)
        o = {"modes": (), "prompt_length": 0, "normalize": False, "padded_length": 0, **options}
        result = (list(o["modes"]), o["prompt_length"], o["normalize"], o["padded_length"])
        return self.words, b.ids, b.cu_seqlens, b.token_types, b.positions, self.weights, *shape, *result

    def __call__(self, batch: Batch, **options: Any) -> Tensor:
        return encoder(*self.arguments(batch, **options))


@dataclass
class Batch:
    ids: Tensor
    cu_seqlens: Tensor
    token_types: Tensor | None = None
    positions: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def sequences(self) -> list[Tensor]:
        return list(self.ids.split(self.lengths)) if self.lengths else []


def packed(sequences: Sequence[Tensor]) -> Batch:
    ends = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0).int()
    return Batch(torch.cat([NONE.int(), *sequences]), ends)


def random_batch(lengths: Sequence[int], token_types: bool = False, positions: int = 0) -> Batch:
    batch = packed([torch.randint(0, VOCABULARY, (n,), dtype=torch.int32) for n in lengths])
    total = sum(lengths)
    if token_types:
        batch.token_types = torch.randint(0, 2, (total,), dtype=torch.int32)
    if positions:
        batch.positions = torch.randint(0, positions, (total,), dtype=torch.int32)
    return batch


@dataclass
class Case:
    config: Config
    lengths: Sequence[int]
    inputs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


MODERN = Config(positions=0, token_types=0, rotary=True, pre_norm=True, gated=True, biases=False)
CASES = {
    "bert": Case(Config(), (5, 17, 1, 30), {"token_types": True}, {"modes": (MEAN,), "normalize": True}),
    "roberta": Case(Config(position_offset=2, token_types=1), (78, 3), {}, {"modes": (CLS,)}),
    "mpnet": Case(Config(hidden=48, heads=2, reach=66, token_types=0), (66, 17, 65), {}, {"modes": (MEAN,)}),
    "electra": Case(Config(embedding=24, hidden=48, heads=3, activation=GELU_TANH), (9, 20)),
    "distilbert": Case(Config(hidden=72, heads=3, intermediate=130, token_types=0), (3, 14), {}, {"padded_length": 14}),
    "modernbert": Case(
        replace(MODERN, layers=5, windows=(-1, 4, 0, 70, 2**63 - 1)),
        (79, 1, 30),
        {},
        {"modes": (MEAN,), "normalize": True},
    ),
    "relu": Case(Config(activation=RELU), (8, 9), {}, {"padded_length": 12}),
    "silu": Case(Config(activation=SILU, hidden=32, heads=1), (8, 9), {"positions": 80}, {"modes": (LASTTOKEN,)}),
    "gated silu": Case(replace(MODERN, activation=SILU), (13, 4), {"positions": 80}, {"modes": (WEIGHTEDMEAN,)}),
    "norm before": Case(Config(pre_norm=True), (10, 6), {}, {"modes": (CLS,)}),
    "every mode": Case(
        Config(hidden=40, heads=5), (7, 0, 2, 1, 12), {}, {"modes": range(6), "prompt_length": 2, "normalize": True}
    ),
    "maximum": Case(Config(), (0, 6, 3, 0), {}, {"modes": (MAX,)}),
    "cls and empty": Case(Config(), (0, 6, 3, 0), {}, {"modes": (CLS,), "normalize": True}),
    "cls after a prompt": Case(Config(), (4, 6), {}, {"modes": (CLS,), "prompt_length": 3}),
    "no sequence": Case(Config(), (), {}, {"modes": (MEAN, MAX)}),
    "no token": Case(Config(), (0, 0, 0), {"token_types": True}, {"modes": (MEAN,)}),
    "no token, padded": Case(Config(), (0, 0), {}, {"padded_length": 3}),
    "one token": Case(Config(reach=1, hidden=8, heads=1, intermediate=2), (1,)),
    "many": Case(Config(hidden=32), tuple(i % 11 for i in range(70)), {}, {"modes": (MEAN_SQRT_LEN_TOKENS,)}),
    "deep": Case(Config(hidden=32, heads=2, intermediate=2100, layers=1), (7, 6), {}, {"modes": (MEAN,)}),
    "wide": Case(Config(hidden=256, heads=2, intermediate=64, layers=1), (15, 18)),
}
