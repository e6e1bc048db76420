"""The native test program on processors that are not here, under qemu: `python tests/emulate.py`, or `make emulate`.

x86-64 processors of three generations must choose the right instruction set and run it without an illegal instruction;
the Arm kernels, cross-compiled, must compute what the definition says. Where qemu or the cross compiler is missing
(`make emulators` installs them), what is not run is named, and the exit status is 0.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="names")
SECONDS = 240  # of one run; a program that hangs must not hang CI

# Architecture -> compiler, tiers, emulator, and its processors with the tier that each must choose. Debian's qemu 7.2
# emulates no AVX-512, so the largest x86-64 processor has AVX2.
TARGETS = {
    "x86_64": (
        os.environ.get("CXX", "g++"),
        SETUP["TIERS"],
        "qemu-x86_64",
        {"Nehalem": "scalar", "Haswell": "avx2", "max": "avx2"},
    ),
    "aarch64": (
        "aarch64-linux-gnu-g++",
        SETUP["ARM_TIERS"],
        "qemu-aarch64",
        {"cortex-a53": "neon", "neoverse-n1": "neon_dot", "max": "neon_bf16"},
    ),
}


def build(compiler: str, tiers: dict[str, str], folder: Path) -> Path:
    """The program, statically linked, so that nothing of the emulated system is needed."""
    sources = {ROOT / "csrc" / "cpu" / f"tier_{tier}.cpp": flags for tier, flags in tiers.items()}
    sources |= {ROOT / "csrc" / "cpu" / "isa.cpp": "", ROOT / "tests" / "native" / "main.cpp": ""}

    def one(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        # The kernels are unrolled: optimising them would take most of the time.
        flags = ["-std=c++17", "-w", *sources[source].split(), "-O0", "-c", str(source), "-o", str(out)]
        subprocess.run([*shlex.split(compiler), *flags], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    program = folder / "check"
    subprocess.run([*shlex.split(compiler), "-static", *map(str, objects), "-o", str(program), "-pthread"], check=True)
    return program


def run(emulator: str, processor: str, expected: str, program: Path) -> str:
    """What is wrong; empty if the processor chose `expected` and every check of it passed."""
    start = time.monotonic()
    command = [emulator, "-cpu", processor, str(program), "1", "best"]
    # qemu warns of parts of a processor that it does not emulate.
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    print(f"{emulator} -cpu {processor}: {last} ({time.monotonic() - start:.0f} s)", flush=True)
    if done.returncode != 0 or not last.startswith(f"{expected}: ") or not last.endswith(" 0 failed"):
        return f"{shlex.join(command)}: expected {expected} without a failure, got {done.returncode}\n" + "\n".join(
            (done.stdout + done.stderr).splitlines()[-20:]
        )
    return ""


def main() -> int:
    wrong = []
    for architecture, (compiler, tiers, emulator, processors) in TARGETS.items():
        missing = [name for name in (shlex.split(compiler)[0], emulator) if shutil.which(name) is None]
        if missing:
            print(f"NOT RUN: {architecture} kernels under qemu, no {' and no '.join(missing)} (make emulators)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            program = build(compiler, tiers, Path(folder))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                wrong += pool.map(lambda item, e=emulator, p=program: run(e, *item, p), processors.items())
    wrong = [text for text in wrong if text]
    print("\n".join(wrong))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
