"""Runs the operators' own tests on compiled GPU code in the interpreter, and says which kernels they launched.

python tests/ptx/run.py part    what CI runs: every Triton kernel at least once for each, a few drawn calls
python tests/ptx/run.py         all: sm_80 and sm_90, copies and products early and late, and csrc/cuda if nvcc is there
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from ptx import build, settings  # noqa: E402

LOG = build.FOLDER / "launched"
FILES = ("ops", "edges", "attention", "search_ops", "encoder_steps", "loss_prefixes", "gpu_kernels")
ENCODER = ("cuda_encoder", "cuda_encoder_graphs")


@dataclass(frozen=True)
class Run:
    """A run of pytest."""

    what: str  # as SENTFAST_TEST_PTX has it
    moment: str
    files: tuple[str, ...]
    only: str = ""

    def command(self) -> list[str]:
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in self.files]
        chosen = ["-k", self.only] if self.only else []
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "2", *tests, *chosen]

    def environment(self) -> dict[str, str]:
        if not self.what:
            return dict(os.environ)
        backend, architecture = self.what.split("-")
        own = {
            settings.VARIABLE: self.what,
            "SENTFAST_TEST_PTX_MOMENT": self.moment,
            "SENTFAST_TEST_PTX_LOG": str(LOG / self.what),
            "TRITON_CACHE_DIR": str(build.FOLDER / "triton"),
            "OMP_NUM_THREADS": "1",
        }
        if backend == "cuda":
            own["LD_PRELOAD"] = str(build.FOLDER / f"cuda-{architecture}" / "liballocations.so")
        return os.environ | own


SHORT = ("gpu_kernels", "encoder_steps", "search_ops"), "gpu_kernels or bfloat16 or topk and cos"
PART = (
    Run("triton-90", "late", *SHORT),
    Run("triton-90", "late_products", ("gpu_kernels",)),
    Run("triton-80", "early", *SHORT),
)


def all_runs() -> list[Run]:
    triton = [("80", "early"), ("80", "late"), ("90", "early"), ("90", "late"), ("90", "late_products")]
    runs = [Run(f"triton-{capability}", moment, FILES) for capability, moment in triton]
    runs += [Run(f"triton-{capability}", "random", ENCODER, "triton_interpreted") for capability in ("80", "90")]
    if shutil.which("nvcc"):
        files = ("ops", "edges")
        for architecture in ("80", "90"):
            runs += [Run(f"cuda-{architecture}", moment, files) for moment in ("early", "late")]
        # Without the interpreter: the library as it is installed.
        runs.append(Run("", "", ("cuda_library",)))
    return runs


def of_triton() -> set[str]:
    """The names of all Triton kernels, from the sources."""
    pattern = re.compile(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(")
    return {name for path in (ROOT / "kernels").glob("*.py") for name in pattern.findall(path.read_text())}


def of_cuda(architecture: str) -> set[str]:
    found = (build.FOLDER / f"cuda-{architecture}").glob("*/*.ptx")
    return {name for path in found for name in re.findall(r"\.entry (\w+)", path.read_text())}


def launched(what: str) -> set[str]:
    return {name for path in (LOG / what).glob("*") for name in path.read_text().split()}


def missing(runs: Sequence[Run]) -> list[str]:
    """The kernels that no run has launched, by what ran."""
    found = []
    for what in sorted({run.what for run in runs if run.what}):
        backend, architecture = what.split("-")
        everything = of_triton() if backend == "triton" else of_cuda(architecture)
        found += [f"{name} for {what} was not launched" for name in sorted(everything - launched(what))]
    return found


def main(runs: Sequence[Run]) -> int:
    shutil.rmtree(LOG, ignore_errors=True)
    build.interpreter()
    for architecture in sorted({run.what.split("-")[1] for run in runs if run.what.startswith("cuda")}):
        build.cuda(architecture)
    failed = False
    for run in runs:
        print(f"=== {run.what or 'as it is'} {run.moment}", flush=True)
        failed |= subprocess.run(run.command(), env=run.environment(), cwd=ROOT).returncode != 0
    problems = missing(runs)
    print("\n".join(problems) or "every kernel was launched")
    return int(failed or bool(problems))


if __name__ == "__main__":
    sys.exit(main(PART if sys.argv[1:] == ["part"] else all_runs()))
