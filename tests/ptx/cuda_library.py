"""csrc/cuda on CPU tensors: its own launch code, its kernels as PTX in the interpreter.

The process must have been started with LD_PRELOAD=build/ptx/cuda-<architecture>/liballocations.so, which knows where
tensors end.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from typing import Any

import torch

from . import build, settings


def install(architecture: str) -> None:
    """From now on the backend "cuda" runs on CPU tensors."""
    from sentfast import native, registry

    folder = build.cuda(architecture)
    if str(folder / "liballocations.so") not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(f"start Python with LD_PRELOAD={folder / 'liballocations.so'}")
    import sentfast.functional  # noqa: F401  (defines the operators)

    torch.ops.load_library(str(folder / "_cuda.so"))
    runtime = ctypes.CDLL(str(folder / "libruntime.so"))
    runtime.ptx_runtime_configure(settings.moment(), settings.seed())
    native.state.cuda = True
    real = registry.Op.why_not

    def why_not(self: registry.Op, backend: str, x: torch.Tensor, *rest: Any) -> str:
        if backend != "cuda" or not x.is_cpu:
            return real(self, backend, x, *rest)
        if x.dtype not in registry.KERNEL_DTYPES:
            return f"no kernel for {x.dtype}"
        name = (self.forward or self).cuda.name()
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            return "no CUDA kernel"
        return self.cuda_refuses(x, *rest) if self.cuda_refuses is not None and rest else ""

    registry.Op.why_not = why_not  # type: ignore[method-assign]
    if settings.log():
        atexit.register(write_log, runtime, str(settings.log()))


def write_log(runtime: ctypes.CDLL, folder: str) -> None:
    """Which kernels this process has launched, for coverage.py."""
    runtime.ptx_runtime_launched.restype = ctypes.c_char_p
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"cuda-{os.getpid()}"), "wb") as file:
        file.write(runtime.ptx_runtime_launched())
