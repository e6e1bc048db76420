"""``python -m sentfast doctor``: what it says, and that it notices what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import sentfast
from sentfast import __main__, functional, install, native, registry
from sentfast.doctor import self_test


def test_healthy():
    diagnosis = sentfast.doctor()
    assert diagnosis.healthy, str(diagnosis)
    facts = diagnosis.facts
    assert set(facts["backends"]) == set(registry.ops)
    assert facts["libraries"]["cpu"] == ("loaded" if native.cpu_loaded() else native.why_no_cpu())
    assert facts["machine"]["threads"] >= 1
    assert diagnosis.exit_code == (0 if native.cpu_loaded() else 3)
    assert str(diagnosis).startswith("healthy\n") or not native.cpu_loaded()


def test_operators_and_patches_by_name_only_where_asked_for(capsys):
    __main__.main(["doctor"])
    short = capsys.readouterr().out
    __main__.main(["doctor", "-v"])
    long = capsys.readouterr().out
    for name in registry.ops:
        assert f"  {name} " not in short and f"  {name} " in long, name
    assert len(short.splitlines()) < 40 < len(long.splitlines())


def test_stock_speed_has_a_verdict_of_its_own(capsys):
    """Switched off, or with the plain kernels where there are no others: all is right, and nothing is faster."""
    sentfast.disable()
    try:
        assert __main__.main(["doctor"]) == 3
    finally:
        sentfast.enable()
    out = capsys.readouterr().out
    assert out.startswith("healthy, but at stock speed") and "switched off (disable()): " in out, out
    if not native.cpu_loaded() or torch.cuda.is_available():
        return
    before = native.cpu_isa()
    native.cpu_isa("scalar")
    try:
        code = __main__.main(["doctor"])
    finally:
        native.cpu_isa(before)
    asked = "missing: the scalar kernels run because SENTFAST_CPU_ISA asks for them" in capsys.readouterr().out
    best = len(native.supported_cpu_isas()) == 1
    assert (code, asked) == ((3, False) if best else (0, True))


def test_a_missing_symbol_is_named():
    error = "/x/_C.so: undefined symbol: torch_parallel_for"
    assert "symbol torch_parallel_for is missing; built with PyTorch" in native.why_not_loaded(error)
    on_a_mac = "dlopen(/x/_C.so): symbol not found in flat namespace '_torch_parallel_for'"
    assert "symbol _torch_parallel_for is missing" in native.why_not_loaded(on_a_mac)
    assert "is missing" not in native.why_not_loaded("/x/_C.so: invalid ELF header")


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
    assert "self-test of l2_normalize (cpu): FAILED: relative error 1.0e-02" in out and out.startswith("broken")


def test_a_library_that_does_not_load_is_noticed(monkeypatch):
    monkeypatch.setattr(native, "build_info", lambda: {"python": "3.11"})
    monkeypatch.setattr(native, "why_no_cpu", lambda: "no compiled CPU library: it did not load")
    broken = sentfast.doctor().broken
    assert any("it did not load" in line and install.remedy() in line for line in broken), broken


def test_json(capsys):
    code = __main__.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == found["exit_code"] == sentfast.doctor().exit_code
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
        assert result.returncode == 4 and "PyTorch is not installed: python -m pip install torch" in result.stdout, (
            result.stderr
        )
    else:
        assert result.returncode == 3 and "pip install sentence-transformers" in result.stdout, result.stderr


def test_a_reader_may_go_when_it_had_enough(tmp_path):
    """As ``| head`` does, at any line."""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sentfast.__file__))}
    command = [sys.executable, "-m", "sentfast", "doctor", "-v"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize("form", ["script", "module"])
def test_programs_run_under_sentfast(form, tmp_path):
    """Arguments, name, file, path and exit code are those of a plain start."""
    folder = tmp_path / "folder"
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(
        "import sys\n"
        "print(__name__, __file__, sys.argv, sys.path[0], file=sys.stderr)\n"
        "print('sentfast' in sys.modules)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    words = [
        *([str(program)] if form == "script" else ["-m", "folder.program"]),
        str(int(torch.randint(5, 99, ()))),
        "-v",
    ]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sentfast.__file__))}

    def run(*start: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *start, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    plain, found = run(), run("-m", "sentfast")
    assert (found.returncode, found.stderr) == (plain.returncode, plain.stderr)
    assert found.returncode == int(words[-2]) and (plain.stdout, found.stdout) == ("False\n", "True\n")


def test_a_program_that_is_not_there_is_an_error(capsys):
    assert __main__.main(["nothing.py"]) == 2
    assert "expected doctor, -m MODULE or a script that exists, got 'nothing.py'" in capsys.readouterr().err
