"""What goes wrong is seen by a plain script, once, without logging being set up."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import sentfast
import sentfast.ops  # opens the libraries
from sentfast import native

ROOT = Path(sentfast.__file__).resolve().parent.parent


def script(code: str, folder: Path, **variables: str) -> tuple[str, list[str]]:
    """stdout, and what the script shows of our warnings: each with its file and line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SENTFAST_")}
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = folder / "program.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, "PYTHONPATH": path, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "SentfastWarning: " in line]


def test_an_unknown_version_is_seen(tmp_path: Path) -> None:
    """No attribute of it is patched, and the doctor does not call that plain healthy."""
    major = int(torch.randint(7, 99, ()))
    (tmp_path / "sentence_transformers.py").write_text(f"__version__ = '{major}.0.1'")
    code = """
import sentfast
import sentence_transformers
sentfast.disable()
sentfast.enable()
diagnosis = sentfast.doctor()
print(diagnosis.exit_code, *diagnosis.stock, *diagnosis.missing)
"""
    out, shown = script(code, tmp_path)
    mine = [line for line in shown if f"sentence-transformers {major}.0.1 is not known and not accelerated" in line]
    assert len(mine) == 1 and mine[0].startswith(f"{tmp_path}/program.py:3: "), shown
    assert out.startswith("3 ") and "nothing of it is patched" in out, out


@pytest.mark.skipif(not native.cpu_loaded(), reason="without the library there is another warning")
def test_bf16_without_products_is_seen(tmp_path: Path) -> None:
    isas = [isa for isa in native.supported_cpu_isas() if isa != "avx512_bf16"]
    isa = isas[int(torch.randint(len(isas), ()))]
    code = """
import sentfast
from transformers import BertConfig, BertModel
sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = BertModel(BertConfig(**sizes)).eval()
sentfast.accelerate(model, precision="bf16")
sentfast.accelerate(model, precision="bf16")
print(sentfast.precision_of(model))
"""
    out, (line,) = script(code, tmp_path, SENTFAST_CPU_ISA=isa)
    assert line.startswith(f"{tmp_path}/program.py:6: "), line
    assert f"precision 'bf16': the CPU kernels in use ({isa}) have no bfloat16 products" in line
    assert out == "match\n"


def test_warnings_can_be_errors_and_can_be_silenced(tmp_path: Path) -> None:
    catch = """
import warnings
warnings.simplefilter({action!r})
try:
    import sentfast
    print("imported")
except UserWarning as error:
    print(type(error).__name__)
"""
    assert script(catch.format(action="error"), tmp_path, SENTFAST_NO="1") == ("SentfastWarning\n", [])
    assert script(catch.format(action="ignore"), tmp_path, SENTFAST_NO="1") == ("imported\n", [])


@pytest.mark.parametrize(
    ("isa", "asked", "structure", "products"),
    [
        ("scalar", False, False, False),
        ("neon", False, True, False),
        ("neon_bf16", False, True, False),
        ("avx2", False, True, True),
        ("avx512_bf16", False, True, True),
        ("scalar", True, True, True),
        ("neon", True, True, True),
    ],
)
def test_what_nobody_has_measured_runs_only_where_it_does_less(isa, asked, structure, products) -> None:
    assert native.scope(isa, asked) == (structure, products)


@pytest.mark.skipif(not native.cpu_loaded(), reason="without the library there is another reason")
def test_kernels_without_a_measurement_leave_products_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Arm: the encoder and matrices of scores are stock, pooling and pairwise similarity are ours."""
    from encoders import model
    from sentence_transformers import util

    monkeypatch.setattr(native.state, "products", False)
    sentfast.report(reset=True)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(util.cos_sim(a, b).diagonal(), util.pairwise_cos_sim(a, b))
    report = sentfast.report()
    assert report.fallbacks == {("cos_sim", "SF131"): 1}
    assert report.calls == {("pairwise_similarity", "cpu"): 1}
    (row,) = sentfast.explain(model("bert")).rows
    assert row.reason == "SF131" and "SENTFAST_CPU_ISA" in str(row)
    monkeypatch.setattr(native.state, "structure", False)
    util.pairwise_cos_sim(a, b)
    assert sentfast.report().fallbacks["pairwise_cos_sim", "SF131"] == 1
    with sentfast.use_backend("cpu"):
        util.cos_sim(a, b)
    assert ("cosine_similarity", "cpu") in sentfast.report().calls


# Programs that bring about every warning, each twice: a part is done, and then done again.
PATCHING = """
import sentence_transformers  # a module that imports sentfast before it has run to its end
import sentfast
for _ in range(2):
    sentfast.disable()
    sentfast.enable()
from sentfast import install, native, report
real = sentfast.ops.native.build_info() if sentfast.functional else None
for torch_has, note in ((None, {}), (None, {"damaged": "by hand"}), ("13.0", {**real, "cuda": True})):
    native.torch.version.cuda = torch_has
    install.note = lambda folder: note
    for _ in range(2):
        native.build_info.cache_clear()
        native.load()
"""
FAKE = "import sentfast; __version__ = '99.0'"
MODELS = """
import contextlib, sys, types
import torch
import sentfast
from sentence_transformers import models, util
from transformers import BertConfig, BertModel
from sentfast.encoder import graphs, packed, verify
from sentfast.integrations import hidden_rows, sentence_transformers as table, similarity, tail_proof

sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
def model(**other):
    return BertModel(BertConfig(**{**sizes, **other})).eval()

def patched_by_others():
    sentfast.disable()
    original = models.Normalize.forward
    models.Normalize.forward = lambda self, features: features
    sentfast.enable()
    models.Normalize.forward = original
    sentfast.disable()
    sentfast.enable()
    ours = models.Normalize.forward
    models.Normalize.forward = lambda self, features: features
    sentfast.disable()
    models.Normalize.forward = ours
    sentfast.disable()
    sentfast.enable()

def patching_fails():
    sites, table.sites = table.sites, lambda: 1 / 0
    sentfast.disable()
    sentfast.enable()
    table.sites = sites
    sentfast.disable()
    sentfast.enable()

def accelerated():
    sentfast.accelerate(torch.nn.ModuleDict({"good": model(), "bad": model(hidden_size=40, num_attention_heads=4)}))
    sentfast.accelerate(model(), precision="bf16")

def padded():
    hidden_rows._warned = False  # as it keeps its own count
    mask = torch.tensor([[1, 1], [1, 0]])
    with torch.no_grad():
        sentfast.accelerate(model())(torch.ones(2, 2, dtype=torch.long), mask)

def other_results():
    tried = verify._verify
    verify._verify = lambda *args: verify.Refusal("SF129", "other numbers")
    with torch.no_grad():
        sentfast.accelerate(model())(torch.ones(2, 2, dtype=torch.long))
    verify._verify = tried
    cosines = similarity.cosines
    similarity.cosines = lambda *args, **kwargs: cosines(*args, **kwargs) * 2
    sentfast.disable()
    sentfast.enable()
    util.cos_sim(torch.randn(3, 8), torch.randn(4, 8))
    similarity.cosines = cosines

def another_tail():
    both = tail_proof._both
    tail_proof._both = lambda found, parts: (torch.ones(2, 4), torch.zeros(2, 4))
    found = types.SimpleNamespace(encoder=object.__new__(tail_proof.Encoder))
    tail_proof._prove(found, [models.Normalize()])
    tail_proof._both = both

class NoCapture:
    def record(self, run):
        raise RuntimeError("no GPU")

def no_graphs():
    made = graphs.Graphs(NoCapture(), torch.device("cpu"))
    made._often = lambda key: True
    made._new("key", None, False, graphs.Shape(64, 8, 64), ())

for part in (patched_by_others, patching_fails, accelerated, padded, other_results, another_tail, no_graphs):
    for _ in range(2):
        part()
"""


def texts_of_warnings() -> dict[str, re.Pattern]:
    """Where each call of report.warn stands in the sources, and the form of its text."""
    found = {}
    for path in [*(ROOT / "sentfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "warn":
                parts = getattr(node.args[0], "values", node.args)
                form = [re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts]
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = re.compile("".join(form), re.DOTALL)
    return found


@pytest.mark.skipif(not native.cpu_loaded(), reason="without the library there are other warnings")
def test_a_plain_script_shows_every_warning_once(tmp_path: Path) -> None:
    """Every one that the sources have: a new one needs its place in the programs above."""
    (tmp_path / "patching").mkdir()
    (tmp_path / "patching" / "sentence_transformers.py").write_text(FAKE)
    (tmp_path / "models").mkdir()
    isa = next(isa for isa in native.supported_cpu_isas() if isa != "avx512_bf16")
    _, shown = script(PATCHING, tmp_path / "patching")
    _, more = script(MODELS, tmp_path / "models", SENTFAST_CPU_ISA=isa, SENTFAST_NO="1", SENTFAST_STRICT="yes")
    shown += more
    told = [line.partition("SentfastWarning: sentfast: ")[2] for line in shown]
    assert Counter(told) == Counter(set(told)), told
    forms = texts_of_warnings()
    unseen = [place for place, form in forms.items() if not any(form.fullmatch(text) for text in told)]
    assert len(forms) > 10 and not unseen, f"no program brings about {unseen}; seen: {told}"


def test_nothing_is_said_where_a_plain_script_does_not_look() -> None:
    """Log records of level WARNING reach nobody who has not set logging up."""
    sources = [*(ROOT / "sentfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    said = [
        path.name for path in sources if "logger.warning(" in path.read_text() or "logger.error(" in path.read_text()
    ]
    assert sources and not said, f"{said}: sentfast.report.warn shows it"
