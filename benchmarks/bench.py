"""Runs the workloads and writes benchmarks/results/<machine>.json, from which report.py renders every table.

python benchmarks/bench.py [--only NAME ...] [--quick]

A full run takes some minutes on an otherwise idle machine. --only takes names with wildcards and keeps the other rows
of the file; --quick shrinks inputs and rounds, prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gate
import limits
import machine
import memory
import torch
from timing import Variant, interleave, ratio, spread, switch
from workload import OURS, Inputs, Workload
from workloads import WORKLOADS

from sentfast.registry import BACKENDS, use_backend

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_SHRINK = 16
BUSY = 0.5  # load average at the start from which a run is worth a warning
SECOND_SET_BYTES = 512 << 20  # larger inputs get one set: they do not fit a cache anyway


def measure(
    workload: Workload,
    device: torch.device,
    backends: set[str],
    *,
    shrink: int = 1,
    budget: float = 5.0,
    rounds: int | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """Checks a workload, then times it. The row of the result file, less what needs the limits.

    Raises:
        gate.Refused: an output is wrong, or another backend ran than one of `backends`.
    """
    variants = workload.variants()
    if not compiled:
        variants = {name: variant for name, variant in variants.items() if name != "torch.compile"}
    inputs = workload.make(device, shrink, 0)
    checked = gate.check(workload, variants, inputs, backends)
    sets = [inputs] if _bytes(inputs) > SECOND_SET_BYTES else [inputs, workload.make(device, shrink, 1)]
    samples = interleave(variants, sets, device, cold=workload.cold, budget=budget, rounds=rounds)
    seconds = {name: spread(taken) for name, taken in samples.items()}
    return {
        "table": workload.table,
        "title": workload.title,
        "shapes": _shapes(inputs),
        "shrink": shrink,
        "rounds": len(samples[OURS]),
        "cold": workload.cold,
        "errors": checked.errors,
        "ran": checked.ran,
        "seconds": seconds,
        "ratios": {name: ratio(samples[name], samples[OURS]) for name in samples if name != OURS},
        "bounds": [name for name, variant in variants.items() if variant.bound],
        "output_bytes": checked.output_bytes,
        "work": workload.work(inputs),
        "load": os.getloadavg()[0],
    }


def _bytes(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, torch.Tensor))


def _shapes(inputs: Inputs) -> dict[str, str]:
    found = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            found[name] = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        elif isinstance(x, list):
            found[name] = f"{len(x)} texts"
    return found


def measure_memory(workload: Workload, variants: dict[str, Variant], shrink: int, device: torch.device) -> dict:
    """Variant -> peak extra bytes, its output included."""
    threads = torch.get_num_threads()
    return {
        name: memory.in_fresh_process(workload.name, name, shrink, threads, device)
        for name, variant in variants.items()
        if not variant.bound and name != "torch.compile"
    }


def against_limits(row: dict[str, Any], found: limits.Limits) -> dict[str, Any] | None:
    """The least time that the machine's limits allow for the row's work, and what fraction of it was reached."""
    if not row["work"]:
        return None
    rates: dict[str, float] = {}
    least = 0.0
    for name, amount in row["work"].items():
        # Without a measured peak the library's GEMM stands in; its name in the row says so.
        used = name if found[name] is not None else name.replace("peak", "gemm")
        rate = found[used]
        if rate is None:
            return None
        rates[used] = rate
        least += amount / rate
    return {"rates": rates, "seconds": least, "fraction": least / row["seconds"][OURS]["median"]}


def judge(workload: Workload, row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """target -> what is wanted, what was measured (None: it could not be), whether it is met."""
    median = row["seconds"][OURS]["median"]
    judged = {}
    for name, wanted in workload.targets.items():
        got: float | None
        if name == "limit":
            got = row["limit"] and row["limit"]["fraction"]
        elif name == "microseconds":
            got = median * 1e6
        elif name == "extra_memory":
            got = row["extra_memory"][OURS] / row["output_bytes"] if row.get("extra_memory") else None
        else:
            got = row["ratios"][name]["median"]
        at_most = name in ("microseconds", "extra_memory")
        met = None if got is None else bool(got <= wanted if at_most else got >= wanted)
        judged[name] = {"wanted": wanted, "got": got, "met": met}
    return judged


def finish(workload: Workload, row: dict[str, Any], found: limits.Limits) -> dict[str, Any]:
    """The row with everything that follows from the machine's limits."""
    row["limit"] = against_limits(row, found)
    row["bytes"] = sum(x for name, x in row["work"].items() if limits.LIMITS[name][0] == "B/s")
    row["flops"] = sum(x for name, x in row["work"].items() if limits.LIMITS[name][0] == "FLOP/s")
    row["targets"] = judge(workload, row)
    row.update(machine.commit(), date=datetime.date.today().isoformat())
    return row


def write(path: Path, described: dict[str, Any], found: limits.Limits, rows: dict[str, Any]) -> None:
    """Writes a result file; rows that were not measured now stay, if machine and versions are the same."""
    head = {"machine": described, "versions": machine.versions()}
    kept: dict[str, Any] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if {name: old[name] for name in head} == json.loads(json.dumps(head)):
            kept = old["workloads"]
        else:
            print(f"{path.name}: machine or versions have changed, the old rows are dropped")
    merged = {w.name: rows.get(w.name, kept.get(w.name)) for w in WORKLOADS}
    named = {name: {"what": what, "unit": unit, "rate": found[name]} for name, (unit, what) in limits.LIMITS.items()}
    content = {**head, "limits": named, "workloads": {name: row for name, row in merged.items() if row}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def describe_row(name: str, row: dict[str, Any]) -> str:
    """One line for the terminal."""
    ours = row["seconds"][OURS]
    parts = [f"{name:28} {ours['median'] * 1e3:10.4f} ms"]
    parts += [f"{other} {found['median']:.2f}x" for other, found in row["ratios"].items()]
    if row["limit"]:
        parts.append(f"{row['limit']['fraction']:.0%} of the limit")
    missed = [target for target, judged in row["targets"].items() if judged["met"] is False]
    return "  ".join(parts) + (f"  MISSED: {', '.join(missed)}" if missed else "")


def select(patterns: list[str]) -> list[Workload]:
    """The workloads whose name or table fits one of the patterns; all without patterns."""
    if not patterns:
        return list(WORKLOADS)
    chosen = [w for w in WORKLOADS if any(fnmatch.fnmatch(x, p) for p in patterns for x in (w.name, w.table))]
    if not chosen:
        names = ", ".join(w.name for w in WORKLOADS)
        raise SystemExit(f"--only: expected one of {names}, got {' '.join(patterns)}")
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="workloads or tables, wildcards allowed")
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds, nothing written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--backend", choices=BACKENDS, help="force this backend")
    parser.add_argument("--output", type=Path, help="write here instead of results/<machine>.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    described = machine.describe(device, options.threads)
    backends = {options.backend} if options.backend else gate.EXPECTED[device.type]
    shrink = QUICK_SHRINK if options.quick else 1
    pace: dict[str, Any] = {"budget": 0.3, "compiled": False} if options.quick else {}
    chosen = select(options.only)
    if os.getloadavg()[0] > BUSY:
        print(f"load average {os.getloadavg()[0]:.1f}: other work on this machine spoils the figures", file=sys.stderr)
    if not options.quick:
        machine.touch_memory()
    switch(False)
    found = limits.measure(device, options.threads, quick=options.quick)
    rows: dict[str, Any] = {}
    refused = []
    with use_backend(options.backend) if options.backend else nullcontext():
        for workload in chosen:
            try:
                row = measure(workload, device, backends, shrink=shrink, **pace)
            except gate.Refused as reason:
                refused.append(str(reason))
                print(f"REFUSED {reason}", flush=True)
                continue
            if workload.memory and not options.quick:
                row["extra_memory"] = measure_memory(workload, workload.variants(), shrink, device)
            rows[workload.name] = row
            print(f"{workload.name}: measured", flush=True)
    found = limits.better(found, limits.measure(device, options.threads, quick=options.quick))
    for workload in chosen:
        if workload.name in rows:
            print(describe_row(workload.name, finish(workload, rows[workload.name], found)))
    path = options.output or (None if options.quick else RESULTS / f"{machine.slug(described)}.json")
    if path and rows:
        write(path, described, found, rows)
        print(f"wrote {path}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
