"""The harness at a tiny size: it measures what is right, and refuses what is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


import bench
import gate
import limits
import machine
import memory
import report
import studies
import timing
from workload import OURS, STOCK
from workloads import WORKLOADS

import sentfast
from sentfast import functional, native
from sentfast.registry import use_backend

CPU = torch.device("cpu")
BACKEND = "cpu" if native.cpu_loaded() else "reference"
BY_NAME = {workload.name: workload for workload in WORKLOADS}
LIMITS = dict.fromkeys(limits.LIMITS, 1e10)


@pytest.fixture(autouse=True)
def _small_and_switched_back(monkeypatch):
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 20)
    before = sentfast.is_enabled()
    yield
    timing.switch(before)


def measure(workload, backends=frozenset({BACKEND})):
    return bench.measure(workload, CPU, set(backends), shrink=workload.tiny, rounds=3, compiled=False)


def with_ours(workload, call):
    """The workload with another function in the place of sentfast's."""
    variants = {**workload.variants(), OURS: timing.Variant(call)}
    return replace(workload, variants=lambda: variants)


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS if w.table != "model"])
def test_every_workload_passes_its_gate(name):
    workload = BY_NAME[name]
    row = bench.finish(workload, measure(workload), LIMITS)
    assert row["rounds"] == 3
    assert set(row["ran"][OURS]["calls"]) and row["ran"][OURS]["fallbacks"] == {}
    assert all(row["seconds"][variant]["median"] > 0 for variant in (OURS, STOCK))
    assert row["ratios"][STOCK]["median"] > 0
    assert set(row["targets"]) == set(workload.targets)
    json.dumps(row)


def test_names_are_unique_and_every_limit_is_known():
    assert len(BY_NAME) == len(WORKLOADS)
    for workload in WORKLOADS:
        if workload.table != "model":
            assert set(workload.work(workload.make(CPU, workload.tiny, 0))) <= set(limits.LIMITS), workload.name


def test_model_workload_runs_through_the_switch():
    row = measure(BY_NAME["encode"])
    assert "encoder" in row["ran"][OURS]["calls"]
    assert row["work"]["peak_float32"] > 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out + 1e-4,
        lambda out: out.masked_fill(torch.arange(out.numel()).view_as(out) == 5, float("nan")),
        lambda out: out.flip(0),
        lambda out: out[:-1],
        lambda out: torch.zeros_like(out),
    ],
    ids=["offset", "nan", "wrong rows", "wrong shape", "zeros"],
)
def test_a_wrong_kernel_is_refused(spoil):
    workload = with_ours(BY_NAME["pool_mean"], lambda i: spoil(functional.pool(i["x"], i["mask"], normalize=True)))
    with pytest.raises(gate.Refused, match="output 0 of 'sentfast' has error"):
        measure(workload)


def test_a_wrong_gradient_is_refused():
    right = BY_NAME["pool_mean_step"].variants()[OURS].call
    workload = with_ours(BY_NAME["pool_mean_step"], lambda i: (right(i)[0], right(i)[1] * 1.001))
    with pytest.raises(gate.Refused, match="output 1 of 'sentfast' has error"):
        measure(workload)


def test_a_wrong_oracle_is_refused():
    workload = BY_NAME["normalize"]
    with pytest.raises(gate.Refused, match="the oracle or the inputs are wrong"):
        measure(replace(workload, exact=lambda i: workload.exact(i)[0] * 1.01))


def test_another_backend_is_refused():
    with use_backend("reference"), pytest.raises(gate.Refused, match=r"ran on \['reference'\], wanted \['cpu'\]"):
        measure(BY_NAME["normalize"], {"cpu"})


def test_what_runs_no_operator_is_not_called_sentfast():
    workload = with_ours(BY_NAME["normalize"], lambda i: torch.nn.functional.normalize(i["x"], dim=-1))
    with pytest.raises(gate.Refused, match="ran no sentfast operator"):
        measure(workload)


def test_nothing_is_written_for_a_refused_workload(tmp_path, monkeypatch, capsys):
    good, bad = BY_NAME["overhead_normalize"], with_ours(BY_NAME["overhead_pool"], lambda i: i["x"][:, 0])
    path = tmp_path / "result.json"
    monkeypatch.setattr(bench, "WORKLOADS", (good, bad))
    monkeypatch.setattr(studies, "STUDIES", ())
    arguments = ["--quick", "--threads", str(torch.get_num_threads()), "--backend", BACKEND, "--output", str(path)]
    assert bench.main(arguments) == 1
    assert "REFUSED overhead_pool" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert list(written["workloads"]) == ["overhead_normalize"]
    assert written["workloads"]["overhead_normalize"]["ran"][OURS]["calls"] == {"l2_normalize": {BACKEND: 1}}
    assert report.workload_table(written, "overhead").count("\n") == 3


def test_other_rows_of_a_file_are_kept(tmp_path):
    row = {"table": "pooling"}
    described = machine.describe(CPU, 1)
    path = tmp_path / "result.json"
    bench.write(path, described, LIMITS, {"pool_mean": row})
    bench.write(path, described, LIMITS, {"cosine": row})
    assert list(json.loads(path.read_text())["workloads"]) == ["pool_mean", "cosine"]
    bench.write(path, {**described, "threads": 99}, LIMITS, {"cosine": row})
    assert list(json.loads(path.read_text())["workloads"]) == ["cosine"]


def test_interleaving_times_the_call_and_nothing_else(monkeypatch):
    now, order = [0], []

    def spend(name, nanoseconds):
        def call(_):
            order.append(name)
            now[0] += nanoseconds

        return call

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    variants = {
        "slow": timing.Variant(spend("slow", 6_000_000)),
        "fast": timing.Variant(spend("fast", 2_000_000), prepare=spend("prepare", 50_000_000)),
    }
    rounds = 30
    samples = timing.interleave(variants, [None], CPU, rounds=rounds)
    assert samples == {"slow": pytest.approx([6e-3] * rounds), "fast": pytest.approx([2e-3] * rounds)}
    timed = iter([name for name in order if name != "prepare"][-2 * rounds :])
    assert set(zip(timed, timed, strict=True)) == {("slow", "fast"), ("fast", "slow")}  # new orders, of both each round
    assert timing.ratio(samples["slow"], samples["fast"])["median"] == pytest.approx(3)


def test_short_calls_are_repeated_from_warm_caches_and_rounds_follow_the_budget(monkeypatch):
    now = [0]

    def call(_):
        now[0] += 10_000

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    samples = timing.interleave({"short": timing.Variant(call)}, [None], CPU, cold=False, budget=0.1)
    assert samples == {"short": pytest.approx([1e-5] * 50)}
    assert now[0] == (2 + 50 * 200) * 10_000


def test_ratio_is_taken_round_by_round():
    found = timing.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert (found["median"], found["min"], found["max"]) == (2.0, 2.0, 4.0)


def test_switch_follows_the_variant():
    seen = {}
    variants = {
        name: timing.Variant(lambda _, name=name: seen.setdefault(name, set()).add(sentfast.is_enabled()), switched=on)
        for name, on in (("on", True), ("off", False))
    }
    timing.interleave(variants, [None], CPU, cold=False, rounds=3)
    assert seen == {"on": {True}, "off": {False}}


def test_peak_memory_counts_output_and_workspace():
    size = 64 << 20

    def call():
        workspace = torch.ones(size // 4)
        return workspace * 2

    # The kernel counts pages per thread and adds them up now and then.
    assert memory.peak_extra(call, CPU) == pytest.approx(2 * size, abs=8 << 20)


def test_peak_memory_in_a_fresh_process():
    workload = BY_NAME["normalize"]
    shrink = 8
    output = workload.make(CPU, shrink, 0)["x"].numel() * 4
    found = memory.in_fresh_process("normalize", STOCK, shrink, 1, CPU)
    assert output <= found < 4 * output


def test_error_is_infinite_where_values_are_missing():
    exact = torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.float64)
    assert gate.error(exact.float(), exact) == 0
    assert gate.error(torch.tensor([1.5, float("nan"), float("-inf")]), exact) == 0.5
    for wrong in ([1.0, float("nan"), float("inf")], [1.0, float("-inf"), float("nan")], [1.0, 0.0, float("-inf")]):
        assert gate.error(torch.tensor(wrong), exact) == float("inf")


def test_limits_are_positive_and_the_better_one_counts():
    found = limits.measure(CPU, 1, quick=True)
    assert set(found) == set(limits.LIMITS)
    assert all(rate > 1e6 for name, rate in found.items() if not name.startswith("peak"))
    if BACKEND == "cpu":
        assert found["peak_float32"] > 1e8
    doubled = {name: rate and rate * 2 for name, rate in found.items()}
    assert limits.better(found, doubled) == doubled == limits.better(doubled, found)


def test_fraction_of_the_limit():
    row = {"work": {"read": 1e9, "peak_float32": 4e9}, "seconds": {OURS: {"median": 1.0}}}
    found = {**LIMITS, "peak_float32": None, "gemm_float32": 1e10}
    judged = bench.against_limits(row, found)
    assert judged["rates"] == {"read": 1e10, "gemm_float32": 1e10}
    assert judged["fraction"] == pytest.approx(0.1 + 0.4)
