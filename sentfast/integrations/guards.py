"""Which calls the operators take. A reason code ("" for none) hands the call to the original code."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

import sentfast.ops  # noqa: F401  defines the operators and opens the libraries
from sentfast import native, private, registry
from sentfast.integrations import gain, trampolines
from sentfast.report import fallback, reasons
from sentfast.switch import is_enabled, run_original

PLAIN = (Tensor, Parameter)
_MARK = "__sentfast__"
HALF = (torch.bfloat16, torch.float16)

STRIDED = torch.strided
KERNEL_DTYPES = registry.KERNEL_DTYPES
_STATE = native.state

# Fixed once the libraries are open.
HAS_KERNELS = {
    "cpu": native.cpu_loaded(),
    "cuda": not native.why_no_cuda() or not native.why_no_triton("cuda"),
}


def mark(function: Any) -> None:
    """Says that a function is ours."""
    setattr(function, _MARK, function.__code__)


def ours(function: Any) -> bool:
    """Whether a function is ours. One that somebody has put around it by ``functools.wraps`` has its marks, and other
    code."""
    return type(function) is types.FunctionType and vars(function).get(_MARK) is function.__code__


def accelerated(name: str, original: Callable, attempt: Callable) -> Callable:
    """The replacement of `original`: `attempt` returns the result, or the reason code why the original has to run.

    What a rule of ``gain.py`` finds too small is not attempted: handing it over has to cost next to nothing.
    """

    def compiled(*args: Any, **kwargs: Any) -> Any:
        # Neither counters nor the context reach into a compiled graph.
        result = "SF115" if torch.compiler.is_exporting() else attempt(*args, **kwargs)
        return original(*args, **kwargs) if isinstance(result, str) else result

    return _replacement(name, original, attempt, compiled, switch_off=name not in gain.LEAVES)


def accelerated_loop(name: str, original: Callable, attempt: Callable) -> Callable:
    """As :func:`accelerated`, for an original whose parts are patched too: they stay so when it has to run."""
    return _replacement(name, original, attempt, original, switch_off=False)


def _replacement(name: str, original: Callable, attempt: Callable, compiled: Callable, *, switch_off: bool) -> Callable:
    """compiled: what runs inside ``torch.compile``; switch_off: what the original calls in turn is unpatched too."""
    small = gain.RULES.get(name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return compiled(*args, **kwargs)
        if not is_enabled():
            return original(*args, **kwargs)
        result = transform() or attempt(*args, **kwargs)
        if not isinstance(result, str):
            return result
        fallback(name, result)
        return run_original(original, *args, **kwargs) if switch_off else original(*args, **kwargs)

    mark(wrapper)
    return wrapper if small is None else _gate(name, original, wrapper)


def _gate(name: str, original: Callable, wrapper: Callable) -> Callable:
    """What the rule finds too small does not even reach the wrapper. Parts of the original stay patched: to go through
    them unpatched takes longer."""
    names = {
        "is_compiling": torch.compiler.is_dynamo_compiling,
        "is_tracing": private.is_tracing,
        "modes": private.function_modes,
        "is_enabled": is_enabled,
        "small": gain.RULES[name],
        "counts": reasons(name),
        "first": functools.partial(fallback, name, gain.TOO_SMALL),
        "TOO_SMALL": gain.TOO_SMALL,
        "original": original,
        "others": wrapper,
    }
    arguments = inspect.signature(original).parameters
    gate = functools.wraps(original)(trampolines.gate(name, ", ".join(arguments), names))
    mark(gate)
    return gate


def with_original(name: str, original: Callable, attempt: Callable) -> Callable:
    """As :func:`accelerated_loop`, for an attempt that is given the function's name and the original too."""
    return accelerated_loop(name, original, functools.partial(attempt, name, original))


def rewritten(name: str, original: Callable, rewrite: Callable) -> Callable:
    """The replacement of `original` that runs it with the arguments that `rewrite` makes of its own."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not is_enabled():
            return original(*args, **kwargs)
        return original(*rewrite(*args, **kwargs))

    mark(wrapper)
    return wrapper


def within(name: str, original: Callable, context: Callable) -> Callable:
    """The replacement of `original` that runs it inside the context manager `context` makes of its arguments."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not is_enabled():
            return original(*args, **kwargs)
        with context(*args, **kwargs):
            return original(*args, **kwargs)

    mark(wrapper)
    return wrapper


def transform() -> str:
    """Tracing, torch.func and forward-mode differentiation have no rule for our operators.

    Nor has a mode that sees every operator, to record or to count them: what runs between ours it does not see.
    """
    if private.is_tracing() or private.special_trace():
        return "SF115"
    if private.dispatch_modes() or (private.function_modes() and _function_mode()):
        return "SF115"
    return "" if private.functorch_level() is None else "SF115"


def _function_mode() -> bool:
    """A ``TorchFunctionMode`` may give a function of PyTorch another result; that of ``torch.device`` does not."""
    stack = map(private.function_mode_at, range(private.function_modes()))
    return any(type(mode) is not private.DeviceContext for mode in stack)


def tensor(x: Any) -> str:
    """x is a plain dense tensor with a kernel for its dtype and its device."""
    if type(x) is not Tensor and type(x) is not Parameter:
        return "SF107"
    if x.layout is not STRIDED or x.is_nested:
        return "SF105"
    if x.dtype not in KERNEL_DTYPES:
        return "SF102"
    if not x.numel():
        return "SF107"
    if x.is_cpu and _STATE.structure and HAS_KERNELS["cpu"]:
        return ""  # the name of a device takes half a microsecond
    return device(x.device.type)


def device(kind: str) -> str:
    if kind not in HAS_KERNELS:
        return "SF103"
    if forced():
        return ""
    if not HAS_KERNELS[kind]:
        return "SF112"
    return "" if kind != "cpu" or _STATE.structure else "SF131"


def products(kind: str) -> str:
    """As :func:`device`, for what is faster only if the matrix products are."""
    return device(kind) or tensor_cores(kind) or ("" if kind != "cpu" or _STATE.products or forced() else "SF131")


def tensor_cores(kind: str) -> str:
    """The kernels with matrix products are made for GPUs from sm_80 on; on older ones they keep 7 to 10 KB a thread in
    memory, as they have no tensor cores for these types and no asynchronous copies."""
    return "SF133" if kind == "cuda" and capability() < (8, 0) and not forced() else ""


@functools.cache
def capability() -> tuple[int, int]:
    """The lowest compute capability of this machine's GPUs."""
    return min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())), default=(0, 0))


def forced() -> bool:
    """Whether the user has asked for a backend by name; then there is nothing to decide."""
    return not is_compiling() and registry.forced_backend() is not None


def half_under_autocast(x: Tensor) -> str:
    """On CUDA, PyTorch's reductions then return float32."""
    if not x.is_cpu and x.dtype in HALF and x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return "SF116"
    return ""
