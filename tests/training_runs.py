"""Training runs to compare: with sentfast, without it, and without it in float64."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accuracy import ROUNDINGS, error
from sentence_transformers import SentenceTransformer
from tiny_models import VERSION, build, save_base, texts
from torch import Tensor, nn

import sentfast

COUNT = 24
TEXTS = texts(3 * COUNT, seed=5)
COLUMNS = {"anchor": TEXTS[:COUNT], "positive": TEXTS[COUNT : 2 * COUNT], "negative": TEXTS[2 * COUNT :]}
LABELS = [round((7 * i % 11) / 11, 3) for i in range(COUNT)]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Some gradients are 0 but for rounding. A large epsilon keeps Adam from making whole steps of them.
ADAM_EPSILON = 1e-2
MODES = ("ours", "eager", "exact")


def save_model(folder: Path) -> str:
    """A tiny base model without dropout."""
    path = save_base(folder, "bert")
    config = Path(path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | NO_DROPOUT))
    return path


@dataclass
class Run:
    """What one training run has left: the loss of every step, the weights, the results of its evaluators."""

    losses: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)

    def watch(self, loss: nn.Module) -> nn.Module:
        loss.register_forward_hook(lambda module, arguments, value: self.losses.append(value.detach().clone()))
        return loss


def three_runs(path: str, train: Callable[[SentenceTransformer, Run, str], None]) -> dict[str, Run]:
    """Runs ``train(model, run, mode)`` in each mode from the same start, and compares what they leave."""
    runs = {}
    for mode in MODES:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        model = build(path)
        before = {name: p.detach().clone().double() for name, p in model.named_parameters()}
        run = runs[mode] = Run()
        sentfast.report(reset=True)
        with nullcontext() if mode == "ours" else sentfast.disabled():
            train(model.double() if mode == "exact" else model, run, mode)
        assert bool(sentfast.report().calls) == (mode == "ours"), sentfast.report()
        run.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        moved = max((p.double() - before.get(name, 0)).abs().max() for name, p in run.weights.items())
        assert run.losses and moved > 1e-4, "nothing was learned, so nothing was compared"
    compare(runs)
    return runs


def compare(runs: dict[str, Run], eps: float = torch.finfo(torch.float32).eps) -> None:
    """The tolerance rule over all losses and over all weights together; evaluators agree to four digits.

    Every step starts from the roundings of those before it and multiplies them, in stock as in ours: over six orders of
    the examples GISTEmbedLoss left 0.1 to 5 times the error of stock. So the roundings of all steps are allowed.
    Not weight by weight: the gradient of a key's bias, for one, is 0 but for rounding.
    """
    ours, eager, exact = (runs[mode] for mode in MODES)
    assert [x.dtype for x in ours.losses] == [x.dtype for x in eager.losses]
    assert {n: p.dtype for n, p in ours.weights.items()} == {n: p.dtype for n, p in eager.weights.items()}
    eps *= len(exact.losses)
    assert_near(*(torch.stack(run.losses).double() for run in (ours, eager, exact)), eps, "losses")
    flat = [torch.cat([p.double().flatten() for p in run.weights.values()]) for run in (ours, eager, exact)]
    assert_near(*flat, eps, "weights")
    np.testing.assert_allclose(ours.scores, eager.scores, atol=1e-4)


def assert_near(ours: Tensor, eager: Tensor, exact: Tensor, eps: float, what: str) -> None:
    limit = 2 * error(eager, exact) + ROUNDINGS * eps * exact.abs().max().item()
    assert torch.isfinite(ours).all() and error(ours, exact) <= limit, f"{what}: {error(ours, exact):.2e} > {limit:.2e}"


class PairwiseMSE(nn.Module):
    """A loss as a user writes it: the cosine of each pair shall be its label."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels: Tensor) -> Tensor:
        a, b = (self.model(features)["sentence_embedding"] for features in sentence_features)
        scores = self.model.similarity_pairwise(a, b)
        return nn.functional.mse_loss(scores, labels.to(scores.dtype))


__all__ = [
    "ADAM_EPSILON",
    "COLUMNS",
    "COUNT",
    "LABELS",
    "TEXTS",
    "VERSION",
    "PairwiseMSE",
    "Run",
    "compare",
    "save_model",
    "three_runs",
]
