"""Installs this checkout in every way, on the oldest and the newest PyTorch: `make installs`.

Six ways (isolated, not isolated, wheel, source archive, editable, git) x two sets of packages x two Pythons, and in
each environment once without kernels. Each ends with `doctor`, whose exit status and instruction set are checked, and
an `encode` that is compared with stock, in one process that must warn of nothing (without kernels: once). Every pair of
Python and packages has one environment, out of which sentfast is uninstalled between the ways; an isolated build sees
nothing of it all the same. Each result is printed, and appended to build/installs.jsonl, as its way ends.

The CUDA library is left out (SENTFAST_CUDA=0) though the PyTorch of the package index has CUDA on Linux: six
architectures would be compiled for each way. `--cuda "80"` compiles it for these.

Downloads several gigabytes per Python. PATH=/usr/lib/ccache:$PATH lets the ways share what they compile, and
`--keep FOLDER --only "3.13 newest *"` runs a part on environments that stay.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "installs.jsonl"
SETS = {
    "oldest": ("torch==2.10.0", "sentence-transformers==5.1.2", "transformers==4.57.6"),
    "newest": ("torch==2.15.0", "sentence-transformers==6.2.0", "transformers==5.24.0"),
}
# The last releases for Python 3.10 are older.
LAST = {("newest", "3.10"): ("torch==2.14.1", "sentence-transformers==6.2.0", "transformers==5.20.2")}
PYTHONS = ("3.10", "3.13")
TOOLS = ("setuptools>=77", "wheel", "build", "ninja", "pybind11>=2.12")

# `python -m sentfast doctor --json` and an encode, in one process: importing takes longer than both.
CHECK = """
import contextlib, io, json, runpy, sys, tempfile
from pathlib import Path
tests, sys.argv = sys.argv[1], ["sentfast", "doctor", "--json"]
printed, code = io.StringIO(), 0
with contextlib.redirect_stdout(printed):
    try:
        runpy.run_module("sentfast", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
sys.path.insert(0, tests)
import torch
import sentfast, tiny_models
model = tiny_models.build(tiny_models.save_base(Path(tempfile.mkdtemp()), "bert"))
texts = ["the weather", "a query: the passage", "x", "in the weather the query and the passage"]
sentfast.report(reset=True)
ours = torch.from_numpy(model.encode(texts))
ran = {f"{name} {backend}" for name, backend in sentfast.report().calls}
with sentfast.disabled():
    stock = torch.from_numpy(model.encode(texts))
close = torch.allclose(ours, stock, atol=1e-5)
found = {"code": code, "close": close, "ran": sorted(ran), "torch": torch.__version__, "file": sentfast.__file__}
print(json.dumps({**found, "doctor": json.loads(printed.getvalue())}))
"""


class Environment:
    """One virtual environment with its packages, in a folder that is no clone."""

    def __init__(self, folder: Path, python: str, packages: tuple[str, ...], cuda: str | None):
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        # The machine's own constraints must not choose the versions.
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("SENTFAST_")}
        self.variables |= {"PIP_CONSTRAINT": os.devnull, "PYTHONPATH": ""}
        self.variables |= {"SENTFAST_CUDA": "0"} if cuda is None else {"SENTFAST_CUDA_ARCHS": cuda}
        if not (folder / "ready").exists():
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
            self.pip("install", "-q", *packages, *TOOLS)
            (folder / "ready").touch()

    def run(self, *command: str, **variables: str) -> tuple[str, str]:
        """What a command of this Python writes to both streams; one that fails is an error."""
        environment = {**self.variables, **variables}
        words = [self.python, *command]
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, env=environment)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout, done.stderr

    def pip(self, *words: str, **variables: str) -> None:
        self.run("-m", "pip", "--disable-pip-version-check", *words, **variables)

    def check(self, kernels: bool) -> dict[str, object]:
        """What the installed package says of itself and computes, with what is wrong about that under "wrong"."""
        out, err = self.run("-c", CHECK, str(ROOT / "tests"))
        found = json.loads(out.splitlines()[-1])
        doctor, warned = found["doctor"], err.count("SentfastWarning: ")
        isas, isa = doctor["machine"]["cpu isas"], doctor["machine"]["cpu isa selected"]
        wrong = []
        if found["code"] != doctor["exit_code"] or found["code"] != (0 if kernels else 3):
            wrong.append(f"doctor: {found['code']}: {doctor['verdict']}: {doctor['broken'] + doctor['stock']}")
        if kernels and (len(isas) < 2 or isa not in isas[-2:]):
            wrong.append(f"instruction set {isa} of {isas}")
        if not found["close"] or ("encoder cpu" in found["ran"]) != kernels:
            wrong.append(f"encode: close to stock: {found['close']}; ran: {found['ran']}")
        if warned != (0 if kernels else 1):
            wrong.append(f"{warned} warnings: {err[-1000:]}")
        return {"torch": found["torch"], "doctor": found["code"], "isa": isa, "wrong": "; ".join(wrong)}


def copy_of_sources(folder: Path) -> Path:
    """What git would send: the tracked files and the new ones, as a repository of its own."""
    clone = folder / "a clone"  # a space in the path is part of the test
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "sources"]):
        subprocess.run([*git, *words], cwd=clone, check=True)
    return clone


def wheel(environment: Environment, clone: Path) -> None:
    environment.pip("wheel", "-q", "--no-deps", "-w", str(clone.parent / "wheels"), str(clone))
    _install_newest(environment, clone.parent / "wheels", "*.whl")


def archive(environment: Environment, clone: Path) -> None:
    environment.run("-m", "build", "-q", "--sdist", "--no-isolation", "-o", str(clone.parent / "sdist"), str(clone))
    _install_newest(environment, clone.parent / "sdist", "*.tar.gz")


def _install_newest(environment: Environment, folder: Path, pattern: str) -> None:
    newest = max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    environment.pip("install", "-q", "--force-reinstall", "--no-deps", str(newest))


WAYS = {
    "isolated": lambda e, clone: e.pip("install", "-q", str(clone)),
    "not isolated": lambda e, clone: e.pip("install", "-q", "--no-build-isolation", str(clone)),
    "wheel": wheel,
    "sdist": archive,
    "editable": lambda e, clone: e.pip("install", "-q", "-e", str(clone)),
    # pip keeps what it has built of a commit, also for another PyTorch.
    "git": lambda e, clone: e.pip("install", "-q", "--no-cache-dir", f"git+{clone.as_uri()}"),
    "without kernels": lambda e, clone: e.pip("install", "-q", str(clone), SENTFAST_NO_EXT="1"),
}


def one(environment: Environment, way: str, clone: Path) -> dict[str, object]:
    try:
        environment.pip("uninstall", "-q", "-y", "sentfast")
        for left in (clone / "build", *clone.glob("sentfast/*.so"), *clone.glob("sentfast/_build.json")):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        WAYS[way](environment, clone)
        return environment.check(way != "without kernels")
    except (RuntimeError, ValueError) as error:
        return {"wrong": str(error)}


def found_python(version: str) -> str | None:
    """On PATH, or among those of pyenv."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    others = sorted(versions.glob(f"{version}.*/bin/python{version}"))
    command = shutil.which(f"python{version}")
    works = command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0
    return command if works else str(others[-1]) if others else None


def record(result: dict[str, object]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(result) + "\n")
    name, wrong = result["name"], result["wrong"]
    print(f"{name}: {wrong or 'OK'} ({result.get('isa')}, {result['seconds']} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help='names as printed, with wildcards: "3.13 newest *", "* wheel"')
    parser.add_argument("--keep", type=Path, help="folder in which the environments stay for the next run")
    parser.add_argument("--python", action="append", help=f"another Python than {' and '.join(PYTHONS)}: 3.14")
    parser.add_argument("--cuda", metavar="ARCHS", help='compile the CUDA library too, for these: "80 90a"')
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        clone = copy_of_sources(folder)
        for python in options.python or PYTHONS:
            for packages in SETS:
                names = {f"{python} {packages} {way}": way for way in WAYS}
                chosen = [name for name in names if any(fnmatch.fnmatch(name, only) for only in options.only or "*")]
                command = found_python(python)
                if command is None:
                    for name in chosen:
                        print(f"NOT RUN, no python{python}: {name}")
                if command is None or not chosen:
                    continue
                place = (options.keep or folder).resolve() / f"python{python}-{packages}"
                wanted = LAST.get((packages, python), SETS[packages])
                environment = Environment(place, command, wanted, options.cuda)
                for name in chosen:
                    start = time.monotonic()
                    result = one(environment, names[name], clone)
                    failed += bool(result["wrong"])
                    record({"name": name, **result, "seconds": round(time.monotonic() - start)})
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
