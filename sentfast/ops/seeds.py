"""Seeds of dropout."""

from __future__ import annotations

import torch


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")


def seed_of(dropout_p: float, seed: int | None) -> int:
    """The seed itself, or one drawn from PyTorch's default generator, whose restored state then draws it again."""
    if seed is not None or dropout_p == 0.0:
        return seed or 0
    return int(torch.randint(2**63 - 1, ()))
