"""What setup.py decides, on machines that are not here, and that a build that fails leaves a package that works."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup() -> dict:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="names")


def test_commands_of_other_platforms(setup, monkeypatch):
    """Never run there; but nothing of GNU's linker reaches Apple's or Microsoft's."""
    link = setup["link_command"]
    assert "-z,now" in link("Linux", "g++", Path("/t/lib")) and "-ltorch_cpu" in link("Linux", "g++", Path("/t/lib"))
    mac = link("Darwin", "clang++", Path("/t/lib"))
    assert "-z," not in mac and "-bundle -undefined dynamic_lookup" in mac
    windows = link("Windows", "clang-cl", Path("/t/lib"))
    assert "-shared" not in windows and "torch_cpu.lib" in windows and "/LD" in windows
    assert "-fPIC" not in setup["compile_command"]("Windows", "clang-cl")
    assert "-Wno-unknown-pragmas" in setup["compile_command"]("Linux", "clang++-14")
    tiers = setup["tiers"]
    assert set(tiers("arm64")) == set(tiers("aarch64")) == {"scalar", "neon", "neon_dot", "neon_bf16"}
    assert tiers("AMD64") == tiers("x86_64") == setup["TIERS"] and set(tiers("riscv64")) == {"scalar"}


def test_jobs_without_affinity(setup, monkeypatch):
    """Only Linux can say which cores a process may use."""
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert setup["jobs"]() == str(os.cpu_count())


def test_headers_of_python_that_are_missing_are_named(setup, tmp_path, monkeypatch):
    """Before anything is compiled: Debian's python3 comes without them."""
    assert (setup["python_headers"]() / "Python.h").exists()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(setup["NoKernelsError"], match=f"no headers of Python .* in {tmp_path}; .*python3-dev"):
        setup["python_headers"]()


def test_windows_has_no_fork(tmp_path):
    """PyTorch asks for the platform's name, so it is imported before."""
    code = """
import os, torch, sentence_transformers
for name in ("register_at_fork", "sched_getaffinity", "fork"):
    delattr(os, name)
import sentfast, sentfast.functional
from sentfast import switch
from sentfast.encoder import encoder
assert switch.patched() and not switch.problem(), switch.problem()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=path_to(ROOT))
    assert done.returncode == 0 and "SentfastWarning" not in done.stderr, done.stderr


def path_to(folder: Path) -> dict[str, str]:
    parts = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, parts))}


def test_the_torch_to_build_against_is_found_without_importing_it(setup, tmp_path, monkeypatch):
    """As in an isolated build, whose path has nothing of the environment that it builds for."""
    found = setup["Torch"].find()
    assert found.version == torch.__version__ and found.cuda == torch.version.cuda
    monkeypatch.setattr(setup["importlib"].util, "find_spec", lambda name: None)
    assert setup["Torch"].find().version == torch.__version__
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup["site"], "getusersitepackages", lambda: str(tmp_path))
    assert setup["Torch"].find() is None
    # Too old, then new enough.
    (tmp_path / "torch" / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    for version, fits in (("2.9.1", False), ("2.10.0", True), (f"{int(torch.randint(3, 9, ()))}.0.0+cu130", True)):
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = '13.0'\n")
        assert (setup["Torch"].find() is not None) == fits


def test_cuda_is_built_only_where_pytorch_has_it(setup, tmp_path, monkeypatch):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", str(compiler))
    without, with_cuda = (type("Torch", (), {"cuda": cuda}) for cuda in (None, "13.0"))
    for wanted, cuda, expected in (
        ("", without, None),
        ("", with_cuda, str(compiler)),
        ("1", without, str(compiler)),
        ("0", with_cuda, None),
    ):
        monkeypatch.setenv("SENTFAST_CUDA", wanted)
        assert setup["nvcc"](cuda) == expected


def test_a_compiler_that_knows_no_bf16_leaves_out_one_tier(setup, tmp_path):
    """As GCC 9, which is not here: a compiler that refuses the option."""
    cxx = setup["compiler"](platform.system())
    old = tmp_path / "old-c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *bf16*) exit 1;; esac\nexec {cxx} "$@"\n')
    old.chmod(0o755)
    for tier, flags in setup["tiers"](platform.machine()).items():
        assert setup["accepted"](str(old), flags) == (not tier.endswith("bf16")), tier
    isa = ["-std=c++17", "-DSENTFAST_WITHOUT_BF16", "-c", str(ROOT / "csrc/cpu/isa.cpp"), "-o", str(tmp_path / "isa.o")]
    subprocess.run([cxx, *isa], check=True)
    symbols = subprocess.run(["nm", "-C", str(tmp_path / "isa.o")], capture_output=True, text=True, check=True).stdout
    assert "bf16::table" not in symbols and "scalar::table" in symbols


def copy(folder: Path) -> Path:
    for name in ("sentfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize("fault", ["no compiler", "compiler that fails"])
def test_a_build_that_fails_installs_the_package_without_kernels(fault, tmp_path):
    """In a folder whose name has a space; the reason is kept for the doctor."""
    (tmp_path / "a clone").mkdir()
    source, target = copy(tmp_path / "a clone"), tmp_path / "target"
    compiler = tmp_path / "broken-c++"
    if fault == "compiler that fails":
        compiler.write_text("#!/bin/sh\necho 'isa.cpp:1:1: error: no such thing' >&2\nexit 1\n")
        compiler.chmod(0o755)
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    environment = {**os.environ, "CXX": str(compiler), "SENTFAST_CUDA": "0"}
    environment.pop("SENTFAST_NO_EXT", None)
    done = subprocess.run([*pip, "-v"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    wanted = f"no C++ compiler: {compiler}" if fault == "no compiler" else "isa.cpp:1:1: error: no such thing"
    assert "installed WITHOUT compiled kernels" in done.stdout + done.stderr
    assert wanted in json.loads((target / "sentfast" / "_build.json").read_text())["failed"]
    code = "import sentfast, sys; d = sentfast.doctor(); print(d); sys.exit(d.exit_code)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=path_to(target)
    )
    assert run.returncode == (0 if torch.cuda.is_available() else 3), run.stderr
    assert wanted in run.stdout and run.stderr.count("SentfastWarning") == 1
    strict = {**environment, "SENTFAST_NO_EXT": "0"}
    assert subprocess.run(pip, capture_output=True, text=True, env=strict).returncode != 0


def test_the_source_archive_has_the_tests_with_their_helpers(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "--dist-dir", str(tmp_path)]
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns(
        "*.so", "*.o", "_build.json", "build", ".git", ".venv", "*.egg-info", "__pycache__", "shared"
    )
    shutil.copytree(ROOT, clone, ignore=ignore)
    done = subprocess.run(command, capture_output=True, text=True, cwd=clone)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    names = subprocess.run(["tar", "tf", str(archive)], capture_output=True, text=True).stdout.split()
    inside = {name.partition("/")[2] for name in names}
    for folder in ("csrc", "kernels", "sentfast", "tests", "examples", "benchmarks", "docs"):
        here = {path.relative_to(clone).as_posix() for path in (clone / folder).rglob("*") if path.is_file()}
        left_out = {name for name in here - inside if "__pycache__" not in name}
        assert not left_out, left_out


def test_what_is_imported_is_declared():
    """Of the packages that sentfast imports itself; sentence-transformers and transformers are what it accelerates."""
    declared = {
        "torch",
        "numpy",
        "tqdm",
        "sentence_transformers",
        "transformers",
        "triton",
        "tokenizers",
        "peft",
        "sentfast",
    }
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}' in text for name in ("torch", "numpy", "tqdm"))
    found = set()
    for path in (ROOT / "sentfast").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("import", "from"):
                found.add(words[1].partition(".")[0].rstrip(","))
    assert found - declared <= set(sys.stdlib_module_names), found - declared - set(sys.stdlib_module_names)


def test_the_tools_know_this_machine(setup):
    assert setup["compiler"](platform.system()) and "scalar" in setup["tiers"](platform.machine())
