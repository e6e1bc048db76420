"""What the user has chosen for single models. Weak tables: nothing is stored on a model, a copy of it starts anew."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

PRECISIONS = ("match", "bf16")

_chosen: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_off: WeakSet[nn.Module] = WeakSet()


def check_precision(precision: Any) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")


def precision_name(compute_dtype: torch.dtype) -> str:
    """What the products are computed in, as users are told it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype, "fp32")


def choose(model: nn.Module, precision: str) -> None:
    """`model` is a base model, here and below."""
    _off.discard(model)
    _chosen[model] = precision


def turn_off(model: nn.Module) -> None:
    _chosen.pop(model, None)
    _off.add(model)


def is_off(model: nn.Module) -> bool:
    return model in _off


def chosen(model: nn.Module) -> str | None:
    """The precision that was chosen for the model, None if nothing was."""
    return _chosen.get(model)
