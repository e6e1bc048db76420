"""Builds the interpreter and, with nvcc, the CUDA library for it, into build/ptx; what is there and new enough stays.

python tests/ptx/build.py [ARCHITECTURE...]    the interpreter, and csrc/cuda for these (such as 80, 90a)
"""

from __future__ import annotations

import fcntl
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "ptx"
SOURCES = (
    *("values", "text", "names", "decoder", "parser", "statistics", "memory", "copies"),
    *("arithmetic", "bits", "conversions", "warp_operations", "tensor_core", "scheduler", "interface"),
)
CUDA_SOURCES = ("pooling", "similarity", "attention")
FLAGS = "-O2 -std=c++17 -mavx2 -mfma -mf16c -fPIC -Wall -Wextra -MMD -MF $out.d -c $in -o $out"


@contextmanager
def alone() -> Iterator[None]:
    """Keeps other processes, such as pytest's workers, from building at the same time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def recipe() -> dict[str, Any]:
    """The functions of setup.py, so that both build the same code in the same way."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="recipe")


def interpreter() -> Path:
    """The library of the interpreter; a build from nothing takes half a minute."""
    setup = recipe()
    cxx = setup["compiler"]("Linux")
    with alone():
        ninja = setup["Ninja"](FOLDER / "interpreter")
        ninja.rule("cxx", f"{cxx} {FLAGS}")
        ninja.rule("link", f"{cxx} -shared $in -o $out")
        objects = [ninja.build("cxx", ninja.folder / f"{name}.o", [HERE / f"{name}.cpp"]) for name in SOURCES]
        library = ninja.build("link", FOLDER / "libptx.so", objects)
        ninja.run()
    return library


def cuda(architecture: str) -> Path:
    """The folder of csrc/cuda on the stand-in for the CUDA runtime, with the PTX of its kernels."""
    setup = recipe()
    torch, cxx = setup["Torch"].find(), setup["compiler"]("Linux")
    library = interpreter()
    with alone():
        ninja = setup["Ninja"](FOLDER / f"cuda-{architecture}")
        ninja.rule("nvcc", nvcc_command(architecture, setup["torch_flags"](torch)))
        ninja.rule("cxx", f"{cxx} {FLAGS}")
        ninja.rule("link", f"{cxx} -shared $in -o $out -ldl $flags")
        folder = ninja.folder
        runtime, allocations = (
            ninja.build("cxx", folder / f"{name}.o", [HERE / f"{name}.cpp"]) for name in ("cuda_runtime", "allocations")
        )
        runtime = ninja.build("link", folder / "libruntime.so", [runtime, library])
        ninja.build("link", folder / "liballocations.so", [allocations])
        objects = [
            ninja.build("nvcc", folder / f"{name}.o", [ROOT / "csrc" / "cuda" / f"{name}.cu"], keep=str(folder / name))
            for name in CUDA_SOURCES
        ]
        # The stand-in comes before PyTorch, so that its functions are found first.
        flags = f"-Wl,--no-as-needed -L{torch.lib} -ltorch_cpu -Wl,-z,now"
        ninja.build("link", folder / "_cuda.so", [*objects, runtime], flags=flags)
        ninja.run()
    return folder


def nvcc_command(architecture: str, flags: str) -> str:
    """Compiles $in to $out and leaves its PTX in $keep. PTX alone: to assemble it is most of a compilation."""
    code = f"-gencode arch=compute_{architecture},code=compute_{architecture}"
    options = f"-O3 -std=c++17 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden --keep --keep-dir $keep {code}"
    return f"mkdir -p $keep && {shutil.which('nvcc')} {options} -MD -MF $out.d -c $in -o $out {flags}"


if __name__ == "__main__":
    interpreter()
    for wanted in sys.argv[1:]:
        cuda(wanted)
