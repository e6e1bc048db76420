"""Whatever other code has put in the way of `encode` is honoured, before the first call and after many."""

from __future__ import annotations

import contextlib
import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer, models
from tiny_models import VERSION, build
from torch.overrides import TorchFunctionMode

import sentfast

pytestmark = [
    pytest.mark.skipif(VERSION < (6, 2), reason="the loop of `encode` is of 6.2"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("switched_on"),
]
TEXT = "a cat sleeps while the market falls and nobody in this old house knows why it should be so"
LOOP = SentenceTransformer.__module__
LONG = 14  # more tokens than the model is tried with


@contextlib.contextmanager
def replaced(owner, name, make):
    """`make` gets what is there."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


class Amount:
    """How much a patch adds; nothing at first."""

    value = 0.0


def steered(model, amount):
    layer = model[0].auto_model.encoder.layer[0]
    return replaced(layer, "feed_forward_chunk", lambda before: lambda x: before(x) + 3 * amount.value)


def steered_if_long(model, amount):
    layer = model[0].auto_model.encoder.layer[0]
    return replaced(layer, "feed_forward_chunk", lambda before: lambda x: before(x) + 3 * (x.shape[1] > LONG))


def act_of_an_object(model, amount):
    class Act:
        def __call__(self, x):
            return F.gelu(x) + amount.value

    return replaced(model[0].auto_model.encoder.layer[0].intermediate.intermediate_act_fn, "act", lambda before: Act())


def attention_in_a_decorator(model, amount):
    def make(before):
        @torch.no_grad()
        def attention(query, *args, **kwargs):
            return before(query, *args, **kwargs) * (2 if query.shape[2] > LONG else 1)

        return attention

    return replaced(F, "scaled_dot_product_attention", make)


def doubled(before):
    """Of a step that returns features: with twice the numbers."""

    def step(self, *args, **kwargs):
        out = before(self, *args, **kwargs)
        out["sentence_embedding"] = out["sentence_embedding"] * 2
        return out

    return step


def other_words(before):
    """Of a step that is given texts: it sees them turned around."""

    def step(self, texts, *args, **kwargs):
        return before(self, [text[::-1] for text in texts], *args, **kwargs)

    return step


class Twice(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 2 if function is F.linear else out


@contextlib.contextmanager
def hook_on_the_pooler(model, amount):
    def write(module, args):
        args[0].mul_(torch.arange(args[0].shape[-1]))

    handle = model[0].auto_model.pooler.register_forward_pre_hook(write)
    yield
    handle.remove()


def turned_around(before):
    """In place of the tokenizers library's own object: one that hands on everything, and texts turned around."""

    class Proxy:
        def __getattr__(self, name):
            return getattr(before, name)

        def __setattr__(self, name, value):
            setattr(before, name, value)

        def encode_batch(self, texts, *args, **kwargs):
            return before.encode_batch([text[::-1] for text in texts], *args, **kwargs)

        encode_batch_fast = encode_batch

    return Proxy()


@contextlib.contextmanager
def another_base_model(model, amount):
    """The model's class says by a property which base model runs."""
    first = model[0]
    kept, other = type(first), copy.deepcopy(first.auto_model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(-1)

    class Other(kept):
        @property
        def auto_model(self):
            return other

        @property
        def model(self):
            return other

    first.__class__ = Other
    yield
    first.__class__ = kept


def doubled_tensor(before):
    return lambda *args, **kwargs: before(*args, **kwargs) * 2


def every_other_mask(before):
    def move(batch, device):
        batch = before(batch, device)
        batch["input_ids"] = batch["input_ids"].flip(0)
        return batch

    return move


PATCHES = {
    "F.normalize": lambda model, _: replaced(F, "normalize", doubled_tensor),
    "batch_to_device": lambda model, _: replaced(sys.modules[LOOP], "batch_to_device", every_other_mask),
    "a proxy of the tokenizer": lambda model, _: replaced(model.tokenizer, "_tokenizer", turned_around),
    "another base model": another_base_model,
    "a method that does nothing at first": steered,
    "a method that acts on long texts": steered_if_long,
    "an activation with a state": act_of_an_object,
    "attention behind a decorator": attention_in_a_decorator,
    "preprocess of the class": lambda model, _: replaced(models.Transformer, "preprocess", other_words),
    "forward of the class": lambda model, _: replaced(SentenceTransformer, "forward", doubled),
    "call of Pooling": lambda model, _: replaced(models.Pooling, "__call__", doubled),
    "no mask": lambda model, _: replaced(model.tokenizer, "model_input_names", lambda before: ["input_ids"]),
    "a mode": lambda model, _: Twice(),
    "a hook on the pooler": hook_on_the_pooler,
}


@pytest.fixture
def texts():
    draw = random.Random(torch.initial_seed())
    lengths = [1, 2, *(draw.randint(1, 24) for _ in range(6)), 24]
    return [" ".join(draw.choices(TEXT.split(), k=length)) for length in lengths]


@pytest.mark.parametrize("what", PATCHES)
@pytest.mark.parametrize("calls", [0, 3], ids=["before the first call", "later"])
def test_a_patch_is_honoured(what, calls, path, texts):
    model, amount, options = build(path), Amount(), {"normalize_embeddings": what == "F.normalize"}
    amount.value = 0.0
    plain = [model.encode(texts, **options) for _ in range(calls)]
    with PATCHES[what](model, amount):
        model.encode(texts[:2], **options)
        amount.value = 1.0
        found = model.encode(texts, **options)
        with sentfast.disabled():
            expected = model.encode(texts, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    amount.value = 0.0
    sentfast.report(reset=True)
    after = model.encode(texts, **options)
    if plain:
        np.testing.assert_allclose(after, plain[0], rtol=1e-4, atol=1e-5)
        assert not np.allclose(expected, plain[0], rtol=1e-3, atol=1e-3), "the patch does nothing"


def test_a_module_that_is_appended_is_in_evaluation_mode(path, texts):
    model = build(path)
    before = model.encode(texts)
    model.append(models.Dropout(0.5))
    np.testing.assert_array_equal(model.encode(texts), before)
