"""Builds a program of the CPU kernels alone, for tests/test_native.py and `make fuzz-native`.

python tests/native_build.py FOLDER    the libFuzzer program of tests/native/fuzz.cpp, with clang++
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the CPU calls the newest instruction set of each tier that it may lack.
NEEDED = {"avx512": "avx512bw", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16"}


def tier_flags() -> dict[str, str]:
    """The instruction set flags of setup.py, so that both build the same code."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["TIERS"]


def features_here() -> frozenset[str]:
    told = Path("/proc/cpuinfo")
    return frozenset(told.read_text().split() if told.exists() else ())


def emulated_flags(flags: dict[str, str], features: frozenset[str]) -> dict[str, str]:
    """Flags of the tiers that a CPU of such features lacks, with their instructions in AVX2 (tests/native/avx512)."""
    if "avx2" not in features:
        return {}
    shim = f"{flags['avx2']} -isystem {ROOT / 'tests' / 'native' / 'avx512'}"
    extra = {"avx512_bf16": " -DSENTFAST_EMULATED_BF16"}
    return {tier: shim + extra.get(tier, "") for tier, feature in NEEDED.items() if feature not in features}


def build(main: str, options: str, folder: Path, compiler: str, emulate: bool) -> str:
    """The program of tests/native/<main>.cpp; returns its path."""
    common = [compiler, "-std=c++17", "-g1", "-Wno-psabi", *options.split()]
    flags = tier_flags()
    emulated = emulated_flags(flags, features_here()) if emulate else {}
    sources = {ROOT / "csrc" / "cpu" / f"tier_{tier}.cpp": emulated.get(tier, flags[tier]) for tier in flags}
    # The program then takes the CPU to have every instruction set.
    sources[ROOT / "csrc" / "cpu" / "isa.cpp"] = "-D__builtin_cpu_supports(feature)=true" if emulated else ""
    sources[ROOT / "tests" / "native" / f"{main}.cpp"] = ""
    objects, running = [], []
    for source, own in sources.items():
        objects.append(str(folder / f"{source.stem}.o"))
        running.append(subprocess.Popen([*common, *own.split(), "-O1", "-w", "-c", str(source), "-o", objects[-1]]))
        if len(running) == 2:
            assert running.pop(0).wait() == 0
    assert all(process.wait() == 0 for process in running)
    program = str(folder / main)
    subprocess.run([*common, *objects, "-o", program, "-pthread"], check=True)
    return program


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    sanitizers = "-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
    print(build("fuzz", sanitizers, target, os.environ.get("CLANG", "clang++"), emulate=True))
