"""Seeds of dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from sentfast.ops import checks


def check_dropout(p: object, seed: object, stream: object, name: str = "dropout_p") -> None:
    checks.number(name, p, 0, 1)
    if seed is not None:
        checks.whole("seed", seed, -(2**63))
    checks.whole("stream", stream, 0, 2**32 - 1)


def draws(dropout_p: float) -> bool:
    """Whether a dropout is random, so that PyTorch's own moves the generator."""
    return 0.0 < dropout_p < 1.0


def seed_of(dropout_p: float, seed: int | None, x: Tensor | None = None) -> int:
    """The seed itself, or one drawn from PyTorch's default generator, whose restored state then draws it again.

    x: what is dropped; as PyTorch, nothing is drawn for no elements, nor where all or none are dropped.
    """
    if seed is not None or not draws(dropout_p) or (x is not None and x.numel() == 0):
        return seed or 0
    return int(torch.randint(2**63 - 1, (), device="cpu"))
