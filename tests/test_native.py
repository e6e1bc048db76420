"""The CPU kernels in a program of their own, under the sanitizers that Python and PyTorch do not allow."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Calls instead of code in line for each access: the kernels are unrolled, and would take minutes to compile.
CALLS = "--param asan-instrumentation-with-call-threshold=0"
SANITIZERS = {
    "memory": f"-fsanitize=address,undefined -fno-sanitize-recover=all {CALLS}",
    "threads": "-fsanitize=thread",
}


def tier_flags() -> dict[str, str]:
    """The instruction set flags of setup.py, so that both build the same code."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["TIERS"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the tiers are x86-64 instruction sets")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed for these tests"
    common = [compiler, "-std=c++17", "-g1", "-Wno-psabi", *SANITIZERS[sanitizer].split()]
    sources = {ROOT / "csrc" / "cpu" / f"tier_{tier}.cpp": flags for tier, flags in tier_flags().items()}
    sources |= {ROOT / "csrc" / "cpu" / f"{name}.cpp": "" for name in ("isa", "wordpiece")}
    sources[ROOT / "tests" / "native" / "main.cpp"] = ""
    objects, running = [], []
    for source, flags in sources.items():
        objects.append(str(tmp_path / f"{source.stem}.o"))
        running.append(subprocess.Popen([*common, *flags.split(), "-O1", "-w", "-c", str(source), "-o", objects[-1]]))
        if len(running) == 2:
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    program = str(tmp_path / "check")
    subprocess.run([*common, *objects, "-o", program, "-pthread"], check=True)
    done = subprocess.run([program, "8"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failed" in done.stdout
