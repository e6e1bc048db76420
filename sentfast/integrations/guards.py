"""Which calls the operators take. A reason code ("" for none) hands the call to the original code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import sentfast.ops  # noqa: F401  defines the operators and opens the libraries
from sentfast import native, registry, switch
from sentfast.report import fallback

PLAIN = (Tensor, Parameter)
MARK = "__sentfast__"
HALF = (torch.bfloat16, torch.float16)

# Fixed once the libraries are open.
HAS_KERNELS = {
    "cpu": native.cpu_loaded(),
    "cuda": not native.why_no_cuda() or not native.why_no_triton("cuda"),
}


def accelerated(name: str, original: Callable, attempt: Callable) -> Callable:
    """The replacement of `original`: `attempt` returns the result, or the reason code why the original has to run."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Neither counters nor the context reach into a compiled graph.
            result = attempt(*args, **kwargs)
            return original(*args, **kwargs) if isinstance(result, str) else result
        if not switch.is_enabled():
            return original(*args, **kwargs)
        reason = transform()
        result = reason if reason else attempt(*args, **kwargs)
        if isinstance(result, str):
            fallback(name, result)
            return switch.run_original(original, *args, **kwargs)
        return result

    setattr(wrapper, MARK, True)
    return wrapper


def accelerated_loop(name: str, original: Callable, attempt: Callable) -> Callable:
    """As :func:`accelerated`, for an original whose parts are patched too: they stay so when it has to run."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not switch.is_enabled() or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        result = transform() or attempt(*args, **kwargs)
        if isinstance(result, str):
            fallback(name, result)
            return original(*args, **kwargs)
        return result

    setattr(wrapper, MARK, True)
    return wrapper


def with_original(name: str, original: Callable, attempt: Callable) -> Callable:
    """As :func:`accelerated_loop`, for an attempt that is given the function's name and the original too."""
    return accelerated_loop(name, original, functools.partial(attempt, name, original))


def prepared(name: str, original: Callable, prepare: Callable) -> Callable:
    """The replacement of `original` that calls `prepare` with its arguments before it."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and switch.is_enabled():
            prepare(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(wrapper, MARK, True)
    return wrapper


def rewritten(name: str, original: Callable, rewrite: Callable) -> Callable:
    """The replacement of `original` that runs it with the arguments that `rewrite` makes of its own."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not switch.is_enabled():
            return original(*args, **kwargs)
        return original(*rewrite(*args, **kwargs))

    setattr(wrapper, MARK, True)
    return wrapper


def within(name: str, original: Callable, context: Callable) -> Callable:
    """The replacement of `original` that runs it inside the context manager `context` makes of its arguments."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not switch.is_enabled():
            return original(*args, **kwargs)
        with context(*args, **kwargs):
            return original(*args, **kwargs)

    setattr(wrapper, MARK, True)
    return wrapper


def transform() -> str:
    """Tracing, torch.func and forward-mode differentiation have no rule for our operators."""
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return "SF115"
    return "" if torch._C._functorch.peek_interpreter_stack() is None else "SF115"


def tensor(x: Any) -> str:
    """x is a plain dense tensor with a kernel for its dtype and its device."""
    if type(x) not in PLAIN:
        return "SF107"
    if x.layout != torch.strided or x.is_nested:
        return "SF105"
    if x.dtype not in registry.KERNEL_DTYPES:
        return "SF102"
    if x.numel() == 0:
        return "SF107"
    return device(x.device.type)


def device(kind: str) -> str:
    if kind not in HAS_KERNELS:
        return "SF103"
    return "" if HAS_KERNELS[kind] or _forced() else "SF112"


def _forced() -> bool:
    """Whether the user has asked for a backend by name; then there is nothing to decide."""
    return not torch.compiler.is_compiling() and registry.forced_backend() is not None


def half_under_autocast(x: Tensor) -> str:
    """On CUDA, PyTorch's reductions then return float32."""
    if x.dtype in HALF and x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return "SF116"
    return ""
