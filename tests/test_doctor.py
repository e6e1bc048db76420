"""``python -m sentfast doctor``: what it says, and that it notices what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

import sentfast
from sentfast import __main__, functional, native, registry
from sentfast.doctor import self_test


def test_healthy():
    diagnosis = sentfast.doctor()
    assert diagnosis.healthy, str(diagnosis)
    facts = diagnosis.facts
    assert set(facts["backends"]) == set(registry.ops)
    assert facts["libraries"]["cpu"] == ("loaded" if native.cpu_loaded() else native.why_no_cpu())
    assert facts["machine"]["threads"] >= 1
    assert any("pip install" in line for line in diagnosis.missing) or native.cpu_loaded()


def test_self_test_covers_every_operator_in_time():
    start = time.process_time()
    results = self_test()
    assert time.process_time() - start < 2
    assert {name.split()[0] for name in results} == set(functional.__all__)
    assert set(results.values()) == {"OK"}


def test_wrong_results_are_noticed(monkeypatch, capsys):
    monkeypatch.setattr(functional, "l2_normalize", lambda x: x * (1.01 if x.element_size() == 4 else 1))
    assert __main__.main(["doctor"]) == 4
    out = capsys.readouterr().out
    assert "self-test of l2_normalize (cpu): FAILED: relative error 1.0e-02" in out and "not healthy" in out


def test_a_library_that_does_not_load_is_noticed(monkeypatch):
    monkeypatch.setattr(native, "build_info", lambda: {"python": "3.11"})
    monkeypatch.setattr(native, "why_no_cpu", lambda: "no compiled CPU library: it did not load")
    broken = sentfast.doctor().broken
    assert any("it did not load" in line and native.MEND in line for line in broken), broken


def test_json(capsys):
    assert __main__.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["versions"]["sentfast"] == sentfast.__version__


def test_help_without_arguments(capsys):
    assert __main__.main([]) == 0
    assert "doctor" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", ["torch", "sentence_transformers"])
def test_missing_packages_are_named(hidden, tmp_path):
    """With a finder that hides the package, as if it were not installed."""
    code = f"""
import sys, importlib.machinery
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {hidden!r} else real(name, package)
from sentfast.__main__ import main
sys.exit(main(["doctor"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    if hidden == "torch":
        assert result.returncode == 4 and "PyTorch is not installed: pip install torch" in result.stdout, result.stderr
    else:
        assert result.returncode == 0 and "pip install sentence-transformers" in result.stdout, result.stderr
