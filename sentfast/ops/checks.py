"""Argument checks shared by the operators: each message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from sentfast import native as _native
from sentfast import private, registry

_STATE = _native.state
_WHOLE = (int, np.integer)
_NUMBERS = (int, float, np.integer, np.floating)
_LARGEST = 2**63 - 1
_LARGEST_FLOAT = torch.finfo(torch.float32).max
_PLAIN = (Tensor, Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        if x.is_nested:
            return f"a nested tensor of {x.dtype}"
        return f"{x.dtype} of shape {list(x.shape)} on {x.device}"
    return f"{type(x).__name__}"


def floats(name: str, x: object, ndim: str, ranks: tuple[int, ...] | None = None) -> Tensor:
    """x if it is a dense floating-point tensor; `ndim` says the ranks in words, `ranks` lists them (None: not 0)."""
    if (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and not x.is_nested
        and (x.ndim > 0 if ranks is None else x.ndim in ranks)
    ):
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {describe(x)}")
    dense(name, x)
    raise ValueError(f"{name}: expected {ndim}, got {describe(x)}")


def dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        got = "a nested one" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {got}")


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """value as an int of the range; `high` None: what fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, _WHOLE):
        raise TypeError(f"{name}: expected a whole number, got {_shown(value)}")
    if value < low or value > (_LARGEST if high is None else high):
        wanted = f"at least {low}" if high is None and value < low else f"{low} to {_LARGEST if high is None else high}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return int(value)


def number(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """value as a float of the range, which without limits holds infinity too; a 0-d tensor without gradient counts."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad and values_readable(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {_shown(value)}")
    if value != value:
        raise ValueError(f"{name}: expected a number, got NaN")
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    if not least <= value <= most:
        wanted = f"at least {least}" if high is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected a number of {wanted}, got {value}")
    return float(value)


def finite(name: str, value: object, low: float = -_LARGEST_FLOAT) -> float:
    return number(name, value, low, _LARGEST_FLOAT)


def flag(name: str, value: object) -> bool:
    if value is True or value is False or isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {_shown(value)}")


def one_of(name: str, value: object, allowed: Sequence[str | None]) -> int:
    """Which of the names value is."""
    if (value is None or isinstance(value, str)) and value in allowed:
        return allowed.index(value)
    raise ValueError(f"{name}: expected one of {tuple(allowed)}, got {_shown(value)}")


def sequence(name: str, value: object, of: str) -> Sequence:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a sequence of {of}, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value in a message: itself if it is short, else what it is."""
    if value is None or isinstance(value, (bool, str, *_NUMBERS)):
        return f"{value!r:.80}"
    return describe(value)


def native(x: object) -> bool:
    """Whether a call with x as its first tensor goes straight to the compiled CPU kernel."""
    return (
        not is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu  # type: ignore[attr-defined]
        and x.dtype in registry.KERNEL_DTYPES  # type: ignore[attr-defined]
        and registry.forced_backend() is None
        and _STATE.cpu is not None
        and not private.functorch_active()
    )


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {x.device}")


def packed(name: str, ends: object, other_name: str, other: Tensor) -> Tensor:
    """`ends` if it cuts the rows of `other` into sequences: int32 [B + 1], rising from 0 to their number."""
    if not isinstance(ends, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {describe(ends)}")
    dense(name, ends)
    if ends.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {describe(ends)}")
    if ends.ndim != 1 or ends.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [B + 1], got {describe(ends)}")
    same_device(name, ends, other_name, other)
    # On another device the values cannot be read without waiting for it; the kernels there clamp to the tensor.
    if values_readable(ends):
        values, total = ends.numpy(), other.shape[0]
        if values[0] != 0 or values[-1] != total or (values[1:] < values[:-1]).any():
            got = f", got {ends.tolist()}" if values.size <= 32 else ""
            raise ValueError(f"{name}: expected to rise from 0 to {total} (the number of tokens){got}")
    return ends


def values_readable(x: Tensor) -> bool:
    """Whether x's values can be looked at here: on the CPU, outside compilation and torch.func transforms."""
    return x.is_cpu and not torch.compiler.is_compiling() and not private.functorch_active()


def needs_function(x: Tensor, y: Tensor | None = None) -> bool:
    """Whether a call must go through its autograd.Function: for a gradient, or for PyTorch to refuse a transform."""
    if private.functorch_active():
        return True
    return (x.requires_grad or (y is not None and y.requires_grad)) and torch.is_grad_enabled()
