"""Tracers get the original code, whatever has run before: a traced model is right for other batches too."""

from __future__ import annotations

import inspect
import random
import warnings

import encoders
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import sentfast

try:
    from transformers.utils import fx  # up to transformers 4
except ImportError:
    fx = None

NAMES = ["input_ids", "attention_mask"]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batches(draw: random.Random):
    """Two of one shape whose texts have other lengths."""
    longest, count = draw.randint(9, 20), draw.randint(2, 5)
    for _ in range(2):
        yield encoders.batch([longest, *(draw.randint(longest - 4, longest) for _ in range(count))])


def check(model, trace):
    """`trace` makes a function of a batch out of the model, after the model has run packed."""
    draw = random.Random(int(torch.randint(2**31, ())))
    first, other = batches(draw)
    sentfast.accelerate(model)(**first)
    try:
        traced = trace(model, first)
    except Exception as error:  # what stock cannot trace, we need not
        with sentfast.disabled(), pytest.raises(type(error)):
            trace(model, first)
        return
    for batch in (other, first):
        result = traced(batch)
        with sentfast.disabled():
            torch.testing.assert_close(result, model(**batch)[0], atol=1e-5, rtol=1e-5)


def by_transformers(model, batch):
    graph = fx.symbolic_trace(model, NAMES)
    return lambda batch: graph(**batch)["last_hidden_state"]


def by_fx(model, batch):
    others = [
        name for name in inspect.signature(type(model).forward).parameters if name not in (*NAMES, "self", "kwargs")
    ]
    graph = torch.fx.symbolic_trace(model, concrete_args=dict.fromkeys(others))
    return lambda batch: graph(**batch)[0]


def by_make_fx(model, batch):
    graph = make_fx(lambda ids, mask: model(input_ids=ids, attention_mask=mask)[0])(*batch.values())
    return lambda batch: graph(*batch.values())


def by_jit(model, batch):
    traced = torch.jit.trace(model, tuple(batch.values()), strict=False, check_trace=False)
    return lambda batch: next(iter(dict(traced(*batch.values())).values()))


def by_export(model, batch):
    exported = torch.export.export(model, (), dict(batch), strict=False).module()
    return lambda batch: exported(**batch)[0]


TRACERS = {"fx": by_fx, "make_fx": by_make_fx, "jit": by_jit, "export": by_export}
if fx is not None:
    TRACERS["transformers"] = by_transformers


@pytest.mark.parametrize("tracer", TRACERS)
def test_traced_models(tracer):
    # The tracer of transformers knows four of them.
    known = ("bert", "distilbert", "electra", "roberta") if tracer == "transformers" else encoders.MODEL_TYPES
    for i in torch.randperm(len(known))[:3]:
        check(encoders.model(known[i]), TRACERS[tracer])


class Mean(nn.Module):
    def forward(self, hidden):
        return hidden.mean(1)


POOLERS = {
    "linear": lambda hidden: nn.Linear(hidden, hidden),
    "identity": lambda hidden: nn.Identity(),
    "mean": lambda hidden: Mean(),
}


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_pooler_of_another_kind(model_type, pooler):
    """It may read rows that the mask hides, or be called in another way."""
    draw = random.Random(int(torch.randint(2**31, ())))
    model, (batch, _) = encoders.model(model_type), batches(draw)
    model.pooler = POOLERS[pooler](32)
    sentfast.accelerate(model, padded_rows="exact")
    for options in ({}, {"return_dict": False}):
        result, expected = model(**batch, **options), encoders.stock(model, **batch, **options)
        assert type(result) is type(expected) and len(result) == len(expected)
        pairs = zip(*(x if isinstance(x, tuple) else x.to_tuple() for x in (result, expected)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
