"""A pure install, a library that does not fit, and the environment variables, each in a process of its own."""

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

from sentfast import functional, install, native

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NUMBER = install.sources(ROOT / "csrc")
FITTING = {
    "sources": NUMBER,
    "torch": torch.__version__,
    "torch_target": [2, 10],
    "python": platform.python_version(),
    "ext_suffix": SUFFIX,
    "cuda": False,
}

REMEDY = "python -m pip install --force-reinstall --no-deps "

# Prints what happened as one line of JSON: results against the definition, files touched, the doctor.
USE_EVERYTHING = """
import json, sys
touched = set()
def watch(event, args):
    if event in ("import", "open") and any("sentfast/_C." in str(a) for a in args):
        touched.add(event)  # "open" is to read it, "import" to let the linker open it
sys.addaudithook(watch)
import sentfast
assert "torch" not in sys.modules
import sentfast.functional as F
import torch
import sentfast.kernels
from sentfast import reference as R
x, a, b = torch.randn(3, 7, 20), torch.randn(5, 20), torch.randn(5, 20)
mask = (torch.rand(3, 7) < 0.6).long()
eps = R.NORMALIZE_EPS
pairs = {
    "pool": (F.pool(x, mask, mode="max"), R.pool_forward(x, mask, None, [R.MAX], 0, False)[0]),
    "l2_normalize": (F.l2_normalize(a), R.l2_normalize_forward(a, eps)[0]),
    "cosine_similarity": (F.cosine_similarity(a, b), R.cosine_similarity_forward(a, b, eps)[0]),
    "dot_similarity": (F.dot_similarity(a, b), R.dot_similarity(a, b)),
    "pairwise_similarity": (
        F.pairwise_similarity(a, b, "euclidean"), R.pairwise_similarity_forward(a, b, R.EUCLIDEAN, eps)[0]
    ),
    "pairwise_cosine_similarity": (
        F.pairwise_cosine_similarity(a, b), R.pairwise_similarity_forward(a, b, R.COSINE, eps)[0]
    ),
    "contrastive_loss": (
        torch.isclose(
            F.contrastive_loss(a, b), torch.nn.functional.cross_entropy(20 * F.cosine_similarity(a, b), torch.arange(5))
        ),
        torch.tensor(True),
    ),
    "linear": (F.linear(a, b), R.product(a, b.t(), None)),
    "linear_activation": (F.linear_activation(a, b), R.linear_activation(a, b, None, 0)),
    "bias_activation": (F.bias_activation(a, b[0]), R.bias_activation(a, b[0], 0)),
    "dropout": (F.dropout(a, 0.3, seed=1), R.dropout(a, 0.3, 1, 0)),
    "dropout_add_layer_norm": (
        F.dropout_add_layer_norm(a, b, a[0]), R.dropout_add_layer_norm_forward(a, b, a[0], None, 1e-5, 0.0, 0, 0)[0]
    ),
}
packed = x.view(3, 7, 2, 10).transpose(0, 1)
ends = torch.tensor([0, 4, 7], dtype=torch.int32)
expected = R.varlen_attention_forward(*packed.unbind(1), ends, 4, None, 10**-0.5, -1, -1, 0.0, 0, 0)[0]
pairs["varlen_attention"] = F.varlen_attention(*packed.unbind(1), ends), expected
pairs["varlen_attention_qkvpacked"] = F.varlen_attention_qkvpacked(packed, ends), expected
print(json.dumps({
    "equal": {name: torch.equal(*pair) for name, pair in pairs.items()},
    "ran": sorted({backend for _, backend in sentfast.report().calls}),
    "enabled": sentfast.is_enabled(),
    "touched": sorted(touched),
    "files": [sentfast.__file__, sentfast.kernels.__file__],
    "doctor": sentfast.doctor().to_dict() if "doctor" in sys.argv else None,
}))
"""

needs_library = pytest.mark.skipif(not native.cpu_loaded(), reason="the CPU library is not compiled")


def run(code: str, cwd: Path, *arguments: str, site: Path | None = None, **variables: str) -> tuple[int, str, str]:
    """Runs a program in a fresh process without this one's SENTFAST_* settings; `site` is first on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SENTFAST_")}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, **variables},
    )
    return done.returncode, done.stdout, done.stderr


def warnings_of(err: str) -> list[str]:
    """What a plain script shows of our warnings."""
    return [line.partition("SentfastWarning: ")[2] for line in err.splitlines() if "SentfastWarning: " in line]


def use_everything(site: Path, *arguments: str, **variables: str) -> dict:
    code, out, err = run(USE_EVERYTHING, site, *arguments, site=site, **variables)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    found["warnings"] = warnings_of(err)
    assert all(Path(file).is_relative_to(site) for file in found["files"]), found["files"]
    assert set(found["equal"]) == set(functional.__all__)
    assert all(found["equal"].values()), found["equal"]
    assert found["ran"] == ["reference"]
    return found


@pytest.fixture(scope="module")
def pure_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed with SENTFAST_NO_EXT=1 from a copy of the sources in which an old build has left its libraries."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("pure")
    for name in ("sentfast", "kernels"):
        ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    plant(source, FITTING)
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, "SENTFAST_NO_EXT": "1"},
    )
    assert done.returncode == 0, done.stderr
    return target


def plant(site: Path, info: dict | str, number: str = NUMBER) -> None:
    """A library that cannot be loaded, with the number of its sources, and the note about it."""
    (site / "sentfast" / f"_C{SUFFIX}").write_text(f"not a library; {install.mark(number)}")
    (site / "sentfast" / "_build.json").write_text(info if isinstance(info, str) else json.dumps(info))


@pytest.fixture
def planted(pure_install: Path, tmp_path: Path) -> Path:
    site = tmp_path / "site"
    shutil.copytree(pure_install, site)
    return site


def test_pure_install(pure_install: Path) -> None:
    names = {path.name for path in pure_install.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"sentfast"}
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name for path in (pure_install / "sentfast" / "kernels").glob("*.py")} == kernels
    assert (pure_install / "sentfast" / "py.typed").exists()
    assert not list(pure_install.rglob("*.so")) and not list(pure_install.rglob("_build.json"))
    found = use_everything(pure_install, "doctor")
    (warning,) = found["warnings"]
    assert "everything runs at stock speed" in warning and REMEDY in warning, warning
    diagnosis = found["doctor"]
    assert diagnosis["healthy"], diagnosis["broken"]
    said = diagnosis["missing"] if torch.cuda.is_available() else diagnosis["stock"]
    assert any("without compiled libraries" in line and REMEDY in line for line in said), diagnosis
    assert diagnosis["exit_code"] == (0 if torch.cuda.is_available() else 3)


def test_a_clone_that_hides_the_installed_package_is_noticed(planted: Path, tmp_path: Path) -> None:
    """A script started in the root of the sources imports those, which have no kernels."""
    plant(planted, FITTING)
    root = tmp_path / "clone"
    (root / "csrc").mkdir(parents=True)
    shutil.copytree(planted / "sentfast", root / "sentfast", ignore=shutil.ignore_patterns("*.so", "_build.json"))
    shutil.copy(ROOT / "setup.py", root)
    code, out, err = run("import sentfast.functional; print(sentfast.doctor())", root, site=planted)
    assert code == 0, err
    (warning,) = warnings_of(err)
    for text in (warning, out):
        assert f"another folder than {root}, whose sources shadow the installed package in {planted}/sentfast" in text
    assert out.startswith("healthy, but at stock speed") or torch.cuda.is_available()


def test_a_compile_that_failed_is_remembered(planted: Path) -> None:
    plant(planted, {"failed": "compiling failed: x.cpp:1: error: nothing"})
    found = use_everything(planted, "doctor")
    (warning,) = found["warnings"]
    assert "x.cpp:1: error: nothing" in warning and REMEDY in warning, warning
    assert found["doctor"]["healthy"] and found["touched"] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"torch_target": [99, 0]}, ("PyTorch 99.0", torch.__version__)),
        ({"ext_suffix": ".cpython-399-none.so", "python": "3.99.1"}, ("Python 3.99.1", platform.python_version())),
    ],
    ids=["other-torch", "other-python"],
)
def test_library_that_does_not_fit_is_not_opened(planted: Path, change: dict, named: tuple[str, ...]) -> None:
    plant(planted, {**FITTING, **change})
    found = use_everything(planted)
    (warning,) = found["warnings"]
    assert all(text in warning for text in (*named, REMEDY)), warning
    assert "did not load" not in warning and found["touched"] == []


def other(number: str) -> str:
    """A number of sources that differs in one place, drawn."""
    place = int(torch.randint(len(number), ()))
    return number[:place] + "g" + number[place + 1 :]


def test_library_that_another_note_is_about_is_not_opened(planted: Path) -> None:
    """The files of two installations mixed: what the library takes and gives may be another."""
    plant(planted, FITTING, number=other(NUMBER))
    found = use_everything(planted, "doctor")
    (warning,) = found["warnings"]
    assert f"_C{SUFFIX} is not the one that _build.json is about" in warning and REMEDY in warning, warning
    assert "import" not in found["touched"]
    assert found["doctor"]["exit_code"] == 4 and any(REMEDY in line for line in found["doctor"]["broken"])


def test_a_library_is_known_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "clone", lambda: None)
    library = tmp_path / "library"
    assert native.why_stale(FITTING, library) == f"{library} is not there"
    around = [bytes(torch.randint(256, (int(torch.randint(9999, ())),)).tolist()) for _ in range(2)]
    library.write_bytes(install.mark(NUMBER).encode().join(around))
    assert native.why_stale(FITTING, library) == ""
    without = {name: value for name, value in FITTING.items() if name != "sources"}
    assert "is not the one" in native.why_stale(without, library)
    for content in (b"", around[0], install.mark(other(NUMBER)).encode().join(around)):
        library.write_bytes(content)
        assert "is not the one that _build.json is about" in native.why_stale(FITTING, library)


def test_a_damaged_note_costs_one_message(planted: Path) -> None:
    """Each of its fields missing or of another kind, too; an older build's, without a number, is whole."""
    fields = [name for name in FITTING if name != "sources"]
    texts = ["{", "[]", "null", "7", '{"failed": 7}', *(json.dumps({**FITTING, name: None}) for name in fields)]
    texts += [json.dumps({**FITTING, "torch_target": wrong}) for wrong in ([], [2], ["2", "10"], [2, 10, 0])]
    for text in texts:
        plant(planted, text)
        note = install.note(planted / "sentfast")
        assert set(note) == {"damaged"} and "cannot be read" in native.why_unfit(note), text
    plant(planted, texts[int(torch.randint(len(texts), ()))])
    found = use_everything(planted)
    (warning,) = found["warnings"]
    assert "_build.json, cannot be read: " in warning and REMEDY in warning, warning
    assert found["touched"] == []
    plant(planted, FITTING)
    assert install.note(planted / "sentfast") == FITTING


def test_a_library_from_another_state_of_a_clone_is_not_opened(planted: Path) -> None:
    """After `git pull` without a new build."""
    csrc = planted / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copy(ROOT / "setup.py", planted)
    plant(planted, FITTING)
    (csrc / "notes.txt").write_text("is not compiled")
    assert install.sources(csrc) == NUMBER
    compiled = sorted(path for path in csrc.rglob("*") if path.is_file() and path.suffix != ".txt")
    path = compiled[int(torch.randint(len(compiled), ()))]
    before = path.read_bytes()
    changes = [
        lambda: path.write_bytes(before + b"\n"),
        lambda: path.rename(path.with_name(f"x{path.name}")),
        lambda: path.with_name(f"x{path.name}").unlink(),
    ]
    for change in changes:
        change()
        assert install.sources(csrc) != NUMBER, path
    found = use_everything(planted)
    (warning,) = found["warnings"]
    assert f"compiled from another state of the sources than {csrc} has now" in warning, (path, warning)
    assert f"-e {planted}" in warning and found["touched"] == []


def test_the_library_in_use_has_the_number_of_these_sources() -> None:
    if native.cpu_loaded():
        assert native.build_info()["sources"] == NUMBER


@pytest.mark.parametrize("disable", ["0", "1"])
def test_library_that_does_not_load(planted: Path, disable: str) -> None:
    plant(planted, FITTING)
    found = use_everything(planted, SENTFAST_DISABLE=disable)
    (warning,) = found["warnings"]
    assert "did not load" in warning and REMEDY in warning
    assert "import" in found["touched"]  # it was tried: the audit above sees a library that is opened
    assert found["enabled"] == (disable == "0")


def unusable_isas() -> list[str]:
    """A name that does not exist, and the instruction sets that exist but not on this CPU."""
    names = runpy.run_path(str(ROOT / "setup.py"), run_name="names")
    known = names["TIERS"] | names["ARM_TIERS"]
    return ["bogus", *(name for name in known if name not in native.supported_cpu_isas())]


@needs_library
@pytest.mark.parametrize("name", unusable_isas())
def test_unusable_isa_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cpu_isa: .*{name}"):
        native.cpu_isa(name)
    # The second time too, when the library has been opened before.
    twice = "import sentfast\ntry:\n    sentfast.cpu_isa()\nexcept ValueError:\n    sentfast.cpu_isa()"
    for program in ("import sentfast.functional", twice):
        code, _, err = run(program, tmp_path, SENTFAST_CPU_ISA=name)
        message = err.splitlines()[-1]
        assert code == 1 and message.startswith("ValueError: SENTFAST_CPU_ISA: ") and name in message, err


@needs_library
@pytest.mark.parametrize("name", native.supported_cpu_isas()[-2:])
def test_isa_is_selected_at_start(name: str, tmp_path: Path) -> None:
    code, out, err = run("import sentfast; print(sentfast.cpu_isa())", tmp_path, SENTFAST_CPU_ISA=name)
    assert (code, out.strip()) == (0, name), err


def test_unknown_backend_is_an_error(tmp_path: Path) -> None:
    code, _, err = run("import sentfast.functional", tmp_path, SENTFAST_BACKEND="bogus")
    message = err.splitlines()[-1]
    assert code == 1 and message.startswith("ValueError: SENTFAST_BACKEND: ") and "'bogus'" in message, err


def test_strict_refuses_the_reference(tmp_path: Path) -> None:
    code, _, err = run(
        "import sentfast, torch; sentfast.functional.l2_normalize(torch.ones(2, 2, dtype=torch.float64))",
        tmp_path,
        SENTFAST_STRICT="1",
    )
    message = err.splitlines()[-1]
    assert code == 1 and "BackendError: " in message and "SENTFAST_STRICT=1" in message and "float64" in message, err
