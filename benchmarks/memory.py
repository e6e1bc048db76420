"""Peak extra memory of one call, output included, measured in a process of its own.

python benchmarks/memory.py WORKLOAD VARIANT [--shrink N] [--threads N] [--device cpu|cuda]   prints bytes
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")


def status_bytes(field: str) -> int:
    """A size of this process by its name in /proc: VmRSS is what it holds now, VmHWM what it held at most."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in {_STATUS}")


def reset_peak() -> bool:
    """Sets the kernel's high-water mark of this process to what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def held() -> int:
    """Bytes that this process holds now, less what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status_bytes("VmRSS")


def peak_extra(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which the process grows at most while `call` runs, what it returns included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = held()
    resettable = reset_peak()
    output = call()
    peak = status_bytes("VmHWM") if resettable else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del output
    return peak - before


def in_fresh_process(workload: str, variant: str, shrink: int, threads: int, device: torch.device) -> int:
    """:func:`peak_extra` of one variant, measured by a new interpreter."""
    command = [sys.executable, __file__, workload, variant, "--shrink", str(shrink)]
    command += ["--threads", str(threads), "--device", device.type]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("variant")
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    from timing import run_once
    from workloads import WORKLOADS

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    workload = next(w for w in WORKLOADS if w.name == arguments.workload)
    variant = workload.variants()[arguments.variant]
    # Libraries and threads take their own memory on the first call; the tiny inputs let them.
    run_once(variant, workload.make(device, workload.tiny, 0))
    inputs = workload.make(device, arguments.shrink, 0)
    print(peak_extra(lambda: run_once(variant, inputs), device))


if __name__ == "__main__":
    main()
