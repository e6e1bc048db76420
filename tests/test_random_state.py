"""PyTorch's random generator moves where the original's dropout moves it, and nowhere else."""

from __future__ import annotations

import random

import encoders
import pytest
import torch
from torch import Tensor

import sentfast
import sentfast.functional as F

_RATES = {
    "distilbert": ("dropout", "attention_dropout"),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout"),
}
_USUAL = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def moves(run) -> bool:
    """Whether forward and backward of what `run` returns move the generator."""
    before = torch.get_rng_state()
    result = run()
    if result.requires_grad:
        result.sum().backward()
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_of_models(model_type: str) -> None:
    """Rates, modes, modules in evaluation and frozen parameters are drawn."""
    draw = random.Random(int(torch.randint(2**31, ())))
    for _ in range(4):
        rates = {name: draw.choice((0.0, 0.0, 0.3)) for name in _RATES.get(model_type, _USUAL)}
        model = encoders.model(model_type, **rates)
        sentfast.accelerate(model)
        model.train(draw.random() < 0.7)
        for module in model.modules():
            if draw.random() < 0.1:
                module.train(draw.random() < 0.5)
        inputs = encoders.batch([draw.randrange(1, 9) for _ in range(3)])
        with torch.set_grad_enabled(draw.random() < 0.8):
            sentfast.report(reset=True)
            ours = moves(lambda model=model, inputs=inputs: model(**inputs).last_hidden_state)
            assert not sentfast.report().fallbacks, sentfast.report()
            with sentfast.disabled():
                stock = moves(lambda model=model, inputs=inputs: model(**inputs).last_hidden_state)
        assert ours == stock, f"{rates} {model.training}"
        sentfast.restore(model)


def _operators(x: Tensor, p: float) -> dict[str, tuple]:
    """Each operator with dropout, and PyTorch's dropout of as many elements."""
    ends = torch.tensor([0, len(x)], dtype=torch.int32)
    heads = x.unflatten(1, (2, -1)) * 1
    weight = torch.ones(x.shape[1])
    plain = torch.nn.functional.dropout
    return {
        "dropout": (lambda: F.dropout(x, p), lambda: plain(x, p)),
        "norm": (lambda: F.dropout_add_layer_norm(x, None, weight, dropout_p=p), lambda: plain(x, p)),
        "attention": (lambda: F.varlen_attention(heads, heads, heads, ends, dropout_p=p), lambda: plain(x, p)),
    }


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_of_operators(p: float, rows: int) -> None:
    x = torch.randn(rows, 8, requires_grad=True)
    for name, (ours, stock) in _operators(x, p).items():
        assert moves(ours) == moves(stock), name
