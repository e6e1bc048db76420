"""Argument checks shared by the operators: each message names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from sentfast import native as _native
from sentfast import registry

_STATE = _native.state
_PLAIN = (Tensor, Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} of shape {list(x.shape)} on {x.device}"
    return f"{type(x).__name__}"


def floats(name: str, x: object, ndim: str, ranks: tuple[int, ...] | None = None) -> Tensor:
    """x if it is a dense floating-point tensor; `ndim` says the ranks in words, `ranks` lists them (None: not 0)."""
    if (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and (x.ndim > 0 if ranks is None else x.ndim in ranks)
    ):
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {describe(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    raise ValueError(f"{name}: expected {ndim}, got {describe(x)}")


def native(x: object) -> bool:
    """Whether a call with x as its first tensor goes straight to the compiled CPU kernel."""
    return (
        not is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu  # type: ignore[attr-defined]
        and x.dtype in registry.KERNEL_DTYPES  # type: ignore[attr-defined]
        and registry.forced_backend() is None
        and _STATE.cpu is not None
        and not torch._C._are_functorch_transforms_active()
    )


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {x.device}")


def packed(name: str, ends: object, other_name: str, other: Tensor) -> Tensor:
    """`ends` if it cuts the rows of `other` into sequences: int32 [B + 1], rising from 0 to their number."""
    if not isinstance(ends, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {describe(ends)}")
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
    return x.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def needs_function(x: Tensor, y: Tensor | None = None) -> bool:
    """Whether a call must go through its autograd.Function: for a gradient, or for PyTorch to refuse a transform."""
    if torch._C._are_functorch_transforms_active():
        return True
    return (x.requires_grad or (y is not None and y.requires_grad)) and torch.is_grad_enabled()
