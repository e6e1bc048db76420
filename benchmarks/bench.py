"""Runs the workloads and writes benchmarks/results/<machine>.json, from which report.py renders every table.

python benchmarks/bench.py [--only NAME ...] [--quick]

A full run takes some half an hour on an otherwise idle machine. --only takes names with wildcards ('encoder*' is
everything on the encoder, 'training*' on training) and keeps the other rows of the file; --quick shrinks inputs and
rounds, prints, and writes nothing. The studies fetch WordNet, real weights and OpenVINO once, into a cache folder
(texts.py).
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gate
import limits
import machine
import memory
import studies
import texts
import torch
from study import Failed, Settings
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


def finish_studies(rows: dict[str, Any], found: limits.Limits) -> None:
    """The same for the rows of studies."""
    by_name = {study.name: study for study in studies.STUDIES}
    for row in rows.values():
        studies.finish(by_name[row["study"]], row, found)
        row.update(machine.commit(), date=datetime.date.today().isoformat())


def write(
    path: Path,
    described: dict[str, Any],
    found: limits.Limits,
    rows: dict[str, Any],
    studied: dict[str, Any] | None = None,
) -> None:
    """Writes a result file; rows that were not measured now stay, if machine and versions are the same."""
    head = {"machine": described, "versions": machine.versions()}
    kept: dict[str, Any] = {}
    studied = dict(studied or {})
    if path.exists():
        old = json.loads(path.read_text())
        if {name: old[name] for name in head} == json.loads(json.dumps(head)):
            kept = old["workloads"]
            studied = {**old.get("studies", {}), **studied}
        else:
            print(f"{path.name}: machine or versions have changed, the old rows are dropped")
    merged = {w.name: rows.get(w.name, kept.get(w.name)) for w in WORKLOADS}
    named = {name: {"what": what, "unit": unit, "rate": found[name]} for name, (unit, what) in limits.LIMITS.items()}
    content = {**head, "limits": named, "workloads": {name: row for name, row in merged.items() if row}}
    if studied:
        content["studies"] = studies.in_order(studied)
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


def select(patterns: list[str], quick: bool) -> tuple[list[Workload], list[studies.Study]]:
    """The workloads and studies whose name or table fits one of the patterns; all without patterns."""
    studied = studies.select(patterns, quick)
    if not patterns:
        return list(WORKLOADS), studied
    chosen = [w for w in WORKLOADS if any(fnmatch.fnmatch(x, p) for p in patterns for x in (w.name, w.table))]
    if not chosen and not studied:
        names = ", ".join(x.name for x in (*WORKLOADS, *studies.select([], quick)))
        raise SystemExit(f"--only: expected one of {names}, got {' '.join(patterns)}")
    return chosen, studied


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="workloads or tables, wildcards allowed")
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds, nothing written")
    parser.add_argument("--brief", action="store_true", help="fewer rounds, no peak memory, no torch.compile")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--backend", choices=BACKENDS, help="force this backend")
    parser.add_argument("--seed", type=int, help="of the sample of texts; without it a fresh one, kept in the rows")
    parser.add_argument("--output", type=Path, help="write here instead of results/<machine>.json")
    return parser.parse_args(arguments)


def run_workloads(
    chosen: list[Workload], device: torch.device, backends: set[str], quick: bool, brief: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Rows, and why others were refused."""
    shrink = QUICK_SHRINK if quick else 1
    pace: dict[str, Any] = {"budget": 0.3 if quick else 1.5, "compiled": False} if quick or brief else {}
    rows: dict[str, Any] = {}
    refused = []
    for workload in chosen:
        try:
            row = measure(workload, device, backends, shrink=shrink, **pace)
        except gate.Refused as reason:
            refused.append(str(reason))
            print(f"REFUSED {reason}", flush=True)
            continue
        if workload.memory and not quick and not brief:
            row["extra_memory"] = measure_memory(workload, workload.variants(), shrink, device)
        rows[workload.name] = row
        print(f"{workload.name}: measured", flush=True)
    return rows, refused


def run_studies(
    chosen: list[studies.Study], options: argparse.Namespace, backends: set[str]
) -> Iterator[dict[str, Any] | None]:
    """The rows of one study after the other, None for one that was refused; they run on the CPU."""
    if options.device != "cpu" or not chosen:
        return
    settings = study_settings(options, backends)
    print(f"seed of the texts: {settings.seed}", flush=True)
    for study in chosen:
        start = time.monotonic()
        try:
            found = studies.measure(study, settings)
        except (gate.Refused, Failed, texts.Unavailable) as reason:
            print(f"REFUSED {study.name}: {reason}", flush=True)
            yield None
            continue
        said = "measured" if found else "nothing to measure"
        print(f"{study.name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
        yield found


def keep(path: Path | None, described: Any, found: limits.Limits, rows: dict[str, Any], more: dict[str, Any]) -> None:
    """Writes what was measured, if anything was and there is a place for it."""
    if path and (rows or more):
        write(path, described, found, rows, more)
        print(f"wrote {path}")


def study_settings(options: argparse.Namespace, backends: set[str]) -> Settings:
    pace: dict[str, Any] = {"seconds": 0.05, "rounds": 2, "extra": {"texts": 32}} if options.quick else {"extra": {}}
    if options.backend:
        pace["extra"]["backend"] = options.backend
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    return Settings(threads=options.threads, backends=tuple(sorted(backends)), seed=seed, quick=options.quick, **pace)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    described = machine.describe(device, options.threads)
    backends = {options.backend} if options.backend else gate.EXPECTED[device.type]
    chosen, studied = select(options.only, options.quick)
    chosen = [w for w in chosen if not w.gpu or options.quick or device.type == "cuda"]
    if os.getloadavg()[0] > BUSY:
        print(f"load average {os.getloadavg()[0]:.1f}: other work on this machine spoils the figures", file=sys.stderr)
    if not options.quick and device.type == "cpu":
        machine.touch_memory()
    switch(False)
    found = limits.measure(device, options.threads, quick=options.quick)
    path = options.output or (None if options.quick else RESULTS / f"{machine.slug(described)}.json")
    failed = False
    with use_backend(options.backend) if options.backend else nullcontext():
        rows, refused = run_workloads(chosen, device, backends, options.quick, options.brief)
        found = limits.better(found, limits.measure(device, options.threads, quick=options.quick))
        for workload in chosen:
            if workload.name in rows:
                print(describe_row(workload.name, finish(workload, rows[workload.name], found)))
        keep(path, described, found, rows, {})
        for study_rows in run_studies(studied, options, backends):  # each is kept as soon as it is there
            if study_rows is None:
                failed = True
                continue
            finish_studies(study_rows, found)
            for name, row in study_rows.items():
                print(studies.describe(name, row))
            keep(path, described, found, {}, study_rows)
    return 1 if refused or failed else 0


if __name__ == "__main__":
    sys.exit(main())
