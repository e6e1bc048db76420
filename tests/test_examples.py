"""The training examples run, print both curves and draw them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("train_*.py"))
TRAINER = all(importlib.util.find_spec(name) for name in ("datasets", "accelerate"))
_ROW = re.compile(r"^ +(\d+) +(\d+\.\d+) +(\d+\.\d+)$", re.MULTILINE)


def run(script: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        "train_transformers_mean_pooling",
        pytest.param(
            "train_mse_custom_loss",
            marks=pytest.mark.skipif(not TRAINER, reason="the Trainer needs datasets and accelerate"),
        ),
    ],
)
def test_an_example_trains_twice_and_draws(script, tmp_path):
    picture = tmp_path / "pictures" / "curve.png"
    printed = run(script, tmp_path, "--steps", "4", "--out", str(picture))
    rows = [(float(stock), float(ours)) for _, stock, ours in _ROW.findall(printed)]
    assert len(rows) == 4, printed
    # The same weights and the same texts; what dropout draws may differ.
    assert rows[0][1] == pytest.approx(rows[0][0], rel=0.25)
    assert len({ours for _, ours in rows}) > 1, "nothing was learned"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"], "an example leaves files behind"


def test_every_example_says_how_it_is_started():
    assert len(SCRIPTS) == 5
    for script in SCRIPTS:
        text = (ROOT / "examples" / f"{script}.py").read_text()
        assert f"python examples/{script}.py [--steps N] [--out FILE.png]" in text
