"""The CUDA library as setup.py links it: what it needs is there, and it really loads beside a PyTorch without CUDA.

Its objects are those of `make ptx`, which hold PTX and no machine code; everything else is what is installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from ptx import build

import sentfast.functional  # noqa: F401  (defines the operators)
from sentfast import native, registry

ARCHITECTURE = "80"
BUILT = build.FOLDER / f"cuda-{ARCHITECTURE}"
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not (BUILT / "_cuda.so").exists(), reason="needs nvcc and `make ptx`"
)
# What only a PyTorch with CUDA exports. The stand-in for it returns the default stream.
FROM_CUDA = {"aoti_torch_get_current_cuda_stream"}
STAND_IN = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return device * 0; }"


def lines(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked by the command of setup.py, against an empty libtorch_cuda.so."""
    setup, folder = build.recipe(), tmp_path_factory.mktemp("cuda")
    (folder / "empty.c").write_text("")
    subprocess.run(stand_in_command(folder, folder / "empty.c"), check=True)
    objects = " ".join(str(BUILT / f"{name}.o") for name in build.CUDA_SOURCES)
    command = setup["cuda_link_command"]("nvcc", setup["Torch"].find().lib, folder)
    made = folder / "_cuda.so"
    subprocess.run(command.replace("$in", objects).replace("$out", str(made)), shell=True, check=True)
    return made


def stand_in_command(folder: Path, source: Path) -> list[str]:
    soname = "-Wl,-soname,libtorch_cuda.so"
    return ["g++", "-shared", "-x", "c", str(source), "-o", str(folder / "libtorch_cuda.so"), soname]


def test_needs_both_libraries_of_pytorch_by_name_alone(library: Path) -> None:
    dynamic = "\n".join(lines("readelf", "-d", library))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not re.search(r"RPATH|RUNPATH", dynamic)
    assert not any("cudart" in name or "/" in name for name in needed)


def test_every_symbol_that_it_lacks_is_exported(library: Path) -> None:
    missing = {line.split()[-1].split("@")[0] for line in lines("nm", "-D", "--undefined-only", library)}
    of_torch = {name for name in missing if name.startswith(("aoti_", "torch_"))}
    folder = Path(torch.__file__).parent / "lib"
    exported = {line.split()[-1] for line in lines("nm", "-D", "--defined-only", folder / "libtorch_cpu.so")}
    if (folder / "libtorch_cuda.so").exists():
        exported |= {line.split()[-1] for line in lines("nm", "-D", "--defined-only", folder / "libtorch_cuda.so")}
    else:
        exported |= FROM_CUDA
    assert of_torch and of_torch <= exported, of_torch - exported
    assert not any(name.startswith(("cuda", "__cuda", "cu")) for name in missing), "the runtime is not linked in"


def load(library: str, stand_in: str) -> None:
    """In a process of its own: opens the library and tells what it has entered."""
    if stand_in:
        ctypes.CDLL(stand_in)
    torch.ops.load_library(library)
    entered = [
        name
        for name, op in registry.ops.items()
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.cuda.name(), "CUDA")
    ]
    print(json.dumps(entered))


def loaded(library: Path, stand_in: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, __file__, str(library), stand_in]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_loads_and_enters_its_operators(library: Path, tmp_path: Path) -> None:
    (tmp_path / "stand_in.c").write_text(STAND_IN)
    subprocess.run(stand_in_command(tmp_path, tmp_path / "stand_in.c"), check=True)
    done = loaded(library, str(tmp_path / "libtorch_cuda.so"))
    assert done.returncode == 0, done.stderr[-2000:]
    in_sources = set()
    for name in build.CUDA_SOURCES:
        text = (build.ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()
        in_sources |= set(re.findall(r'm\.impl\("(\w+)"', text))
    assert set(json.loads(done.stdout.splitlines()[-1])) == in_sources
    assert in_sources <= registry.ops.keys()


def test_a_symbol_that_is_missing_is_named(library: Path, tmp_path: Path) -> None:
    """As where the PyTorch at hand is older than the library: the libraries are there, but not all that they had."""
    (tmp_path / "empty.c").write_text("")
    subprocess.run(stand_in_command(tmp_path, tmp_path / "empty.c"), check=True)
    done = loaded(library, str(tmp_path / "libtorch_cuda.so"))
    assert done.returncode != 0
    reason = native.why_not_loaded(done.stderr)
    assert f"symbol {next(iter(FROM_CUDA))} is missing" in reason


def arguments_of(name: str) -> Iterator[tuple[Any, ...]]:
    """What the public functions call the operator with, in the table of tests."""
    op, found = registry.ops[name], []

    def recording(*args: Any) -> Any:
        found.append(args)
        return op.reference(*args)

    with pytest.MonkeyPatch.context() as patch:
        choose = registry.Op.choose
        chosen = ("reference", recording)
        patch.setattr(registry.Op, "choose", lambda self, *args: chosen if self is op else choose(self, *args))
        with registry.use_backend("reference"):
            for case in CASES:
                if not any(wanted in (name, name.removesuffix("_forward")) for wanted in case.operators):
                    continue
                for call in list(case.calls(torch.float32, "cpu", True))[:4]:
                    leaves = tuple(x.requires_grad_() for x in call.tensors)
                    result = case.function(*leaves, **call.options)
                    if result.requires_grad and result.numel():
                        result.sum().backward()
    yield from found


def test_every_fake_has_the_shapes_of_the_definition() -> None:
    seen = set()
    for name, op in registry.ops.items():
        for args in arguments_of(name):
            with torch.no_grad():
                expected = op.reference(*args)
                got = op.overload(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
            pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True)
            for fake, real in pairs:
                assert fake.is_meta and fake.shape == real.shape and fake.dtype == real.dtype, (name, fake, real)
            seen.add(name)
    assert len(seen) > 10, seen


if __name__ == "__main__":
    load(*sys.argv[1:])
