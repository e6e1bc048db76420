"""Where this package was installed from, and the command that brings its kernels. Imports no PyTorch."""

from __future__ import annotations

import hashlib
import importlib
import json
import mmap
import os
import shlex
import sys
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
_PIP = "python -m pip install --force-reinstall --no-deps"
_COMPILED = {".cpp", ".h", ".cu", ".cuh"}
_NOTED = {"torch": str, "torch_target": list, "python": str, "ext_suffix": str, "cuda": bool}


def sources(csrc: Path) -> str:
    """A number of what the libraries are compiled from, which no other state of it has; setup.py asks for it too."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in _COMPILED):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def mark(number: str) -> str:
    """The text in a library that was compiled from these sources."""
    return f"sentfast sources {number}"


def marked(library: Path, number: str) -> bool:
    """Whether a library was compiled from these sources, which its bytes say without running any of them."""
    if library.stat().st_size == 0:
        return False
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark(number).encode()) >= 0


def note(package: Path) -> dict[str, Any]:
    """What setup.py wrote beside the libraries: what they were built with, or {"failed": why}; empty if nobody tried.

    {"damaged": what is wrong with it} if it is not what setup.py writes.
    """
    path = package / "_build.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"damaged": f"{type(error).__name__}: {error}"}
    wrong = _wrong_with(found)
    return {"damaged": wrong} if wrong else found


def _wrong_with(found: Any) -> str:
    if not isinstance(found, dict):
        return "it is no table"
    kinds = {"failed": str} if "failed" in found else _NOTED
    wrong = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
    if not wrong and "failed" not in found and [type(part) for part in found["torch_target"]] != [int, int]:
        wrong = ["torch_target"]
    return f"{', '.join(wrong)}: not what a build writes" if wrong else ""


def clone() -> Path | None:
    """The root of the sources in which this package lies; None for an installed one."""
    root = _FOLDER.parent
    return root if (root / "setup.py").exists() and (root / "csrc").is_dir() else None


def shadowed() -> Path | None:
    """An installed copy with compiled libraries that is not imported, because this one stands before it on sys.path."""
    for entry in sys.path:
        other = Path(entry or ".").resolve() / _FOLDER.name
        if other != _FOLDER and (other / "__init__.py").exists() and compiled(other):
            return other
    return None


def compiled(package: Path) -> bool:
    """Whether libraries were compiled for the package in this folder, as its note of the build says."""
    found = note(package)
    return bool(found) and "failed" not in found


def source() -> str:
    """What pip was given, if it is still there: a folder, or the address of a repository. Empty if nobody knows."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        text = metadata.distribution("sentfast").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ""
    origin = json.loads(text) if text else {}
    address = origin.get("url", "")
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{address}"
    parse, request = (importlib.import_module(f"urllib.{name}") for name in ("parse", "request"))
    path = Path(request.url2pathname(parse.urlparse(address).path))
    return str(path) if address.startswith("file:") and (path / "setup.py").exists() else ""


def remedy() -> str:
    """How the compiled libraries come to be there, as a command where there is one."""
    root, other = clone(), shadowed()
    if root is not None and other is not None:
        return (
            f"start Python in another folder than {root}, whose sources shadow the installed package in {other}, "
            f"or compile these too: {_PIP} -e {shlex.quote(str(root))}"
        )
    if root is not None:
        return f"{_PIP} -e {shlex.quote(str(root))}"
    origin = source()
    if "+" in origin.partition(":")[0]:  # pip keeps what it has built of a commit, also what failed
        return f"{_PIP} --no-cache-dir {shlex.quote(origin)}"
    return f"{_PIP} {shlex.quote(origin)}" if origin else f"{_PIP} PATH, a clone of sentfast"


def compiler() -> str:
    """The C++ compiler that setup.py takes; empty if there is none."""
    which = importlib.import_module("shutil").which
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((name for name in names if which(name.split()[0])), "")
