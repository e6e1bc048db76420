"""What this machine can do at most: memory rates in bytes per second, arithmetic rates in operations per second."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch
from timing import Clock

# name -> (unit, what it is); the tables of the report show these words.
LIMITS = {
    "read": ("B/s", "memory, read"),
    "copy": ("B/s", "memory, copy into an existing tensor"),
    "copy_fresh": ("B/s", "memory, copy into a new tensor"),
    "write_fresh": ("B/s", "memory, write of a new tensor"),
    "peak_float32": ("FLOP/s", "multiply-add peak, float32"),
    "peak_bfloat16": ("FLOP/s", "multiply-add peak, bfloat16"),
    "gemm_float32": ("FLOP/s", "torch.mm, float32"),
    "gemm_bfloat16": ("FLOP/s", "torch.mm, bfloat16"),
}

Limits = dict[str, float | None]


def measure(device: torch.device, threads: int, *, quick: bool = False) -> Limits:
    """Every limit of :data:`LIMITS`, None where it cannot be measured here."""
    clock = Clock(device)
    found: Limits = {**_bandwidths(device, clock, (32 if quick else 512) << 20, 3 if quick else 7)}
    # Large enough to fill it.
    size = 512 if quick else 8192 if device.type == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"peak_{name}"] = peak(name, threads, 0.05 if quick else 0.5) if device.type == "cpu" else None
        found[f"gemm_{name}"] = _gemm(device, clock, dtype, size)
    return found


def better(one: Limits, other: Limits) -> Limits:
    """The higher of two measurements of each limit: a disturbance only ever lowers it."""
    return {name: max((x for x in (one[name], other[name]) if x is not None), default=None) for name in one}


def _best(clock: Clock, call: Callable[[], object], repeats: int) -> float:
    clock.seconds(lambda _: call(), None)
    return min(clock.seconds(lambda _: call(), None) for _ in range(repeats))


def _bandwidths(device: torch.device, clock: Clock, size: int, repeats: int) -> dict[str, float]:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    half = source.view(2, -1)
    readers: list[Callable[[], object]] = [
        source.sum,
        source.amax,
        lambda: torch.dot(half[0], half[1]),
        lambda: torch.linalg.vector_norm(source),
    ]
    writers: list[Callable[[], object]] = [
        lambda: torch.full_like(source, 2.0),
        lambda: torch.empty_like(source).zero_(),
    ]
    return {
        "read": size / min(_best(clock, read, repeats) for read in readers),
        "copy": 2 * size / _best(clock, lambda: target.copy_(source), repeats),
        "copy_fresh": 2 * size / _best(clock, source.clone, repeats),
        "write_fresh": size / min(_best(clock, write, repeats) for write in writers),
    }


def _gemm(device: torch.device, clock: Clock, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(clock, lambda: torch.mm(a, b), 5)


def peak(dtype: str, threads: int, seconds: float) -> float | None:
    """Sum over the threads of the rate of a loop that only multiplies and adds in registers."""
    from sentfast import native

    if not native.cpu_loaded():
        return None
    from sentfast import _C

    if not hasattr(_C, "peak_flops"):
        return None
    rates = [0.0] * threads

    def work(number: int) -> None:
        with contextlib.suppress(ValueError):  # the kernels that run here have no such instruction
            rates[number] = _C.peak_flops(dtype, seconds) * 1e9

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates) or None
