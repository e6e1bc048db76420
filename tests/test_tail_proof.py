"""What a model does behind its encoder is proven for each model before the loop of `encode` runs fused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import models
from tiny_models import HIDDEN, VERSION, build, texts
from torch import nn

import sentfast
from sentfast.encoder import Encoder
from sentfast.integrations import pipeline, tail_proof

pytestmark = [
    pytest.mark.skipif(VERSION < (6, 2), reason="the loop of `encode` is of 6.2"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("switched_on"),
]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS = (nn.Tanh, nn.Identity, nn.GELU, nn.SiLU, nn.ReLU)


def drawn(choices):
    return choices[int(torch.randint(len(choices), ()))]


def dense(columns=HIDDEN):
    return models.Dense(columns, int(torch.randint(8, 40, ())), activation_function=drawn(ACTIVATIONS)())


def tail():
    return [[], [models.Normalize()], [dense()], [models.Normalize(), dense()], [dense(), models.Normalize()]]


def counted():
    return {code for _, code in sentfast.report(reset=True).fallbacks}


def assert_stock(model, **options):
    found = model.encode(texts(7), **options)
    with sentfast.disabled():
        expected = model.encode(texts(7), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_every_model_passes(path):
    for _ in range(6):
        kept = drawn([MODES[:1], MODES[2:3], (drawn(MODES),)])
        model = build(path, *drawn(tail()), modes=kept, include_prompt=bool(torch.randint(2, ())))
        counted()
        state = torch.get_rng_state()
        assert_stock(model, prompt="the query: ")
        assert torch.equal(torch.get_rng_state(), state)
        assert not counted()


def test_no_call_of_the_proof_is_counted(path):
    model = build(path, dense())
    counted()
    model.encode("a")
    first = dict(sentfast.report(reset=True).calls)
    model.encode("a")
    assert first == sentfast.report(reset=True).calls


@pytest.mark.parametrize("where", ["pooling", "dense"])
def test_what_differs_does_not_run(where, path, monkeypatch):
    factor = 1 + 10 ** -(1 + 2 * torch.rand(()).item())
    if where == "dense":
        original = pipeline._dense
        monkeypatch.setattr(pipeline, "_dense", lambda module, x: original(module, x) * factor)
    else:
        run = Encoder.run
        monkeypatch.setattr(Encoder, "run", lambda *args, **kw: run(*args, **kw) * (factor if kw.get("modes") else 1))
    model = build(path, dense())
    counted()
    assert_stock(model)
    assert "SF129" in counted()


def test_it_is_proven_again_after_a_change(path, monkeypatch):
    model, proven, original = build(path, dense()), [], tail_proof._prove
    monkeypatch.setattr(tail_proof, "_prove", lambda *args: proven.append(1) or original(*args))
    changes = [
        lambda: None,
        lambda: setattr(model[2], "new_setting", 2),
        lambda: setattr(model[2], "activation_function", nn.SiLU()),
        lambda: setattr(model[1], "pooling_mode", "max"),
        lambda: model.append(models.Normalize()),
    ]
    for number, change in enumerate(changes):
        change()
        assert_stock(model)
        model.train().eval()
        assert_stock(model)
        assert len(proven) == number + 1


def test_the_original_gives_its_own_error(path):
    model = build(path, models.Dense(HIDDEN + 1, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.encode("a")
