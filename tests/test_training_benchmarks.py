"""The studies of training on a toy model: they measure, refuse what is wrong, and their rows fill the tables."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
import encode_models
import gate
import limits
import loss
import machine
import report
import studies
import study
import texts
import timing
import training
import training_curve
import training_memory
import training_report
import training_step
from study import OURS, OURS_BF16, STOCK, STOCK_BF16, Settings
from training_step import Learner, Task

import sentfast
from sentfast import native

BACKEND = "cpu" if native.cpu_loaded() else "reference"
LIMITS = dict.fromkeys(limits.LIMITS, 1e10)
SETTINGS = Settings(threads=1, backends=(BACKEND,), quick=True, models=("toy",), rounds=2)
WORDS = ["river", "stone", "cat", "market", "winter", "engine", "paper", "garden", "doctor", "music", "window", "bread"]
GLOSSES = tuple(
    texts.Gloss((f"{word} {other}", word), f"a {word} beside the {other}, seen in {k} places")
    for k, (word, other) in enumerate((word, other) for word in WORDS for other in WORDS)
)


def _toy():
    config = encode_models.bert(layers=1, hidden=64, heads=2)
    tail = lambda modules: [modules.Pooling(64, "mean"), modules.Normalize()]  # noqa: E731
    return encode_models._random(config, 32, tail), "random"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A model and texts that need no network."""
    monkeypatch.setitem(encode_models.MODELS, "toy", encode_models.Model("toy", 32, _toy, {"short": 6, "long": 4}))
    monkeypatch.setattr(texts, "glosses", lambda: GLOSSES)
    draw = lambda count, seed: [" ".join([x.text] * 6) for x in GLOSSES[:count]]  # noqa: E731
    monkeypatch.setitem(texts.KINDS, "long", draw)
    before, threads = sentfast.is_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    timing.switch(False)
    yield
    torch.set_num_threads(threads)
    timing.switch(before)


def finished(measured, rows, name="training_minilm"):
    for row in rows.values():
        measured.finish(row, LIMITS)
        row.update(machine.commit(), study=name)
        json.dumps(row, allow_nan=False)
    return rows


def batch_of(model, count=4, seed=3):
    return training_step.batches_of(model, Task("short", count, 32), 1, seed)[0]


def test_step_rows():
    rows = finished(training, training.measure(SETTINGS))
    assert list(rows) == ["training_toy_short", "training_toy_long"]
    for row in rows.values():
        names = {STOCK, OURS} | ({STOCK_BF16, OURS_BF16} if row["kind"] == "short" else set())
        assert set(row["seconds"]) == set(row["rates"]) == set(row["fractions"]) == set(row["first"]) == names
        assert set(row["ratios"]) == set(row["ran"]) == names & {OURS, OURS_BF16}
        assert row["first"][STOCK]["distance"] == 0 < row["first"][STOCK]["loss"]
        assert row["flops"] > 0 and row["texts"] == 2 * row["batch"]
    assert rows["training_toy_long"]["longest"] > rows["training_toy_short"]["longest"]
    assert "toy, words and glosses, 8 pairs (random weights)" in training_report.training(list(rows.values()))
    for row in rows.values():
        ran = training_report.ENCODER in row["ran"][OURS]["calls"]
        assert ("sentfast: the encoder did not run" in row["note"]) is not ran


def test_a_table_says_where_the_original_code_ran():
    ran = {"calls": {"pool": {"cpu": 2}}, "fallbacks": {"BertModel.forward": {"SF122": 2}}}
    rows = [{"title": "a", "ran": {OURS: ran}}, {"title": "b", "ran": {OURS: ran}}]
    rows.append({"title": "c", "ran": {OURS: {"calls": {training_report.ENCODER: {"cpu": 1}}, "fallbacks": {}}}})
    said = training_report.handed_back(rows)
    assert said.count("\n") == 2 and "(sentfast: BertModel.forward SF122): a; b." in said


def test_promises_are_judged_by_the_ratio_to_stock_of_the_same_precision():
    spread = dict.fromkeys(("median", "q1", "q3", "min", "max"), 1.0)
    row = {"model": "minilm", "kind": "short", "tokens": 1000, "flops": 5e9, "ran": {}}
    row["seconds"] = dict.fromkeys((STOCK, OURS, STOCK_BF16, OURS_BF16), spread)
    row["dtypes"] = dict.fromkeys(row["seconds"], "float32")
    row["ratios"] = {OURS: {"median": 3.6}, OURS_BF16: {"median": 2.9}}
    training.finish(row, LIMITS)
    assert [target["met"] for target in row["targets"].values()] == [True, False]
    assert row["rates"][OURS] == 1000 and row["fractions"][OURS] == 0.5


def test_another_first_step_is_refused():
    model, _ = _toy()
    learners = {STOCK: Learner(copy.deepcopy(model)), OURS: Learner(copy.deepcopy(model), ours=True)}
    training.agree(training.first_steps(learners, batch_of(model)))
    # One table of one copy is another one.
    with torch.no_grad():
        encode_models.base_of(learners[OURS].model).encoder.layer[0].output.dense.weight.mul_(1.5)
    with pytest.raises(gate.Refused, match=r"sentfast: the first step's (loss|gradients) differ by"):
        training.agree(training.first_steps(learners, batch_of(model)))


@pytest.mark.parametrize("wrong", [{"loss": float("nan")}, {"norm": 2.0}, {"distance": float("inf")}, {"loss": 1.01}])
def test_the_gate_looks_at_loss_norm_and_direction(wrong):
    right = {"loss": 1.0, "norm": 1.0, "distance": 0.0}
    training.agree({STOCK: right, OURS: right})
    with pytest.raises(gate.Refused):
        training.agree({STOCK: right, OURS: {**right, **wrong}})


def test_bf16_may_be_twice_as_far_from_float32_as_stock_is():
    right = {"loss": 1.0, "norm": 1.0, "distance": 0.0}
    rounded = {"loss": 1.02, "norm": 1.0, "distance": 0.1}
    first = {STOCK: right, OURS: right, STOCK_BF16: rounded, OURS_BF16: {**rounded, "distance": 0.2}}
    training.agree(first)
    with pytest.raises(gate.Refused, match="sentfast bf16: the first step's gradients differ by 0.3, allowed is 0.21"):
        training.agree({**first, OURS_BF16: {**rounded, "distance": 0.3}})


def test_gradients_of_other_parameters_are_infinitely_far():
    one = {"a": torch.ones(3)}
    assert training_step.distance(one, one) == 0
    assert training_step.distance({"a": torch.full((3,), 1.5)}, one) == pytest.approx(0.5)
    assert training_step.distance({**one, "b": torch.ones(1)}, one) == float("inf")


def test_a_step_changes_the_weights_and_dropout_comes_back():
    model, _ = _toy()
    learner, batch = Learner(copy.deepcopy(model)), batch_of(model)
    with training_step.without_dropout(learner.model):
        losses = [learner.gradients(batch)[0] for _ in range(2)]
    assert losses[0] == losses[1], "dropout is still there"
    assert any(module.p > 0 for module in learner.model.modules() if isinstance(module, torch.nn.Dropout))
    learner.step(batch)
    pairs = zip(model.parameters(), learner.model.parameters(), strict=True)
    assert any(not torch.equal(before, after) for before, after in pairs)


def test_pairs_are_real_and_different():
    pairs = training_step.word_pairs(20, 5)
    assert len(dict(pairs)) == len({gloss for _, gloss in pairs}) == 20
    of = {gloss.text: gloss.words for gloss in GLOSSES}
    assert all(word in of[gloss] for word, gloss in pairs)
    assert training_step.word_pairs(20, 5) == pairs != training_step.word_pairs(20, 6)
    opening, rest = training_step.document_pairs(4, 0)[0]
    assert len(opening.split()) == training_step.OPENING_WORDS and f"{opening} {rest}" == texts.KINDS["long"](1, 0)[0]
    model, _ = _toy()
    lengths = training_step.lengths_of(training_step.tokenized(model, [("a cat", "a"), ("cat", "a cat a cat")]))
    assert lengths == [4, 3, 3, 6]
    with pytest.raises(texts.Unavailable, match="144 pairs, a batch takes 1000"):
        training_step.batches_of(model, Task("short", 1000, 32), 1, 0)


def test_memory_rows(monkeypatch):
    told = {**vars(SETTINGS), "extra": {"model": "toy"}}
    found = {}
    for variant in (STOCK, OURS):
        timing.switch(variant == OURS)
        sentfast.report(reset=True)
        found[variant] = training_memory.measure({**told, "extra": {"model": "toy", "variant": variant}})
    timing.switch(False)
    asked = []

    def child(module, settings, timeout):
        asked.append((module, settings.extra["variant"]))
        return found[settings.extra["variant"]]

    monkeypatch.setattr(study, "in_child", child)
    (row,) = finished(training_memory, training_memory.run(SETTINGS)).values()
    assert asked == [("training_memory", STOCK), ("training_memory", OURS)]
    assert all(one["peak"] >= one["loaded"] > 0 for one in row["bytes"].values())
    assert row["targets"]["peak"]["got"] > 0 and "toy, long, 4 pairs" in training_report.memory([row])
    found[OURS]["loss"] *= 1.001
    with pytest.raises(gate.Refused, match="the first loss is"):
        training_memory.run(SETTINGS)


def test_curve_rows(monkeypatch):
    monkeypatch.setattr(training_curve, "TASK", Task("short", 8, 32))
    (row,) = finished(training_curve, training_curve.measure(SETTINGS)).values()
    assert row["steps"] == training_curve.QUICK_STEPS == len(row["curve"][STOCK])
    assert row["apart"] < training_curve.ANOTHER and len(row["last_dropout"][OURS]) == row["seeds"]
    assert training_report.curve([row]).count("\n| toy") == 2


def test_the_distance_of_curves_is_measured_by_the_range_of_stock():
    stock = [[1.0] * 8, [2.0] * 8, [3.0] * 8]
    assert training_curve.within(stock, stock) == 0
    assert training_curve.within(stock, [[5.0] * 8] * 3) == pytest.approx(1.5)
    assert training_curve.within([[1.0] * 8] * 3, stock) is None
    assert training_curve.windows([1.0, 2.0]) == [1.0, 2.0]


def small_losses(monkeypatch):
    cases = {
        "mnrl_1024": loss.Case("mnrl", 24, 16, faster=1.0),
        "mnrl_8192": loss.Case("mnrl", 32, 16, faster=2.5, megabytes=80),
        "mnrl_65536": loss.Case("mnrl", 48, 16, megabytes=1000, ours_only=True),
        "gist_256": loss.Case("gist", 16, 16, faster=10.0, memory_share=0.05),
        "matryoshka_2048": loss.Case("matryoshka", 16, 16, faster=1.0),
    }
    monkeypatch.setattr(loss, "CASES", cases)
    monkeypatch.setattr(loss, "PREFIXES", (16, 8))
    monkeypatch.setattr(loss, "rows_of", lambda case, quick: case.rows)
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 20)


def run_losses_here(monkeypatch):
    monkeypatch.setattr(study, "in_child", lambda module, settings, timeout: loss.measure(settings))
    return loss.run(SETTINGS)


def test_loss_rows(monkeypatch):
    small_losses(monkeypatch)
    rows = finished(loss, run_losses_here(monkeypatch), "loss")
    assert list(rows) == ["loss_mnrl_1024", "loss_mnrl_8192", "loss_gist_256", "loss_matryoshka_2048"]
    for row in rows.values():
        assert set(row["seconds"]) == {STOCK, OURS} and row["targets"]["speed"]["got"] > 0
        assert max(row["errors"][OURS]) < 1e-3
    assert rows["loss_mnrl_8192"]["targets"]["memory"]["got"] is not None
    assert rows["loss_gist_256"]["targets"]["memory"]["got"] is None, "a quick run measures the memory of one case"
    assert training_report.loss(list(rows.values())).count("\n") == 6


@pytest.mark.parametrize("ran", [True, False])
def test_the_largest_loss_is_measured_only_where_the_operator_runs(monkeypatch, ran):
    small_losses(monkeypatch)
    asked = []

    def child(module, settings, timeout):
        if "case" in settings.extra:
            asked.append(settings.extra["variant"])
            return loss.measure(settings)
        row = {"table": "loss", "case": "mnrl_65536", "title": "x", "operator": ["cpu"] if ran else [], "ran": {}}
        return {"loss_mnrl_65536": row}

    monkeypatch.setattr(study, "in_child", child)
    full = Settings(**{**vars(SETTINGS), "quick": False})
    (row,) = finished(loss, loss.run(full), "loss").values()
    assert asked == ([OURS] if ran else [])
    assert (row["targets"]["memory"]["got"] is None) is not ran and set(row["seconds"]) == ({OURS} if ran else set())
    assert ("original code" in training_report.loss([row])) is not ran


def test_a_wrong_loss_is_refused(monkeypatch):
    small_losses(monkeypatch)
    right = loss.call
    monkeypatch.setattr(
        loss,
        "call",
        lambda module, inputs: tuple(x * (1.001 if sentfast.is_enabled() else 1.0) for x in right(module, inputs)),
    )
    with pytest.raises(gate.Refused, match="mnrl_1024: error .* against float64"):
        loss.measure(SETTINGS)


def test_the_blocks_give_the_loss_of_the_whole(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 7)
    case = loss.Case("mnrl", 30, 16)
    inputs = loss.make(case, 30, 1)
    whole = loss.call(loss.LOSSES["mnrl"](), inputs)[0].item()
    assert loss.mnrl_by_blocks(inputs) == pytest.approx(whole, rel=1e-5)
    with pytest.raises(gate.Refused, match="plain PyTorch's"):
        loss._same_loss(whole * 1.001, whole)


def test_training_is_selected_kept_and_rendered(tmp_path):
    names = lambda *patterns: [x.name for x in studies.select(patterns, False)]  # noqa: E731
    assert names("training") == ["training_minilm", "training_mpnet"]
    assert names("training*") == ["training_minilm", "training_mpnet", "training_memory", "training_curve"]
    assert names("loss") == ["loss"]
    path, described = tmp_path / "result.json", machine.describe(torch.device("cpu"), 1)
    target = study.judged("dropout 0: the same", 1e-4, 2.5e-6, "relative", at_most=True)
    row = {"study": "training_curve", "table": "training_curve", "title": "toy", "weights": "real", "steps": 8}
    row.update(seeds=1, apart=2.5e-6, last={STOCK: 1.0, OURS: 1.0}, last_dropout={STOCK: [1.5], OURS: [1.25]})
    row.update(targets={"same": target}, ran={OURS: {"calls": {training_report.ENCODER: {"cpu": 1}}, "fallbacks": {}}})
    bench.write(path, described, LIMITS, {}, {"training_curve_toy": {**row, **machine.commit()}})
    written = json.loads(path.read_text())
    assert "| toy, dropout 0 | 8 | 1.00000 | 1.00000 | 2.5e-06 |" in report.render_block(
        "training_curve", None, {"here": written}
    )
    assert "| dropout 0: the same | 2.5e-06 | yes |" in report.targets_table(written, "targets")
    assert "Not measured yet" in report.render_block("training", None, {"here": written})
