"""The switch: when it patches, what it costs, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import subprocess
import sys
import tempfile
import threading

import pytest
import torch
from sentence_transformers import SentenceTransformer, __version__, losses, models, util
from sentence_transformers.util import cos_sim

import sentfast
from sentfast import switch

pytestmark = pytest.mark.usefixtures("switched_on")
FUNCTIONS = (
    "cos_sim",
    "dot_score",
    "pairwise_cos_sim",
    "pairwise_dot_score",
    "pairwise_euclidean_sim",
    "pairwise_manhattan_sim",
    "pairwise_angle_sim",
    "normalize_embeddings",
    "semantic_search",
    "paraphrase_mining_embeddings",
    "community_detection",
    "mine_hard_negatives",
)
METHODS = ["Transformer.forward", "Pooling.forward", "Normalize.forward", "start_multi_process_pool"]
METHODS += [SentenceTransformer.forward.__qualname__]  # of a base class from 5.4 on
if tuple(map(int, __version__.split(".")[:2])) >= (6, 2):
    METHODS += ["_multi_process_worker", "SentenceTransformer._inference", "encode", "encode_query", "encode_document"]
    METHODS += ["MultiVectorEncoder._inference"]
else:
    METHODS += ["_encode_multi_process_worker", "SentenceTransformer.encode"]
STEPS = {
    "MultipleNegativesRankingLoss": "compute_loss_from_embeddings",
    "CachedMultipleNegativesRankingLoss": "calculate_loss",
    "GISTEmbedLoss": "forward",
    "CachedGISTEmbedLoss": "calculate_loss",
    "MatryoshkaLoss": "forward",
}
if tuple(map(int, __version__.split(".")[:2])) < (5, 3):
    STEPS["MultipleNegativesSymmetricRankingLoss"] = "compute_loss_from_embeddings"
    STEPS["CachedMultipleNegativesSymmetricRankingLoss"] = "calculate_loss"
METHODS += ["InformationRetrievalEvaluator.compute_metrices"]
if tuple(map(int, __version__.split(".")[:2])) >= (5, 4):
    METHODS += ["InformationRetrievalEvaluator.compute_all_metrics"]
METHODS += [f"{name}.{step}" for name, step in STEPS.items()] + ["CachedLossDecorator.__call__"]
COUNT = len(FUNCTIONS) + len(METHODS)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, where sentfast is not imported yet and no SENTFAST_* is set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SENTFAST_")}
    # Not in the repository: its `kernels` folder would hide the package of that name from transformers.
    folder = environment.pop("FOLDER", tempfile.gettempdir())
    environment = {**clean, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)


def snapshot():
    """Everything that the switch may touch, to compare by identity."""
    classes = (models.Transformer, models.Pooling, models.Normalize, *SentenceTransformer.__mro__[:2])
    classes += tuple(getattr(losses, name) for name in STEPS)
    classes += (sys.modules[losses.MatryoshkaLoss.__module__].CachedLossDecorator,)
    return [
        *((name, value) for cls in classes for name, value in vars(cls).items()),
        *((name, getattr(util, name)) for name in FUNCTIONS),
        *((name, getattr(util, name).__code__) for name in FUNCTIONS),
        *((name, getattr(util, name).__defaults__) for name in FUNCTIONS),
        *((name, tuple(vars(getattr(util, name)))) for name in FUNCTIONS),
        *((name, tuple(vars(sys.modules[util.__name__ + name]))) for name in (".similarity", ".tensor")),
        ("meta_path", tuple(sys.meta_path)),
    ]


def same(first, second):
    return [name for (name, a), (_, b) in zip(first, second, strict=True) if a is not b and a != b] == []


ORDERS = {
    "before": "import sentfast\n"
    "from sentence_transformers.util import cos_sim; from sentence_transformers import models",
    "after, the model built": "from sentence_transformers.util import cos_sim\n"
    # On a line of its own: Python 3.13 shows the line with sentence-transformers' own warnings.
    "from sentence_transformers import models; m = models.Pooling(8)\nimport sentfast",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(order):
    code = (
        ORDERS[order]
        + """
import torch
x = torch.ones(1, 2, 8)
m = globals().get("m") or models.Pooling(8)
m({"token_embeddings": x, "attention_mask": torch.ones(1, 2, dtype=torch.long)})
cos_sim(x[0], x[0])
from sentfast import switch
assert len(switch.patched()) == COUNT and not switch.problem()
report = sentfast.report()
ops = {name for name, backend in report.calls} | {name for name, code in report.fallbacks if code == "SF112"}
assert ops in ({"pool", "cosine_similarity"}, {"Pooling.forward", "cos_sim"}), report
sentfast.disable()
sentfast.report(reset=True)
cos_sim(x[0], x[0])
assert not sentfast.report().calls and not sentfast.report().fallbacks
print("silent", end="")
"""
    )
    result = python(code.replace("COUNT", str(COUNT)))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "silent"
    assert "sentfast" not in result.stderr


def test_import_is_silent_and_loads_little():
    code = """
import sys
before = set(sys.modules)
import sentfast
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - {"sentfast"}
assert loaded <= sys.stdlib_module_names, loaded
assert not loaded & {"typing", "dataclasses", "inspect", "json"}, loaded  # the slow ones
assert sentfast.is_enabled() and sentfast.__version__ == "0.1.0" and "functional" in dir(sentfast)
"""
    result = python(code)
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_environment_disables():
    code = """
import sys
before = list(sys.meta_path)
import sentfast
assert sys.meta_path == before and not sentfast.is_enabled()
sentfast.enable()
assert sys.meta_path != before and sentfast.is_enabled()
sentfast.disable()
assert sys.meta_path == before and not sentfast.is_enabled()
"""
    result = python(code, SENTFAST_DISABLE="1")
    assert result.returncode == 0, result.stderr


def test_unknown_environment_variable_is_named():
    """A letter of a known name left out, written twice or changed."""
    known = sorted(switch.ENVIRONMENT)
    name = known[int(torch.randint(len(known), ()))]
    place, edit = int(torch.randint(len("SENTFAST_") + 1, len(name) - 1, ())), int(torch.randint(3, ()))
    wrong = name[:place] + ("", 2 * name[place], "Q")[edit] + name[place + 1 :]
    result = python("import sentfast", **{wrong: "1"}, SENTFAST_STRICT="0")
    lines = [line for line in result.stderr.splitlines() if "SentfastWarning: " in line]
    assert len(lines) == 1 and f"unknown environment variable {wrong}; nearest: {name};" in lines[0], result.stderr
    assert python("import sentfast", SENTFAST_STRICT="0").stderr == ""


def test_a_value_without_a_meaning_is_named():
    result = python("import sentfast", SENTFAST_STRICT="yes")
    assert "SentfastWarning: sentfast: SENTFAST_STRICT: expected one of ('0', '1'), got 'yes'" in result.stderr


def test_broken_configuration_does_not_break_the_import(tmp_path):
    (tmp_path / "sentence_transformers.py").write_text("__version__ = '6.2.0'")
    code = """
import sentfast, sentence_transformers
from sentfast import switch
assert "SENTFAST_BACKEND: expected one of" in switch.problem()
assert type(sentence_transformers.__spec__.loader).__name__ == "SourceFileLoader"
"""
    result = python(code, SENTFAST_BACKEND="fpga", FOLDER=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "sentence-transformers is not accelerated: ValueError: SENTFAST_BACKEND: expected one of" in result.stderr


def test_hundred_cycles_leave_nothing_behind():
    patched = switch.patched()
    # Others are added by their first use, such as a class of transformers whose model an earlier test has left alive.
    ours = [patch.name for patch in switch._ledger if not any(switch._same(patch, site) for site in switch._added)]
    assert len(ours) == COUNT and all(any(name.endswith(end) for name in ours) for end in METHODS)
    sentfast.disable()
    before = snapshot()
    for _ in range(100):
        sentfast.enable()
        sentfast.enable()
        assert not same(before, snapshot())
        sentfast.disable()
        sentfast.disable()
    assert same(before, snapshot()) and switch.patched() == []
    sentfast.enable()
    assert switch.patched() == patched


def test_functions_keep_identity_and_signature():
    on = cos_sim, inspect.signature(cos_sim), cos_sim.__name__, cos_sim.__module__, cos_sim.__doc__
    on_forward = inspect.signature(models.Pooling.forward), models.Pooling.forward.__qualname__
    sentfast.disable()
    assert (cos_sim, inspect.signature(cos_sim), cos_sim.__name__, cos_sim.__module__, cos_sim.__doc__) == on
    assert on_forward == (inspect.signature(models.Pooling.forward), models.Pooling.forward.__qualname__)


def counted() -> bool:
    """Whether a call now runs our code: one that we have to hand over is counted."""
    sentfast.report(reset=True)
    cos_sim([[1.0]], [[1.0]])
    report = sentfast.report()
    return bool(report.calls or report.fallbacks)


def test_disabled_is_of_its_thread():
    inside, seen = threading.Event(), []

    def other():
        inside.wait()
        seen.append((sentfast.is_enabled(), counted()))

    thread = threading.Thread(target=other)
    thread.start()
    with sentfast.disabled():
        assert not sentfast.is_enabled() and not counted()
        with sentfast.disabled():
            pass
        assert not sentfast.is_enabled()
        inside.set()
        thread.join()
    assert seen == [(True, True)]
    assert sentfast.is_enabled() and counted()


def test_disabled_is_of_its_task():
    async def off(entered, leave):
        with sentfast.disabled():
            entered.set()
            await leave.wait()
            return sentfast.is_enabled()

    async def main():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(off(entered, leave))
        await entered.wait()
        here = sentfast.is_enabled(), counted()
        leave.set()
        return here, await task

    assert asyncio.run(main()) == ((True, True), False)


def test_disabled_ends_with_an_exception():
    with pytest.raises(KeyError), sentfast.disabled():
        raise KeyError
    assert sentfast.is_enabled()


def test_a_patch_on_top_of_ours_is_left():
    ours = vars(models.Normalize)["forward"]

    @functools.wraps(ours)
    def theirs(self, features):
        return ours(self, features)

    import torch

    features = {"sentence_embedding": torch.ones(2, 4)}
    models.Normalize.forward = theirs
    try:
        sentfast.report(reset=True)
        with pytest.warns(sentfast.SentfastWarning, match=r"Normalize\.forward was patched by other code"):
            sentfast.disable()
        assert vars(models.Normalize)["forward"] is theirs
        sentfast.report(reset=True)
        models.Normalize()(dict(features))
        assert not sentfast.report().calls and not sentfast.report().fallbacks
        sentfast.enable()
        assert vars(models.Normalize)["forward"] is theirs
        models.Normalize()(dict(features))
        assert sentfast.report().calls or sentfast.report().fallbacks
    finally:
        models.Normalize.forward = ours
    sentfast.disable()
    assert switch.patched() == []


def test_a_patch_before_ours_is_left():
    sentfast.disable()
    original = vars(models.Normalize)["forward"]
    models.Normalize.forward = lambda self, features: {"theirs": True}
    try:
        sentfast.report(reset=True)
        with pytest.warns(sentfast.SentfastWarning, match=r"Normalize\.forward is not the one of sentence-transfor"):
            sentfast.enable()
        assert models.Normalize()({}) == {"theirs": True}
        assert "Normalize.forward" not in switch.patched()
    finally:
        models.Normalize.forward = original
