"""The encoder's benchmark for a GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gate
import gpu_encoder
from study import OURS, STOCK

import sentfast
from sentfast import native

pytestmark = pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_encoder, "WORDS", 200)
    yield
    sentfast.enable()


def test_rows(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    chosen = ["gpu_encode_minilm", "gpu_training_mpnet", "gpu_query_minilm"]
    assert gpu_encoder.main(["--device", "cpu", "--quick", "--output", str(output), "--only", *chosen]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == chosen
    for row in rows.values():
        assert row["seconds"].keys() >= {STOCK, OURS} and row["targets"]["speed"]["got"] > 0
    assert rows["gpu_query_minilm"]["p50"].keys() == {STOCK, OURS, gpu_encoder.NO_GRAPHS}


def test_another_backend_is_refused() -> None:
    with pytest.raises(gate.Refused, match="the layers ran on"):
        gpu_encoder.encode_row("minilm", torch.device("cpu"), {"triton"}, True)


def test_lengths_are_those_asked_for() -> None:
    model = gpu_encoder.build("minilm", torch.device("cpu"), True)
    found = model.tokenizer(gpu_encoder.texts_of([12, 5, 250], 0))["input_ids"]
    assert [len(ids) for ids in found] == [12, 5, 250]
