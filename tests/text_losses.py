"""Losses of sentence-transformers on texts: the original's value and gradient, and those with sentfast on."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager

import torch
from accuracy import assert_accurate
from backends import BACKEND
from sentence_transformers import SentenceTransformer, losses, util
from tiny_models import LETTERS, build
from torch import nn

import sentfast

COUNT = 7  # no multiple of the mini-batch of 3
OPERATORS = {"contrastive_loss"}
MNRL, CACHED = losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss
SYMMETRIC = losses.MultipleNegativesSymmetricRankingLoss
CACHED_SYMMETRIC = losses.CachedMultipleNegativesSymmetricRankingLoss
GIST, CACHED_GIST = losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss


def guide_of(path) -> SentenceTransformer:
    """Another model with the same tokenizer, which finds some pairs nearer than the right one and some farther."""
    other = build(path)
    torch.manual_seed(9)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.0)
    a, b, c = (torch.as_tensor(other.encode(column)) for column in columns(3))
    cosines = util.cos_sim(a, torch.cat([b, c]))
    out = cosines > cosines.diagonal().unsqueeze(1)
    assert 0.2 < out.double().mean() < 0.8, cosines
    return other


def columns(count: int, rows: int = COUNT) -> list[list[str]]:
    """Texts that are all different."""
    draw = random.Random(3)
    numbers = iter(range(count * rows))
    return [[f"{next(numbers)} " + "".join(draw.choices(LETTERS, k=6)) for _ in range(rows)] for _ in range(count)]


def value_and_gradient(loss, texts, labels=None) -> tuple[torch.Tensor, torch.Tensor]:
    model = loss.model
    model.zero_grad()
    random.seed(5)
    value = loss([model.tokenize(column) for column in texts], labels)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def exactly(make, model, **others) -> nn.Module:
    """The loss over float64 copies."""
    return make(copy.deepcopy(model).double(), **{name: copy.deepcopy(x).double() for name, x in others.items()})


@contextmanager
def ran(operators=OPERATORS, codes=None):
    """The block calls one of the operators, and falls back as `codes` (function -> code) says."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    assert not operators or {name for name, _ in report.calls} & operators, report
    assert {backend for name, backend in report.calls if name in OPERATORS} <= {BACKEND}, report
    ours = {(site, code) for site, code in report.fallbacks if "Loss." in site}
    assert ours == set((codes or {}).items()), report


def scale_of(loss) -> float:
    """The value is made of scores as large as this, and the softmax makes their rounding a relative error."""
    loss = loss.loss if isinstance(loss, losses.MatryoshkaLoss) else loss
    return getattr(loss, "scale", None) or 1 / getattr(loss, "temperature", 1.0)


def assert_same(make, model, texts, labels=None, operators=OPERATORS, **others) -> None:
    """Value and gradient against the original by the tolerance rule, with and without a gradient."""
    loss = make(model, **others)
    features = [model.tokenize(column) for column in texts]
    with sentfast.disabled():
        eager = value_and_gradient(loss, texts, labels)
        exact_labels = labels.double() if labels is not None and labels.is_floating_point() else labels
        exact = value_and_gradient(exactly(make, model, **others), texts, exact_labels)
        config, name = loss.get_config_dict(), type(loss).__name__
    with ran(operators):
        result = value_and_gradient(loss, texts, labels)
    with ran(operators), torch.no_grad():
        random.seed(5)
        value = loss(copy.deepcopy(features), labels)
    results = {"value": result[0], "gradient": result[1], "value without gradient": value}
    for what, got in results.items():
        original, true = (pair[what == "gradient"] for pair in (eager, exact))
        size = max(1.0, scale_of(loss)) * (true.abs().max().item() / 8 if what == "gradient" else 1)
        assert (got.dtype, got.shape, got.device) == (original.dtype, original.shape, original.device)
        assert_accurate(got, original, true, size=size, what=f"{what}, {name}")
    assert not value.requires_grad
    assert str(loss.get_config_dict()) == str(config) and type(loss).__name__ == name
