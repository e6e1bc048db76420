"""The study of exact search, on small sizes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gate
import search
from study import OURS, STOCK, Settings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        name: dataclasses.replace(case, queries=min(case.queries, 300), rows=20000)
        for name, case in search.CASES.items()
    }
    monkeypatch.setattr(search, "CASES", cases)


@pytest.mark.usefixtures("small")
def test_rows_of_the_study(capsys: pytest.CaptureFixture[str]) -> None:
    rows = search.measure(Settings(quick=True, rounds=2, backends=("cpu", "reference")))
    assert set(rows) == {f"search_{name}" for name in search.CASES}
    for row in rows.values():
        search.finish(row, {})
        assert "search_topk" in row["ran"][OURS]["calls"]
        if search.FAISS not in row["ratios"]:
            assert row["note"] == "FAISS is not installed"
            assert "FAISS is not there" in capsys.readouterr().out or row["case"] != "many"
    assert STOCK in rows["search_many"]["ratios"]
    assert rows["search_one"]["read_share"] > 0
    text = search.table(list(rows.values()))
    assert text.count("\n") == 2 + len(rows)
    assert rows["search_many"]["title"] in text
    assert OURS in text


def test_the_check_refuses_other_answers() -> None:
    queries, rows = search.make(search.CASES["many"], 3, 500, 0)
    from sentfast.ops import search as ours

    found: Any = ours.topk(queries, rows, k=search.K)
    search.check("right", queries, rows, found.scores, found.ids)
    with pytest.raises(gate.Refused, match="wrong: query 0 has"):
        search.check("wrong", queries, rows, found.scores, found.ids.flip(1))
    with pytest.raises(gate.Refused):
        search.check("off", queries, rows, found.scores + 1e-5, found.ids)


def test_another_backend_is_refused() -> None:
    search.check_backend("right", {"calls": {"search_topk": {"cpu": 1}}}, ("cpu",))
    for calls in ({"search_topk": {"reference": 1}}, {"pool": {"cpu": 1}}):
        with pytest.raises(gate.Refused, match="wrong: ran on"):
            search.check_backend("wrong", {"calls": calls}, ("cpu",))


def test_data_is_of_unit_length() -> None:
    for case in search.CASES.values():
        for x in search.make(case, 5, 300, 1):
            torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
