"""The grid that compares patched calls with stock, and the rules for calls too small to gain."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import util

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import never_slower
from never_slower_cells import Cell, cells, handed_over

import sentfast
from sentfast import native
from sentfast.integrations import gain, guards, similarity, versions


@pytest.mark.parametrize("seed", range(5))
def test_a_row_fails_by_its_upper_quartile_and_two_microseconds(seed: int) -> None:
    draw = random.Random(seed)
    stock = draw.uniform(1e-4, 1e-2)
    for slower, fails in ((draw.uniform(1.2, 5), True), (draw.uniform(0.2, 1.0), False)):
        samples = {"stock": [stock] * 9, "sentfast": [stock * slower * draw.uniform(0.99, 1.01) for _ in range(9)]}
        row = never_slower.row_of(samples)
        assert row["fails"] is fails
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    for quick in (True, False):
        tiny = never_slower.row_of({"stock": [1e-6] * 9, "sentfast": [2.5e-6] * 9}, quick)
        assert not tiny["fails"] and tiny["ratio"] == pytest.approx(0.4)


class Clock:
    """Time that passes only in calls, so that nothing else on the machine counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(never_slower, "time", self)

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter

    def cell(self, name: str, stock: float, ours: float) -> Cell:
        def call() -> None:
            self.now += ours if sentfast.is_enabled() else stock

        return Cell(name, lambda: call, quick=True)


@pytest.mark.parametrize("quick", [True, False])
def test_slower_calls_are_found(
    quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    draw, clock = random.Random(), Clock(monkeypatch)
    stock, bound = 10 ** draw.uniform(-4, -1), 0.7 if quick else 0.95
    ratios = [draw.uniform(0.2, 0.98 * bound), draw.uniform(1.02 * bound, 3)]
    names = ["slower", "faster"]
    made = [clock.cell(name, stock, stock / ratio) for name, ratio in zip(names, ratios, strict=True)]
    monkeypatch.setattr(never_slower, "cells", lambda seed: made)
    path = tmp_path / "cells.json"
    how = ["--quick" if quick else "--here", "--output", str(path)]
    assert never_slower.main(how) == 1
    assert capsys.readouterr().out.count("FAILS  slower, 1 thread") == 2  # as it comes, and at the end
    assert sentfast.is_enabled()
    monkeypatch.setattr(never_slower, "cells", lambda seed: made[1:])
    assert never_slower.main(how) == 0
    row = json.loads(path.read_text())["faster, 1 thread"]
    assert row["ratio"] == pytest.approx(ratios[1]) and not row["fails"]


@pytest.mark.parametrize("long", [False, True])
def test_the_first_call_after_a_switch_does_not_count(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is looked at anew and tried, which takes longer than many a call."""
    draw, clock = random.Random(torch.initial_seed()), Clock(monkeypatch)
    stock = never_slower.LONG * (draw.uniform(1.1, 3) if long else draw.uniform(1e-3, 0.5))
    seen = [False]

    def call() -> None:
        first, seen[0] = sentfast.is_enabled() and not seen[0], sentfast.is_enabled()
        clock.now += stock + (draw.uniform(1, 10) * stock if first else 0)

    row = never_slower.measure(Cell("cell", lambda: call))
    assert not row["fails"] and row["tries"] == 1 and row["ratio"] == pytest.approx(1)


def test_a_disturbed_cell_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try may be as bad as it likes; what fails in every try counts."""
    draw = random.Random(torch.initial_seed())
    bad = draw.randrange(never_slower.TRIES)
    for always in (False, True):
        tries = iter(range(never_slower.TRIES))
        monkeypatch.setattr(
            never_slower,
            "times",
            lambda *_, always=always, tries=tries: {
                "stock": [1e-3] * 5,
                "sentfast": [1e-1 if always or next(tries) <= bad - 1 else 1e-3] * 5,
            },
        )
        row = never_slower.measure(Cell("cell", lambda: lambda: None), draw.random() < 0.5)
        assert row["fails"] is always and row["tries"] == (never_slower.TRIES if always else bad + 1)


def test_every_instruction_set_has_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stock's libraries are left alone with the one that runs by itself, whether or not the CPU has more, and else held
    to the same one; what fails in one of them fails."""
    draw = random.Random(torch.initial_seed())
    fails, chosen = draw.random() < 0.5, draw.choice(["avx2", "avx512"])
    seen = []

    def run(command: list[str], env: dict[str, str], check: bool) -> None:
        tier, output = env["SENTFAST_CPU_ISA"], Path(command[command.index("--output") + 1])
        seen.append((tier, "MKL_CBWR" in env))
        row = {"seconds": {"sentfast": 1.0, "stock": 1.0}, "ratio": 1.0, "spread": [1.0, 1.0], "reasons": []}
        output.write_text(json.dumps({"cell": row | {"fails": fails and tier == "avx2"}}))

    monkeypatch.delenv("MKL_CBWR", raising=False)
    monkeypatch.setattr(never_slower.subprocess, "run", run)
    monkeypatch.setattr(never_slower, "commit", dict)
    monkeypatch.setattr(sentfast, "supported_cpu_isas", lambda: ("scalar", "avx2", "avx512"))
    monkeypatch.setattr(sentfast, "cpu_isa", lambda: chosen)
    path = tmp_path / "tiers.json"
    assert never_slower.main(["--output", str(path)]) == fails
    assert seen == [(tier, tier != chosen) for tier in ("avx2", "avx512")]
    assert set(json.loads(path.read_text())["tiers"]) == {"avx2", "avx512"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_crowded_machines_have_their_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the cores that a circumstance leaves, which are given back; what fails in one of them fails."""
    worse = random.Random(torch.initial_seed()).choice([None, *never_slower.CROWDED])
    names, seen, before = iter(never_slower.CROWDED), {}, os.sched_getaffinity(0)

    def run(command: list[str], env: dict[str, str], check: bool) -> None:
        name = next(names)
        seen[name] = (int(env["OMP_NUM_THREADS"]), len(os.sched_getaffinity(0)))
        row = {"seconds": {"sentfast": 1.0, "stock": 1.0}, "ratio": 1.0, "spread": [1.0, 1.0], "reasons": []}
        output = Path(command[command.index("--output") + 1])
        output.write_text(json.dumps({"cell": row | {"fails": name == worse}}))

    monkeypatch.setattr(never_slower.subprocess, "run", run)
    path = tmp_path / "crowded.json"
    assert never_slower.main(["--crowded", "--output", str(path)]) == (worse is not None)
    assert os.sched_getaffinity(0) == before
    assert set(json.loads(path.read_text())) == set(seen) == set(never_slower.CROWDED)
    cores = len(before)
    for name, (per_core, share, _) in never_slower.CROWDED.items():
        assert seen[name] == (cores * per_core, max(1, int(cores * share)))


def test_names_of_cells_differ() -> None:
    names = [cell.name for cell in cells()]
    assert len(names) == len(set(names)) and any(cell.quick for cell in cells())


@pytest.mark.parametrize("seed", range(3))
def test_small_calls_run_the_original(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules of gain.py, with the original's own result, and ours just above them."""
    draw = random.Random(seed)
    monkeypatch.setattr(gain, "TILES", False)
    monkeypatch.setattr(gain, "on", True)
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.setattr(gain, "forced_backend", lambda: None)
    monkeypatch.setattr(guards, "forced", lambda: False)
    wide, few = draw.randint(gain.LEAST_COLUMNS, 100), draw.randint(1, 128)
    some, many = draw.randint(1, 128), draw.randint(gain.LEAST_SCORES // 128 + 1, 700)
    narrow = draw.randint(1, gain.NARROWEST - 1)
    thin = draw.randint(1, gain.LEAST_COLUMNS - 1)
    cases = [
        ("cos_sim", few + 16, gain.MOST_NARROW_SCORES // (few + 16), narrow, False),
        ("cos_sim", few + 16, gain.MOST_NARROW_SCORES // (few + 16) + 1, narrow, True),
        ("cos_sim", few, gain.MOST_NARROW_ROWS, narrow, True),
        ("cos_sim", few, gain.MOST_NARROW_ROWS, gain.NARROWEST, False),
        ("dot_score", few, some, wide, few * some < gain.LEAST_SCORES),
        ("dot_score", many, 128, thin, True),
        ("dot_score", many, 128, wide, False),
        ("dot_score", gain.LEAST_SCORES, gain.LEAST_ROWS - 1, wide, True),
        ("dot_score", gain.LEAST_SCORES, gain.LEAST_ROWS, wide, False),
        ("semantic_search", 1, 200, 1, True),
        ("pairwise_dot_score", gain.LEAST_NUMBERS // thin - 1, gain.LEAST_NUMBERS // thin - 1, thin, True),
        ("pairwise_dot_score", gain.LEAST_NUMBERS // thin + 1, gain.LEAST_NUMBERS // thin + 1, thin, False),
        (
            "pairwise_euclidean_sim",
            gain.LEAST_DISTANCE_NUMBERS // thin - 1,
            gain.LEAST_DISTANCE_NUMBERS // thin - 1,
            thin,
            True,
        ),
        (
            "pairwise_euclidean_sim",
            gain.LEAST_DISTANCE_NUMBERS // thin + 1,
            gain.LEAST_DISTANCE_NUMBERS // thin + 1,
            thin,
            False,
        ),
        ("semantic_search", 1, many, wide, False),
        ("semantic_search", draw.randint(2, 30), draw.randint(1, gain.LEAST_SEARCHED_ROWS - 1), wide, True),
        ("semantic_search", draw.randint(2, 30), gain.LEAST_SEARCHED_ROWS, wide, False),
        ("paraphrase_mining_embeddings", draw.randint(2, gain.LEAST_MINED_ROWS - 1), 0, wide, True),
        ("paraphrase_mining_embeddings", gain.LEAST_MINED_ROWS + few, 0, wide, False),
        ("paraphrase_mining_embeddings", gain.LEAST_MINED_ROWS + few, 0, gain.WIDE, True),
    ]
    for function, first, second, width, original in cases:
        rows = [torch.randn(count, width) for count in (first, second) if count]
        with sentfast.disabled():
            expected = getattr(util, function)(*rows)
        sentfast.report(reset=True)
        found = getattr(util, function)(*rows)
        codes = {code for site, code in sentfast.report().fallbacks if site == function}
        assert codes == ({gain.TOO_SMALL} if original else set()), (function, first, second, width)
        if codes and isinstance(found, torch.Tensor):
            if function == "cos_sim":  # of parts that are ours
                expected = torch.mm(util.normalize_embeddings(rows[0]), util.normalize_embeddings(rows[1]).T)
            assert torch.equal(found, expected)
        sentfast.report(reset=True)
        getattr(util, function)(*[draw.choice([list, torch.Tensor.numpy])(x) for x in rows])
        found_again = {code for site, code in sentfast.report().fallbacks if site == function}
        assert found_again == codes, "of lists and arrays"


def test_narrow_rows_are_few_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "on", True)
    monkeypatch.setattr(gain, "forced_backend", lambda: None)
    draw = random.Random(torch.initial_seed())
    first, width = draw.randint(1, gain.MOST_NARROW_HALVES - 1), draw.randint(1, gain.NARROWEST - 1)
    for dtype, more in itertools.product((torch.float32, torch.bfloat16, torch.float16), (0, draw.randint(1, 100))):
        rows = [torch.randn(n, width).to(dtype) for n in (first, gain.MOST_NARROW_HALVES - first + more)]
        assert gain.cos_sim(*rows) is (more > 0 and dtype != torch.float32)
        if dtype != torch.bfloat16:
            assert gain.cos_sim(*(x.numpy() for x in rows)) is (more > 0 and dtype != torch.float32)


def test_small_matrices_are_known_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way comes to what the shapes say."""
    monkeypatch.setattr(gain, "on", True)
    monkeypatch.setattr(gain, "TILES", False)
    monkeypatch.setattr(gain, "forced_backend", lambda: None)
    draw = random.Random(torch.initial_seed())
    for _ in range(300):
        sizes = [int(2 ** draw.uniform(0, 10)) for _ in range(2)]
        width = draw.choice([gain.LEAST_COLUMNS - 1, gain.LEAST_COLUMNS, int(2 ** draw.uniform(0, 11))])
        small = sizes[0] * sizes[1] < gain.LEAST_SCORES or width < gain.LEAST_COLUMNS
        small |= min(sizes) < gain.LEAST_ROWS and width < gain.LEAST_WIDE_COLUMNS
        # Of the same memory, as nothing is read.
        a, b = (torch.empty(1).expand(count, width) for count in sizes)
        assert gain.dot_score(a, b) is small, (sizes, width)


def test_wide_vectors_search_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "on", True)
    monkeypatch.setattr(gain, "forced_backend", lambda: None)
    queries, rows = torch.empty(2, 4), torch.empty(gain.LEAST_SEARCHED_ROWS - 1, 4)
    for isa, small in (("avx512", False), ("avx512_bf16", False), ("avx2", True), ("neon", True), ("", True)):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        assert gain.semantic_search(queries, rows) is small, isa
        assert not gain.semantic_search(queries[:1], rows)


@pytest.mark.parametrize("old", [False, True])
def test_a_cpu_with_tiles_multiplies_bfloat16_itself(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, and of halves in versions that multiply them as they are; without norms float32 too."""
    draw = random.Random(torch.initial_seed())
    version = versions.find("5.1.2" if old else "6.2.0")
    assert version is not None
    monkeypatch.setattr(gain, "on", True)
    monkeypatch.setattr(gain, "forced_backend", lambda: None)
    monkeypatch.setattr(guards, "forced", lambda: False)
    width, least = draw.randint(gain.LEAST_COLUMNS, 80), similarity.LEAST_TILED_ROWS
    few, many = (
        draw.randint(gain.LEAST_ROWS, least - 1),
        draw.randint(gain.LEAST_SCORES // least, 2 * gain.LEAST_SCORES // least),
    )
    single, half = torch.float32, torch.bfloat16
    dtypes = [
        (single, None),
        (single, half),
        (single, torch.float16),
        (half, None),
        (half, half),
        (torch.float16, None),
    ]
    shapes = [(least, many), (gain.LEAST_SCORES // few + 1, few)]
    for tiles, rows, (dtype, autocast) in itertools.product((False, True), shapes, dtypes):
        monkeypatch.setattr(gain, "TILES", tiles)
        a, b = (torch.randn(count, width).to(dtype) for count in rows)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            cosine, dot = similarity.cos_sim(version, a, b), similarity.dot_score(version, a, b)
        in_bfloat16 = autocast == half or (autocast is None and old and dtype == half)
        assert isinstance(cosine, str) is (tiles and in_bfloat16 and rows[0] == least), (rows, dtype, autocast)
        assert isinstance(dot, str) is (tiles and (in_bfloat16 or dtype == single)), (rows, dtype, autocast)
        if tiles:
            assert cosine == "SF131" or not isinstance(cosine, str)
            assert dot == (gain.TOO_SMALL if dtype == single else "SF131") or not isinstance(dot, str)
    monkeypatch.setattr(guards, "forced", lambda: True)
    assert not isinstance(similarity.dot_score(version, a, b), str)


def test_every_rule_is_measured() -> None:
    """What handing over costs is measured with operands that the rule calls small."""
    assert set(handed_over()) == set(gain.RULES)
    for name, (patched, original, operands) in handed_over().items():
        assert original(*operands) is None and callable(patched), name
