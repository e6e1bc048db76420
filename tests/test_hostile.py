"""Edits and patches drawn from ``hostile.py``, before the first call and after it: the result is what stock gives."""

from __future__ import annotations

import contextlib
import copy
import warnings

import hostile
import pytest
import torch
from tiny_models import build

import sentfast
from sentfast.integrations import gain

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
# Edits that round: results in half precision have another tolerance.
ROUNDED = ("half", "one_layer_half", "autocast", "default_dtype")
DRAWN = 24


@pytest.fixture(autouse=True)
def small_too(monkeypatch):
    monkeypatch.setattr(gain, "on", False)


def encoded(model):
    return model.encode(hostile.TEXTS, convert_to_tensor=True, normalize_embeddings=bool(torch.randint(2, ())))


def base_model(model):
    features = model.tokenize(hostile.TEXTS)
    arguments = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in features}
    return model[0].auto_model(**arguments)[0][features["attention_mask"].bool()]


def embedding(model):
    return model(model.tokenize(hostile.TEXTS))["sentence_embedding"]


def gradient(model):
    model.zero_grad()
    with torch.enable_grad():
        x = embedding(model)
        (x * torch.linspace(-1, 2, x.shape[-1])).sum().backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return torch.cat(found or [torch.zeros(1)])


CALLS = (encoded, base_model, embedding, gradient)


def outcome(call, model, context, seed):
    """A tensor, or the type of the error."""
    torch.manual_seed(seed)
    try:
        with context or contextlib.nullcontext():
            return call(model)
    except Exception as error:
        return type(error)


def assert_alike(found, expected, allowed, what):
    if isinstance(found, type) or isinstance(expected, type):
        assert found is expected, what
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    found, expected = found.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), what
    if finite.any():
        size = expected[finite].abs().max().clamp(min=1e-20)
        assert (found - expected)[finite].abs().max() <= allowed * size, what


def edited(name, model, patch, seed):
    torch.manual_seed(seed)
    return hostile.EDITS[name](model, patch)


@pytest.fixture(scope="module")
def plain(path):
    return build(path)


def attempt(name, call, called, plain, seed):
    """Edits that hold during a call only are made anew for stock."""
    model = copy.deepcopy(plain)
    if called:
        outcome(call, model, None, seed)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = edited(name, model, patch, seed)
        found = outcome(call, model, context, seed)
        again = edited(name, model, patch, seed) if context is not None else None
        with sentfast.disabled():
            expected = outcome(call, model, again, seed)
    what = f"{name}, {call.__name__}, called before: {called}, seed {seed}"
    assert_alike(found, expected, 0.1 if name in ROUNDED else 1e-3, what)


def test_drawn_edits_are_honoured(plain):
    names = list(hostile.EDITS)
    for number in torch.randperm(len(names))[:DRAWN].tolist():
        seed, call = int(torch.randint(1 << 30, ())), hostile.one(CALLS)
        state = torch.get_rng_state()
        attempt(names[number], call, bool(seed % 2), plain, seed)
        torch.set_rng_state(state)


# What was ignored once.
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "name, call", [("method_of_a_registry", base_model), ("Tensor.sum", gradient), ("Tensor.sum", embedding)]
)
def test_edits_that_were_ignored(name, call, called, plain):
    for seed in range(3):
        attempt(name, call, called, plain, seed)
