"""What a benchmark ran on: machine, versions, state of the source tree."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers", "numpy", "triton", "sentfast")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> dict[str, Any]:
    """The commit and whether the tree differs from it, the results of benchmarks aside."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed)}


def touch_memory(share: float = 0.8) -> None:
    """Uses that share of the free memory once, then gives it back.

    A hypervisor may hand memory to its guest at the first use of each page, which then costs some hundred times what
    it costs later and would land on whichever variant meets it.
    """
    free = re.search(r"^MemFree:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if free is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    page = 2**21
    size = int(int(free[1]) * 1024 * share) // page * page
    with mmap.mmap(-1, size) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, 4096):
            memory[start] = 1


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_field(name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else ""


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _read(f"{index}/level"), _read(f"{index}/type")
        caches[f"L{level}{'' if kind == 'Unified' else kind[0].lower()}"] = _read(f"{index}/size")
    return caches


def _isa() -> str:
    from sentfast import native

    return native.cpu_isa() if native.cpu_loaded() else "none"


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine, as it stands in a result file. `name` is what a reader calls it."""
    cpu = _cpu_field("model name") or platform.processor() or platform.machine()
    cpu_model = f"family {_cpu_field('cpu family')}, model {_cpu_field('model')}"
    described = {
        "cpu": cpu,
        "cpu_model": cpu_model,
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
        "threads": threads,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
        return {"name": properties.name, **gpu, **described}
    words = "thread" if threads == 1 else "threads"
    # On a virtual machine the name alone is the same for CPUs of which one is twice as fast as the other.
    return {"name": f"{cpu} ({cpu_model}), {threads} {words}", **described, "isa": _isa()}


def slug(described: dict[str, Any]) -> str:
    """Name of the result file: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", described["name"].lower()).strip("-")
