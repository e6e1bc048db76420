"""What the user has chosen for single models. Weak tables: nothing is stored on a model, a copy of it starts anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sentfast import weak
from sentfast.ops import checks

PRECISIONS = ("match", "bf16")
NOT_SAID = ""
PADDED_ROWS = ("zeros", "exact")

_chosen: weak.Table[str] = weak.Table()
_rows: weak.Table[str] = weak.Table()
_off = weak.Set()


def check_precision(precision: Any) -> None:
    checks.one_of("precision", precision, PRECISIONS)


def check_padded_rows(padded_rows: Any) -> None:
    checks.one_of("padded_rows", padded_rows, (*PADDED_ROWS, None))


def precision_name(compute_dtype: torch.dtype) -> str:
    """What the products are computed in, as users are told it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype, "fp32")


def choose(model: nn.Module, precision: str, padded_rows: str | None = None) -> None:
    """`model` is a base model, here and below."""
    _off.discard(model)
    _chosen[model] = precision
    _rows[model] = NOT_SAID if padded_rows is None else padded_rows


def turn_off(model: nn.Module) -> None:
    _chosen.pop(model, None)
    _rows.pop(model, None)
    _off.add(model)


def is_off(model: nn.Module) -> bool:
    return model in _off


def chosen(model: nn.Module) -> str | None:
    """The precision that was chosen for the model, None if nothing was."""
    return _chosen.get(model)


def padded_rows(model: nn.Module) -> str | None:
    """ "zeros", "exact", or NOT_SAID; None if the model was not accelerated by name."""
    return _rows.get(model)
