"""Fails where a patched call is slower with sentfast than without: `make never-slower`, and a short form for CI.

Each cell is one call, timed in one process with sentfast on and off by turns. With one thread what counts is time of
the CPU, else wall time. A cell fails when the upper quartile of its ratios is under 0.95 and it is more than two
microseconds slower, by medians and by the best times, in each of three tries. Every instruction set that this CPU has
is forced in a process of its own, in which stock's libraries are held to the same one. The scalar kernels are left out:
where they are the best, the original runs.

--crowded looks for cliffs instead: cells of the short form where there are more threads than cores, or where another
program takes a core. Wall time counts there, with the bounds of the short form.

The short form (--quick) takes a few cells and counts what nobody can miss, on machines that others use too: a ratio
under 0.7 and ten microseconds, of the medians and of the best times, in each of three tries.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import commit, describe, slug, versions
from never_slower_cells import Call, Cell, cells, handed_over
from timing import switch, turns

import sentfast

LEAST, QUICK_LEAST = 0.95, 0.7
NOTICEABLE, QUICK_NOTICEABLE = 2e-6, 1e-5  # seconds
SAMPLE = 1e-3  # seconds; shorter calls are repeated
# Samples in a row, of which the best counts: a machine that others use changes its speed from one to the next.
BURST = 5
# After a switch, which nobody does between two calls, the first call looks at the original anew and tries it, for
# milliseconds, and Python makes its code fast in the next ones.
WARM, LONG = 20, 20e-3  # calls; seconds
SECONDS, QUICK_SECONDS = 0.2, 0.2  # of a cell, both sides together
ROUNDS, MOST_ROUNDS = 5, 60
TRIES = 3
SIDES = {"sentfast": True, "stock": False}
# Circumstance -> threads for each core, share of the cores that the process may use, programs beside it.
CROWDED = {
    "two threads for each core": (2, 1.0, 0),
    "half the cores, and as many threads as all have": (1, 0.5, 0),
    "another program on one core": (1, 1.0, 1),
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
# What holds stock's libraries to another instruction set than the one that runs here by itself: MKL, PyTorch's own
# kernels, oneDNN. With that one they take what they like, which is more than it where the CPU has AMX.
_HELD = {
    "avx2": ("AVX2", "avx2", "AVX2"),
    "avx512": ("AVX512", "avx512", "AVX512_CORE"),
    "avx512_vnni": ("AVX512", "avx512", "AVX512_CORE_VNNI"),
    "avx512_bf16": ("AVX512", "avx512", "AVX512_CORE_BF16"),
}


def times(call: Call, clock: Callable[[], float], seconds: float) -> dict[str, list[float]]:
    """Seconds of the call on both sides, by turns."""
    repeats, once = {}, {}
    for name, on in SIDES.items():
        switch(on)
        for _ in range(2):
            start = clock()
            call()
            once[name] = clock() - start
        repeats[name] = max(1, int(SAMPLE / max(once[name], 1e-7)))
    burst = BURST if max(once.values()) < LONG else 1
    samples: dict[str, list[float]] = {name: [] for name in SIDES}
    end = time.perf_counter() + seconds
    for number, name in turns(list(SIDES), MOST_ROUNDS):
        if number >= ROUNDS and time.perf_counter() > end and len({*map(len, samples.values())}) == 1:
            break
        switch(SIDES[name])
        for _ in range(min(repeats[name], WARM)):
            call()
        best = math.inf
        for _ in range(burst):
            start = clock()
            for _ in range(repeats[name]):
                call()
            best = min(best, clock() - start)
        samples[name].append(best / repeats[name])
    switch(True)
    return samples


def row_of(samples: dict[str, list[float]], quick: bool = False) -> dict[str, Any]:
    ratios = [stock / max(ours, 1e-9) for ours, stock in zip(samples["sentfast"], samples["stock"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = {name: statistics.median(taken) for name, taken in samples.items()}
    best = {name: min(taken) for name, taken in samples.items()}
    slower = [found["sentfast"] - found["stock"] for found in (seconds, best)]
    bound = max(middle, best["stock"] / max(best["sentfast"], 1e-9)) < QUICK_LEAST if quick else high < LEAST
    fails = bound and min(slower) > (QUICK_NOTICEABLE if quick else NOTICEABLE)
    return {"seconds": seconds, "ratio": middle, "spread": [low, high], "rounds": len(ratios), "fails": fails}


def measure(cell: Cell, quick: bool = False, threads: int = 1) -> dict[str, Any]:
    """A cell that fails is measured again before it counts. reasons: why the original ran, where it did."""
    call, row = cell.make(), {}
    sentfast.report(reset=True)
    call()
    reasons = sorted({code for site, code in sentfast.report().fallbacks if site == cell.site})
    clock = time.process_time if threads == 1 else time.perf_counter
    for attempt in range(TRIES):
        row = row_of(times(call, clock, QUICK_SECONDS if quick else SECONDS), quick)
        row |= {"function": cell.function, "tries": attempt + 1, "reasons": reasons}
        if not row["fails"]:
            break
    return row


def deciding() -> dict[str, dict[str, Any]]:
    """What it costs to hand a small call to the original, for each function that has a rule."""
    rows = {}
    for name, (patched, original, operands) in handed_over().items():
        best = [1.0, 1.0]
        for _ in range(200):
            for side, function in enumerate((patched, original)):
                start = time.process_time()
                for _ in range(200):
                    function(*operands)
                best[side] = min(best[side], (time.process_time() - start) / 200)
        seconds = best[0] - best[1]
        rows[f"deciding, {name}"] = {"function": name, "deciding": seconds, "fails": seconds > NOTICEABLE}
    return rows


def words(name: str, row: dict[str, Any]) -> str:
    mark = "FAILS  " if row["fails"] else ""
    if "deciding" in row:
        return f"{mark}{name}: {row['deciding'] * 1e6:.2f} us"
    ours, stock = (row["seconds"][side] * 1e6 for side in SIDES)
    spread = "{:.2f} to {:.2f}".format(*row["spread"])
    original = f"  {', '.join(row['reasons'])}" if row["reasons"] else ""
    return f"{mark}{name}: {ours:,.1f} us, stock {stock:,.1f} us, {row['ratio']:.2f}x ({spread}){original}"


def run(chosen: Sequence[Cell], quick: bool, threads: int) -> dict[str, dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = {}
    try:
        for cell in chosen:
            name = f"{cell.name}, {threads} thread{'s' if threads > 1 else ''}"
            rows[name] = measure(cell, quick, threads)
            print(words(name, rows[name]), flush=True)
    finally:
        torch.set_num_threads(before)
    return rows


def keep_freed_memory() -> None:
    """Where a result's memory goes back to the system after each call hangs on what lies beside it, not on the call."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_TRIM_THRESHOLD, 1 << 30)
        library.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most that it takes


def run_here(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The cells in this process, with the kernels that it has."""
    keep_freed_memory()
    chosen = [cell for cell in cells(options.seed) if cell.quick or not options.quick]
    chosen = [cell for cell in chosen if not options.only or any(part in cell.name for part in options.only)]
    rows: dict[str, dict[str, Any]] = {}
    for count in options.threads:
        rows |= run(chosen, options.quick, count)
    if not options.quick and not options.only:
        rows |= deciding()
    return rows


def run_tiers(options: argparse.Namespace, tiers: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells by instruction set, each in a process of its own."""
    found = {}
    for tier in tiers:
        print(f"# {tier}", flush=True)
        held: dict[str, str] = {}
        if tier != sentfast.cpu_isa():
            held = dict(zip(("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"), _HELD[tier], strict=True))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            threads = map(str, options.threads)
            command = [sys.executable, __file__, *options.only, "--here", "--output", str(path), "--threads", *threads]
            command += ["--seed", str(options.seed)]
            subprocess.run(command, env={**os.environ, **held, "SENTFAST_CPU_ISA": tier}, check=False)
            found[tier] = json.loads(path.read_text())
    return found


def run_crowded(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells of the short form by circumstance, each in a process of its own."""
    cores, found = sorted(os.sched_getaffinity(0)), {}
    for name, (per_core, share, programs) in CROWDED.items():
        print(f"# {name}", flush=True)
        threads, usable = str(len(cores) * per_core), cores[: max(1, int(len(cores) * share))]
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.json"
                command = [sys.executable, __file__, *options.only, "--quick", "--output", str(path)]
                command += ["--threads", threads]
                environment = {**os.environ, "OMP_NUM_THREADS": threads}
                # What the child inherits: it must not know of the other cores when its libraries are opened.
                os.sched_setaffinity(0, usable)
                subprocess.run(command, env=environment, check=False)
                found[name] = json.loads(path.read_text())
        finally:
            os.sched_setaffinity(0, cores)
            for other in others:
                other.kill()
                other.wait()
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("only", nargs="*", help="cells whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="the short form: less than a minute, wide bounds")
    parser.add_argument("--crowded", action="store_true", help="the short form, with more work than cores")
    parser.add_argument("--threads", type=int, nargs="*", default=[1], help="default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes that are drawn")
    parser.add_argument("--tiers", nargs="*", help="instruction sets to force; default all but scalar")
    parser.add_argument("--here", action="store_true", help="in this process, with its kernels; what --tiers runs")
    parser.add_argument("--output", type=Path, help="write here instead of results/<machine>-never-slower.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.quick or options.here:
        rows = run_here(options)
        if options.output:
            options.output.write_text(json.dumps(rows))
    elif options.crowded:
        found = run_crowded(options)
        rows = {f"{name}: {cell}": row for name, part in found.items() for cell, row in part.items()}
        if options.output:
            options.output.write_text(json.dumps(found))
    else:
        tiers = options.tiers or [isa for isa in sentfast.supported_cpu_isas() if isa != "scalar"]
        found = run_tiers(options, tiers)
        rows = {f"{tier}: {name}": row for tier, part in found.items() for name, row in part.items()}
        if options.output or not options.only:
            machine = describe(torch.device("cpu"), max(options.threads))
            content = {"machine": machine, "versions": versions(), **commit(), "tiers": found}
            path = options.output or Path(__file__).parent / "results" / f"{slug(machine)}-never-slower.json"
            path.write_text(json.dumps(content, indent=1) + "\n")
    failing = [name for name, row in rows.items() if row["fails"]]
    print(f"{len(rows)} cells, {len(failing)} slower than stock")
    for name in failing:
        print(words(name, rows[name]))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
