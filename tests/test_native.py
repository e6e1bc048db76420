"""The CPU kernels in a program of their own, under the sanitizers that Python and PyTorch do not allow."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import NEEDED, ROOT, build, emulated_flags, features_here, tier_flags

# Calls instead of code in line for each access: the kernels are unrolled, and would take minutes to compile.
CALLS = "--param asan-instrumentation-with-call-threshold=0"
SANITIZERS = {
    "memory": f"-fsanitize=address,undefined -fno-sanitize-recover=all {CALLS}",
    "threads": "-fsanitize=thread",
}


def same_emulated() -> list[str]:
    """The tier that is the code of avx512 once its own instruction is emulated with those of avx512."""
    emulated = emulated_flags(tier_flags(), features_here())
    return ["avx512_vnni"] if {"avx512", "avx512_vnni"} <= emulated.keys() else []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the tiers are x86-64 instruction sets")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    assert shutil.which(compiler), f"{compiler} is needed for these tests"
    # Threads are the same in every tier.
    program = build("main", SANITIZERS[sanitizer], tmp_path, compiler, emulate=sanitizer == "memory")
    done = subprocess.run([program, "8", *same_emulated()], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " 0 failed" in done.stdout
    if sanitizer == "memory":
        wanted = set(tier_flags()).difference(same_emulated())
        missing = [tier for tier in wanted if f"{tier} done" not in done.stdout]
        assert not missing, f"not run, and not emulated either, which takes AVX2: {missing}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the tiers are x86-64 instruction sets")
@pytest.mark.parametrize("tier", [tier for tier, feature in NEEDED.items() if feature in features_here()])
def test_the_emulation_has_every_instruction(tier: str, tmp_path: Path) -> None:
    """Where the CPU has them itself, nothing else compiles the emulation."""
    source = ROOT / "csrc" / "cpu" / f"tier_{tier}.cpp"
    options = emulated_flags(tier_flags(), frozenset({"avx2"}))[tier].split()
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wno-psabi", *options, "-O1", "-w", "-c", str(source)]
    assert subprocess.run([*command, "-o", str(tmp_path / "tier.o")]).returncode == 0
