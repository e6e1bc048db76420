"""What we rely on of PyTorch, transformers and sentence-transformers that begins with an underscore, in one place.

It may change with any version. All other modules import it from here.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.library
import torch.nn.modules.module as _module
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C import _DisableAutocast as WithoutAutocast
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel_for
from torch._C import _get_function_stack_at as function_mode_at
from torch._C import _InferenceMode as InferenceMode
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _len_torch_function_stack as function_modes
from torch._C._functorch import peek_interpreter_stack as functorch_level
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.nn.modules.module import _has_any_global_hook as any_global_hook
from torch.utils._device import DeviceContext

__all__ = [
    "AnyDropout",
    "DeviceContext",
    "InferenceMode",
    "WithoutAutocast",
    "amx_tiles",
    "any_global_forward_hook",
    "any_global_hook",
    "dispatch_modes",
    "foreign_kernels",
    "function_mode_at",
    "function_modes",
    "functorch_active",
    "functorch_level",
    "has_kernel_for",
    "is_tracing",
    "keep_at_exit",
    "kernels_of_python",
    "namespace_of",
    "special_trace",
    "to_tensor",
]

# InferenceMode and WithoutAutocast are torch.inference_mode and torch.autocast without Python around them: where a
# signal's exception comes while those begin to end, they never end. The end of InferenceMode also takes back what a
# torch.no_grad inside it has left behind in this way.


def namespace_of(operator: Any) -> str:
    """Of an operator, such as "aten"; "" for what is none."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return operator._qualified_op_name.partition("::")[0]
    if isinstance(operator, torch._ops.OpOverload):
        return operator.namespace
    return operator._namespace if isinstance(operator, torch.library.CustomOpDef) else ""


# Whether the processor has AMX and the operating system lets programs use it; not every version can tell.
amx_tiles: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

# "namespace/operator/dispatch key" of every kernel that is written in Python: one set for the life of a process.
kernels_of_python: set[str] = torch.library._impls
# Of these keys PyTorch itself registers nothing for its own operators.
_KEYS = (
    *("CPU", "Autograd", "AutogradCPU", "AutocastCPU", "CompositeImplicitAutograd", "CompositeExplicitAutograd"),
    *("ADInplaceOrView", "BackendSelect"),
)


def foreign_kernels() -> list[str]:
    """Operators of PyTorch that run other code than PyTorch's."""
    return [name for name in list(kernels_of_python) if name.startswith("aten/") and name.rpartition("/")[2] in _KEYS]


def keep_at_exit(library: torch.library.Library) -> None:
    """Leaves a library's operators registered while a program ends.

    PyTorch takes them back in ``atexit``, and until the interpreter is gone daemon threads and other ``atexit``
    functions still run, which may call them. The finalizer that does so can be had from Python's own list only.
    """
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        found = finalizer.peek()
        if found is not None and found[0] is library:
            finalizer.atexit = False


def to_tensor(module: str) -> Callable[[Any], torch.Tensor]:
    """sentence-transformers' own conversion of lists and arrays, from the module that has it."""
    return importlib.import_module(module)._convert_to_tensor


# One flag in each thread from PyTorch 2.15 on.
_fx_tracing_here: Any = getattr(_symbolic_trace, "_is_fx_tracing_tls", None)


def fx_tracing() -> bool:
    """``torch.fx`` is tracing."""
    if _fx_tracing_here is not None:
        return getattr(_fx_tracing_here, "flag", False)
    return _symbolic_trace._is_fx_tracing_flag


def special_trace() -> bool:
    """``torch.fx`` is tracing, or somebody differentiates forward."""
    return fx_tracing() or forward_ad._current_level >= 0


def any_global_forward_hook() -> bool:
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


# Once here, so that a version without one of these names fails when it is imported, where nothing has been patched yet,
# and not in somebody's call.
special_trace(), any_global_forward_hook()
