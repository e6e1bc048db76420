"""Loads what is compiled: the CPU library, the CUDA library, the Triton kernels; and says why one is missing.

``setup.py`` writes ``_build.json`` beside the libraries, and into each the number of the sources that it was compiled
from. Both are read before a library is opened, so one that does not fit the running Python, PyTorch or this package is
never loaded: it costs one message and the package runs on PyTorch code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sentfast import install
from sentfast.report import warn

_FOLDER = Path(__file__).parent
_NOTE = "_build.json"
_SYMBOL = re.compile(r"undefined symbol: (\w+)|symbol not found[^']*'(\w+)'", re.IGNORECASE)


@functools.cache
def build_info() -> dict[str, Any]:
    """What the libraries were built with: see :func:`install.note`."""
    return install.note(_FOLDER)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def why_unfit(info: dict[str, Any]) -> str:
    """Why a library built as `info` says must not be opened here; empty if it may."""
    if not info:
        return "the package was installed without compiled libraries"
    if "failed" in info:
        return f"the libraries were not compiled when the package was installed: {info['failed']}"
    if "damaged" in info:
        return f"the note of its build, {_FOLDER / _NOTE}, cannot be read: {info['damaged']}"
    if info["ext_suffix"] != sysconfig.get_config_var("EXT_SUFFIX"):
        return f"built for Python {info['python']}, this is {sys.version.split()[0]}"
    if _torch_version() < tuple(info["torch_target"]):
        target = ".".join(map(str, info["torch_target"]))
        return f"built for PyTorch {target} or newer, this is {torch.__version__}"
    return ""


def why_stale(info: dict[str, Any], library: Path) -> str:
    """Why a library is not the one that these sources make; empty if it is. An installed package has no sources.

    What it takes and gives may be another then, and even where it is not, its results are those of other sources.
    """
    root = install.clone()
    if not library.exists():
        return f"{library} is not there"
    number = info.get("sources", "")
    if root is not None and number != install.sources(root / "csrc"):
        return f"it was compiled from another state of the sources than {root / 'csrc'} has now"
    return "" if number and install.marked(library, number) else f"{library} is not the one that {_NOTE} is about"


@dataclass
class State:
    """What was opened, and why something was not."""

    cpu: ModuleType | None = None
    cpu_problem: str = ""
    cpu_isas: tuple[str, ...] = ()  # that this CPU can run, plainest first
    cuda: bool = False
    cuda_problem: str = ""
    # What the CPU's kernels are trusted with unless a backend is asked for: see scope().
    structure: bool = False
    products: bool = False


state = State()


def scope(isa: str, asked: bool) -> tuple[bool, bool]:
    """(structure, products): what the kernels of an instruction set run where nobody has asked for a backend.

    Structure: what is faster because it does less, as pooling without padding or search without a matrix of scores.
    Products: what is faster only if its matrix products keep up with those of PyTorch's library. On Arm nobody has
    measured that, and the scalar kernels are there to be right. Who sets the instruction set gets all of it.
    """
    if asked or isa.startswith("avx"):
        return True, True
    return isa.startswith("neon"), False


def _trust(asked: bool) -> None:
    assert state.cpu is not None
    state.structure, state.products = scope(state.cpu.isa(), asked)


def _load_cpu() -> None:
    info = build_info()
    state.cpu_problem = why_unfit(info) or why_stale(info, _FOLDER / f"_C{info['ext_suffix']}")
    if not state.cpu_problem:
        try:
            state.cpu = importlib.import_module("sentfast._C")
            state.cpu_isas = tuple(state.cpu.supported_isas())
            _trust(asked=bool(os.environ.get("SENTFAST_CPU_ISA")))
        except ImportError as error:
            # The library refuses a SENTFAST_CPU_ISA that it cannot obey: the user's mistake, not a broken library.
            if str(error).startswith("cpu_isa: "):
                raise ValueError(f"SENTFAST_CPU_ISA: {str(error).removeprefix('cpu_isa: ')}") from error
            state.cpu_problem = why_not_loaded(str(error))
    if not state.cpu_problem:
        return
    if built():
        warn(f"the compiled library is not used: {state.cpu_problem}. Mend it with: {install.remedy()}")
    else:
        warn(f"no kernels, so on the CPU everything runs at stock speed: {state.cpu_problem}. {advice()}")


def built() -> bool:
    """Whether libraries were compiled for this package."""
    return bool(build_info()) and "failed" not in build_info()


def why_not_loaded(error: str) -> str:
    """The error of the dynamic linker, with the missing symbol by name where that is what it is about."""
    found = _SYMBOL.search(error)
    if found is None:
        return f"it did not load: {error}"
    name = found.group(1) or found.group(2)
    wanted, here = build_info().get("torch", "another version"), torch.__version__
    return f"it did not load: symbol {name} is missing; built with PyTorch {wanted}, this is {here} ({error})"


def advice() -> str:
    """How to get kernels where there are none yet."""
    if install.compiler() or install.shadowed() is not None:
        return f"Get them with: {install.remedy()}"
    return f"Install a C++ compiler (g++ or clang++), then get them with: {install.remedy()}"


def _load_cuda() -> None:
    path = _FOLDER / "_cuda.so"
    if torch.version.cuda is None:
        state.cuda_problem = f"this PyTorch ({torch.__version__}) has no CUDA"
    elif not build_info().get("cuda"):
        state.cuda_problem = "the package was built without nvcc"
    elif state.cpu_problem:
        state.cuda_problem = state.cpu_problem
    else:
        state.cuda_problem = why_stale(build_info(), path)
        try:
            if not state.cuda_problem:
                torch.ops.load_library(str(path))
        except OSError as error:
            state.cuda_problem = why_not_loaded(str(error))
        state.cuda = not state.cuda_problem
        if state.cuda_problem:
            warn(f"the compiled CUDA library is not used: {state.cuda_problem}. Mend it with: {install.remedy()}")


def load() -> None:
    """Opens the libraries. Called once, after every operator is defined: a library fills the table in."""
    _load_cpu()
    _load_cuda()


def cpu_loaded() -> bool:
    return state.cpu is not None


def why_no_cpu() -> str:
    return "" if cpu_loaded() else f"no compiled CPU library: {state.cpu_problem}"


def why_no_cuda() -> str:
    return "" if state.cuda else f"no compiled CUDA library: {state.cuda_problem}"


def why_no_triton(device: str) -> str:
    """Why Triton kernels cannot run on tensors of `device`; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda" or (device == "cpu" and interpreted):
        return ""
    return f"Triton does not run on {device}" + ("" if interpreted else " (TRITON_INTERPRET=1 does, slowly)")


@functools.cache
def load_triton() -> None:
    """Imports the Triton kernels, which enter themselves into the table."""
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("sentfast.kernels.pooling")
        importlib.import_module("sentfast.kernels.similarity")
        importlib.import_module("sentfast.kernels.pairwise")
        importlib.import_module("sentfast.kernels.losses")
        importlib.import_module("sentfast.kernels.dropout")
        importlib.import_module("sentfast.kernels.layers")
        importlib.import_module("sentfast.kernels.activation")
        importlib.import_module("sentfast.kernels.rotary")
        importlib.import_module("sentfast.kernels.linear")
        importlib.import_module("sentfast.kernels.attention")
        importlib.import_module("sentfast.kernels.attention_backward")
        importlib.import_module("sentfast.kernels.search")


def isa() -> str:
    """The instruction set of the CPU kernels in use, "" where there are none."""
    return "" if state.cpu is None else state.cpu.isa()


def cpu_isa(name: str | None = None) -> str:
    """The instruction set of the compiled CPU kernels: reads it, or sets it for the process.

    name: "scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_dot" or "neon_bf16"; one that this CPU
    lacks is a ValueError. ``SENTFAST_CPU_ISA`` sets it at start.
    """
    if state.cpu is None:
        raise RuntimeError(f"cpu_isa: {why_no_cpu()}. {advice()}")
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"cpu_isa: expected the name of an instruction set, got {type(name).__name__}")
        state.cpu.set_isa(name)
        _trust(asked=True)
    return isa()


def supported_cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, plainest first."""
    return state.cpu_isas
