"""Everything that trains a SentenceTransformer runs unchanged with sentfast on, to the same losses and weights."""

from __future__ import annotations

import copy
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accuracy import assert_accurate
from gloo import run_in_two
from sentence_transformers import InputExample, SentenceTransformer, losses
from sentence_transformers.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SentenceEvaluator,
)
from torch.utils.data import DataLoader
from training_runs import ADAM_EPSILON, COLUMNS, COUNT, LABELS, TEXTS, PairwiseMSE, Run, compare, three_runs

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
BF16 = torch.finfo(torch.bfloat16).eps


def pairs_with_scores():
    return {"anchor": COLUMNS["anchor"], "positive": COLUMNS["positive"], "score": LABELS}


def evaluators():
    similarity = EmbeddingSimilarityEvaluator(TEXTS[:9], TEXTS[9:18], LABELS[:9], name="s", write_csv=False)
    corpus = {str(i): text for i, text in enumerate(TEXTS[:20])}
    queries = {"a": TEXTS[30], "b": TEXTS[31]}
    relevant = {"a": {"3", "4"}, "b": {"9"}}
    return similarity, InformationRetrievalEvaluator(queries, corpus, relevant, name="r", write_csv=False)


class Score(SentenceEvaluator):
    """One number, the only form that `old_fit` takes."""

    def __call__(self, model, *args, **kwargs):
        evaluator = evaluators()[0]
        return evaluator(model, *args, **kwargs)[evaluator.primary_metric]


def train(model, run: Run, loss, data, folder: Path, *, evaluator=None, resume=None, **options):
    """With SentenceTransformerTrainer. `loss` and `data` may be dicts by data set."""
    datasets = pytest.importorskip("datasets", reason="the trainer needs datasets")
    pytest.importorskip("accelerate", reason="the trainer needs accelerate")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    if isinstance(loss, dict):
        data = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in data.items()})
        loss = {name: run.watch(part) for name, part in loss.items()}
    else:
        data, loss = datasets.Dataset.from_dict(data), run.watch(loss)
    options = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "adam_epsilon": ADAM_EPSILON,
        "save_strategy": "no",
        **options,
    }
    arguments = SentenceTransformerTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, seed=3, **options
    )
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator)
    trainer.train(resume_from_checkpoint=resume)
    for entry in trainer.state.log_history:
        run.scores += [value for name, value in entry.items() if name.startswith(("eval_s_", "eval_r_"))]
    return trainer


LOSSES = {
    "MultipleNegativesRanking": (losses.MultipleNegativesRankingLoss, COLUMNS),
    "CachedMultipleNegativesRanking": (
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
        COLUMNS,
    ),
    "Matryoshka": (
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16, 5]),
        COLUMNS,
    ),
    "GISTEmbed": (lambda model: losses.GISTEmbedLoss(model, copy.deepcopy(model)), COLUMNS),
    "CoSENT": (losses.CoSENTLoss, pairs_with_scores()),
    "Triplet": (losses.TripletLoss, COLUMNS),
    "written by the user": (PairwiseMSE, pairs_with_scores()),
}
OPTIONS = {
    "accumulation": dict(gradient_accumulation_steps=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "warm-up and clipping": dict(warmup_steps=2, max_grad_norm=0.1, weight_decay=0.1),
    "no duplicates": dict(batch_sampler="no_duplicates"),
    "two epochs, short last batch": dict(num_train_epochs=2, per_device_train_batch_size=10),
}


@pytest.mark.parametrize("name", LOSSES)
def test_trainer_losses(path, tmp_path, name):
    loss, data = LOSSES[name]
    three_runs(path, lambda model, run, mode: train(model, run, loss(model), data, tmp_path / mode))


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_options(path, tmp_path, name):
    def one(model, run, mode):
        train(model, run, losses.MultipleNegativesRankingLoss(model), COLUMNS, tmp_path / mode, **OPTIONS[name])

    three_runs(path, one)


def test_evaluators_inside_the_loop(path, tmp_path):
    def one(model, run, mode):
        options = dict(eval_strategy="steps", eval_steps=2, evaluator=list(evaluators()))
        train(model, run, losses.MultipleNegativesRankingLoss(model), COLUMNS, tmp_path / mode, **options)

    assert len(three_runs(path, one)["ours"].scores) > 20


def test_round_robin_over_two_data_sets(path, tmp_path):
    def one(model, run, mode):
        loss = {"pairs": losses.CosineSimilarityLoss(model), "triplets": losses.MultipleNegativesRankingLoss(model)}
        data = {"pairs": pairs_with_scores(), "triplets": COLUMNS}
        train(model, run, loss, data, tmp_path / mode, multi_dataset_batch_sampler="round_robin")

    three_runs(path, one)


def test_bfloat16_flag(path, tmp_path, monkeypatch):
    def one(model, run, mode):
        train(model, run, losses.MultipleNegativesRankingLoss(model), COLUMNS, tmp_path / mode, bf16=True)

    # Autocast rounds nothing in a float64 model, so that the exact run is exact.
    monkeypatch.setattr("training_runs.compare", lambda runs: compare(runs, BF16))
    three_runs(path, one)


def test_float16_flag_does_what_it_did(path, tmp_path):
    def outcome(folder):
        model = SentenceTransformer(modules=list(copy.deepcopy(start)), device="cpu")
        try:
            train(model, Run(), losses.MultipleNegativesRankingLoss(model), COLUMNS, folder, fp16=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return type(error), str(error)
        return "trained", ""

    from tiny_models import build

    start = build(path)
    with sentfast.disabled():
        expected = outcome(tmp_path / "eager")
    assert outcome(tmp_path / "ours") == expected


def test_save_and_resume(path, tmp_path):
    """A run that goes on from our checkpoint ends where the whole run ends, with sentfast and without."""
    ends = {}

    def one(model, run, mode):
        loss, options = losses.MultipleNegativesRankingLoss, dict(save_strategy="steps", save_steps=2)
        train(model, run, loss(model), COLUMNS, tmp_path / mode, **options)
        if mode == "ours":
            for name, context in (("on", nullcontext()), ("off", sentfast.disabled())):
                with context:
                    again = SentenceTransformer(str(tmp_path / mode / "checkpoint-2"), device="cpu")
                    rest = Run()
                    folder = tmp_path / mode / "checkpoint-2"
                    train(again, rest, loss(again), COLUMNS, tmp_path / name, resume=str(folder), **options)
                assert len(rest.losses) == 2
                ends[name] = again.state_dict()
            ends["whole"] = {name: value.clone() for name, value in model.state_dict().items()}

    three_runs(path, one)
    for name in ("on", "off"):
        torch.testing.assert_close(ends[name], ends["whole"], rtol=1e-3, atol=2e-4)
    files = {mode: sorted(p.name for p in (tmp_path / mode / "checkpoint-4").rglob("*")) for mode in ("ours", "eager")}
    assert files["ours"] == files["eager"] and "optimizer.pt" in files["ours"]


@pytest.mark.parametrize("method", ["fit", "old_fit"])
def test_fit(path, tmp_path, monkeypatch, method):
    if method == "fit":
        pytest.importorskip("datasets", reason="fit runs the trainer, which needs datasets")
        pytest.importorskip("accelerate", reason="fit runs the trainer, which needs accelerate")
    monkeypatch.chdir(tmp_path)
    rows = list(zip(*COLUMNS.values(), strict=True))

    def one(model, run, mode):
        loader = DataLoader([InputExample(texts=list(row)) for row in rows], batch_size=6)
        getattr(model, method)(
            [(loader, run.watch(losses.MultipleNegativesRankingLoss(model)))],
            evaluator=evaluators()[0] if method == "fit" else Score(),
            epochs=2,
            evaluation_steps=2,
            scheduler="WarmupLinear",
            warmup_steps=2,
            optimizer_class=torch.optim.AdamW,
            optimizer_params={"lr": 1e-2, "eps": ADAM_EPSILON},
            max_grad_norm=0.5,
            output_path=str(tmp_path / mode),
            save_best_model=True,
            show_progress_bar=False,
            callback=lambda score, epoch, steps: run.scores.append(score),
        )

    runs = three_runs(path, one)
    assert len(runs["ours"].scores) >= 4
    saved = [SentenceTransformer(str(tmp_path / mode), device="cpu").state_dict() for mode in ("ours", "eager")]
    torch.testing.assert_close(*saved, rtol=1e-4, atol=1e-5)


def test_adapters(path, tmp_path):
    """LoRA on linear layers: the base weights stay, the adapter learns what it learns without sentfast."""
    peft = pytest.importorskip("peft", reason="needs peft")

    def one(model, run, mode):
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["query", "value"], r=4, lora_dropout=0.0, init_lora_weights="gaussian")
        model.add_adapter(config)
        if mode == "exact":
            model.double()
        train(model, run, losses.MultipleNegativesRankingLoss(model), COLUMNS, tmp_path / mode)
        after = dict(model.named_parameters())
        same = [name for name in base if name in after and torch.equal(after[name], base[name])]
        assert len(same) > 10 and any("lora_B" in name and p.abs().max() > 0 for name, p in after.items())

    three_runs(path, one)


def test_accelerate(path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

    def one(model, run, mode):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        loss = run.watch(losses.MultipleNegativesRankingLoss(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=ADAM_EPSILON)
        loader = DataLoader(list(zip(*COLUMNS.values(), strict=True)), batch_size=6, collate_fn=list)
        prepared, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
        for rows in loader:
            with accelerator.accumulate(prepared):
                features = [model.tokenize(list(column)) for column in zip(*rows, strict=True)]
                accelerator.backward(loss(features, None))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    assert len(three_runs(path, one)["ours"].losses) == COUNT // 6


def test_a_loop_in_plain_pytorch(path):
    """Needs nothing but sentence-transformers, and steps on the columns by turns."""

    def one(model, run, mode):
        loss = run.watch(losses.MultipleNegativesRankingLoss(model.train()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        for start in range(0, COUNT, 6):
            features = [model.tokenize(column[start : start + 6]) for column in COLUMNS.values()]
            loss(features, None).backward()
            optimizer.step()
            optimizer.zero_grad()

    three_runs(path, one)


def distributed(path: str, folder: Path) -> list[dict]:
    """What two processes over gloo have found."""
    trainer = all(importlib.util.find_spec(name) for name in ("datasets", "accelerate"))
    arguments = path, str(folder), "trainer" if trainer else "no trainer"
    run_in_two("distributed_worker.py", *arguments, OMP_NUM_THREADS="1")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes(path, tmp_path):
    """Negatives gathered from both give the loss and the gradient of one process with the large batch."""
    first, second = distributed(path, tmp_path)
    names = [name for name in first["ours"] if isinstance(name, str) and name != "trainer"]
    assert len(names) >= 3
    for name in names:
        assert any("contrastive" in op for op in first["ours"][name, "calls"]) and not first["eager"][name, "calls"]
        whole, exact = first["eager"][name, "whole"], first["eager"][name, "exact"]
        for found in (side[name] for rank in (first, second) for side in (rank["ours"], rank["eager"])):
            for what, *values in zip(("loss", "gradient"), found, whole, exact, strict=True):
                assert_accurate(*values, what=f"{name}, {what}")
    if "trainer" in first["ours"]:
        ours, eager = first["ours"]["trainer"], first["eager"]["trainer"]
        torch.testing.assert_close(ours, second["ours"]["trainer"], rtol=0, atol=0)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
