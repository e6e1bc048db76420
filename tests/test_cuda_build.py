"""The CUDA kernels without a GPU: run on the CPU under sanitizers, and compiled for every architecture by nvcc.

Environment: ``SENTFAST_TEST_ARCHS`` (default "80 90a") lists the architectures; ``SENTFAST_TEST_RECORD=1`` writes what
ptxas reports for them into ``benchmarks/results/cuda_resources.json`` instead of comparing it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_shim"
RECORD = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = os.environ.get("SENTFAST_TEST_ARCHS", "80 90a").split()
ALL_ARCHITECTURES = "80 86 89 90a 100 120"
SOURCES = ("pooling", "similarity", "attention")

# Registers and bytes of shared memory by which a kernel may differ from the record.
REGISTER_TOLERANCE = 8
SHARED_TOLERANCE = 256

RENEW = f'SENTFAST_TEST_RECORD=1 SENTFAST_TEST_ARCHS="{ALL_ARCHITECTURES}" python -m pytest tests/test_cuda_build.py'

needs_gcc = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("make") is None, reason="g++ or make is not installed"
)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shim_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("cuda_shim")
    made = run(["make", "-C", str(SHIM), "-j2", f"BUILD={build}", f"{build}/driver", "selftest"])
    assert made.returncode == 0, made.stderr[-4000:]
    return build


@needs_gcc
def test_kernels_on_the_cpu_under_sanitizers(shim_build: Path) -> None:
    done = run([str(shim_build / "driver")])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts["failures"] == 0 and counts["cases"] > 400 and counts["launches"] > 800, counts


@needs_gcc
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no_barrier", "wrong at"),
        ("overrun", "heap-buffer-overflow"),
        ("shared_overrun", "out of bounds|global-buffer-overflow"),
        ("diverge", "threads wait for one another"),
        ("late_wait", "wrong at"),
        ("no_wait", "copies that nobody waits for"),
    ],
)
def test_shim_finds_mistakes(shim_build: Path, mistake: str, message: str) -> None:
    for name in ("correct", "correct_copies"):
        assert run([str(shim_build / "selftest"), name]).returncode == 0
    done = run([str(shim_build / "selftest"), mistake])
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr


def parse_resources(report: str) -> dict[str, dict[str, int]]:
    """What ``ptxas -v`` says of each kernel: registers, shared bytes, stack bytes, spilled bytes."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*Used (\d+) registers(.*)"
    )
    found = pattern.findall(report)
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernel[0] for kernel in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    resources = {}
    for name, (_, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        short = re.sub(r"^void |sentfast::|\(anonymous namespace\)::", "", name)
        shared = re.search(r"(\d+) bytes smem", rest)
        resources[short.partition("(")[0]] = {
            "registers": int(registers),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
        }
    return resources


def compile_resources(architecture: str, folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Compiles every source for one architecture; per source, what its kernels need."""
    flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Xptxas", "-v"]
    include = Path(torch.__file__).parent / "include"
    resources = {}
    for source in SOURCES:
        cubin, path = folder / f"{source}.{architecture}.cubin", ROOT / "csrc" / "cuda" / f"{source}.cu"
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        done = run(["nvcc", *flags, f"-I{include}", target, "-cubin", "-o", str(cubin), str(path)])
        assert done.returncode == 0, done.stderr[-4000:]
        resources[source] = parse_resources(done.stderr + done.stdout)
    return resources


def write_record(architecture: str, resources: dict[str, dict[str, dict[str, int]]]) -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"architectures": {}}
    record["nvcc"] = nvcc_version()
    record["columns"] = ["registers", "shared memory, bytes"]
    record["architectures"][architecture] = {
        source: {kernel: [used["registers"], used["shared"]] for kernel, used in sorted(kernels.items())}
        for source, kernels in resources.items()
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, sort_keys=True)
    RECORD.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")


def nvcc_version() -> str:
    found = re.search(r"release ([\d.]+)", run(["nvcc", "--version"]).stdout)
    return found[1] if found else "unknown"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(architecture: str, tmp_path: Path) -> None:
    resources = compile_resources(architecture, tmp_path)
    for kernels in resources.values():
        assert kernels
        wasteful = {name: used for name, used in kernels.items() if used["spilled"] or used["stack"]}
        assert not wasteful, f"kernels that spill registers on sm_{architecture}: {wasteful}"
    if os.environ.get("SENTFAST_TEST_RECORD") == "1":
        write_record(architecture, resources)
        return
    record = json.loads(RECORD.read_text())
    recorded = record["architectures"][architecture]
    changed = []
    for source, kernels in resources.items():
        assert set(kernels) == set(recorded[source]), f"kernels came or went; renew the record with: {RENEW}"
        for name, used in kernels.items():
            registers, shared = recorded[source][name]
            more_registers, more_shared = used["registers"] - registers, used["shared"] - shared
            if abs(more_registers) > REGISTER_TOLERANCE or abs(more_shared) > SHARED_TOLERANCE:
                changed.append(f"{name}: {more_registers:+} registers, {more_shared:+} bytes of shared memory")
    assert not changed, (
        f"sm_{architecture} differs from the record (nvcc {record['nvcc']}, this is {nvcc_version()}):\n"
        + "\n".join(changed)
        + f"\nIf that is meant, renew the record with: {RENEW}"
    )
