"""Loads what is compiled: the CPU library, the CUDA library, the Triton kernels; and says why one is missing.

``setup.py`` writes ``_build.json`` beside the libraries. It is read before a library is opened, so one that does not
fit the running Python or PyTorch is never loaded: it costs one message and the package runs on PyTorch code.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sentfast.report import logger

_FOLDER = Path(__file__).parent
MEND = "pip install --no-build-isolation --force-reinstall --no-deps sentfast"


@functools.cache
def build_info() -> dict[str, Any]:
    """What the libraries were built with; empty if none were."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def why_unfit(info: dict[str, Any]) -> str:
    """Why a library built as `info` says must not be opened here; empty if it may."""
    if not info:
        return "the package was installed without compiled libraries"
    if info["ext_suffix"] != sysconfig.get_config_var("EXT_SUFFIX"):
        return f"built for Python {info['python']}, this is {sys.version.split()[0]}"
    if _torch_version() < tuple(info["torch_target"]):
        target = ".".join(map(str, info["torch_target"]))
        return f"built for PyTorch {target} or newer, this is {torch.__version__}"
    return ""


@dataclass
class State:
    """What was opened, and why something was not."""

    cpu: ModuleType | None = None
    cpu_problem: str = ""
    cuda: bool = False
    cuda_problem: str = ""


state = State()


def _load_cpu() -> None:
    state.cpu_problem = why_unfit(build_info())
    if not state.cpu_problem:
        try:
            state.cpu = importlib.import_module("sentfast._C")
        except ImportError as error:
            # The library refuses a SENTFAST_CPU_ISA that it cannot obey: the user's mistake, not a broken library.
            if str(error).startswith("cpu_isa: "):
                raise ValueError(f"SENTFAST_CPU_ISA: {str(error).removeprefix('cpu_isa: ')}") from error
            state.cpu_problem = f"it did not load: {error}"
    if state.cpu_problem and build_info():
        logger.warning("the compiled library is not used, %s. Mend it with: %s", state.cpu_problem, MEND)


def _load_cuda() -> None:
    path = _FOLDER / "_cuda.so"
    if torch.version.cuda is None:
        state.cuda_problem = f"this PyTorch ({torch.__version__}) has no CUDA"
    elif not build_info().get("cuda"):
        state.cuda_problem = "the package was built without nvcc"
    elif state.cpu_problem:
        state.cuda_problem = state.cpu_problem
    else:
        try:
            torch.ops.load_library(str(path))
            state.cuda = True
        except OSError as error:
            state.cuda_problem = f"it did not load: {error}"
            logger.warning("the compiled CUDA library is not used, %s. Mend it with: %s", state.cuda_problem, MEND)


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
        importlib.import_module("sentfast.kernels.losses")
        importlib.import_module("sentfast.kernels.dropout")
        importlib.import_module("sentfast.kernels.layers")
        importlib.import_module("sentfast.kernels.activation")
        importlib.import_module("sentfast.kernels.rotary")
        importlib.import_module("sentfast.kernels.linear")
        importlib.import_module("sentfast.kernels.attention")
        importlib.import_module("sentfast.kernels.attention_backward")
        importlib.import_module("sentfast.kernels.search")


def cpu_isa(name: str | None = None) -> str:
    """The instruction set of the compiled CPU kernels: reads it, or sets it for the process.

    name: "scalar", "avx2", "avx512", "avx512_vnni" or "avx512_bf16"; one that this CPU lacks is a ValueError.
    ``SENTFAST_CPU_ISA`` sets it at start.
    """
    if state.cpu is None:
        raise RuntimeError(f"cpu_isa: {why_no_cpu()}. {MEND}")
    if name is not None:
        state.cpu.set_isa(name)
    return state.cpu.isa()


def supported_cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, plainest first."""
    return tuple(state.cpu.supported_isas()) if state.cpu is not None else ()
