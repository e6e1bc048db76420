"""Calls of sentence-transformers' models drawn at random, good ones and wrong ones: all as with stock."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from both_sides import outcome
from encode_cases import needs_fused
from sentence_transformers import CrossEncoder, SparseEncoder, losses, models
from text_losses import columns, guide_of
from tiny_models import HIDDEN, VERSION, build, texts
from torch import nn

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


@pytest.fixture
def draw() -> random.Random:
    return random.Random(int(torch.randint(2**31, ())))


def strings(draw: random.Random, most: int = 90) -> list[str]:
    return texts(draw.choice([1, 2, draw.randint(3, 63), 64, 65, most]), draw.randrange(1000))


# ---- what encode returns ----


def form(x):
    """All of a result that is not its values."""
    if isinstance(x, (list, tuple)):
        return type(x), [form(each) for each in x]
    if isinstance(x, dict):
        return {name: form(each) for name, each in x.items()}
    if isinstance(x, np.ndarray):
        flags = x.flags
        owns = x.base is None
        return x.dtype, x.shape, x.strides, flags.writeable, flags.c_contiguous, owns
    if isinstance(x, torch.Tensor):
        storage = x.untyped_storage().nbytes(), x.storage_offset()
        kind = x.dtype, x.device, x.requires_grad, x.is_inference(), x.layout
        return kind, x.shape, x.stride(), storage
    return type(x)


def numbers(x):
    if isinstance(x, (list, tuple)):
        return [number for each in x for number in numbers(each)]
    if isinstance(x, dict):
        return [number for each in x.values() for number in numbers(each)]
    return [torch.as_tensor(x).double()] if isinstance(x, (np.ndarray, torch.Tensor)) else []


def options_of(draw: random.Random) -> dict:
    drawn = {
        "convert_to_numpy": draw.random() < 0.6,
        "convert_to_tensor": draw.random() < 0.4,
        "precision": draw.choice(["float32", "float32", "float32", "int8", "ubinary"]),
        "output_value": draw.choice(["sentence_embedding"] * 4 + ["token_embeddings", None]),
        "normalize_embeddings": draw.random() < 0.4,
        "truncate_dim": draw.choice([None, 1, draw.randint(2, HIDDEN), HIDDEN + 3, -2]),
        "batch_size": draw.choice([1, 7, 32]),
    }
    if drawn["output_value"] != "sentence_embedding":
        drawn["precision"] = "float32"
    if drawn["precision"] == "ubinary" and drawn["truncate_dim"] is not None:
        drawn["truncate_dim"] = draw.choice([8, 16, HIDDEN])
    return drawn


@pytest.mark.parametrize("number", range(12))
def test_form_of_the_result(makers, number, draw):
    model, inputs, options = makers[draw.choice(["bert", "mpnet"])](), strings(draw), options_of(draw)
    inputs = inputs[0] if draw.random() < 0.2 else inputs
    ours = outcome(model.encode, inputs, **options)
    with sentfast.disabled():
        stock = outcome(model.encode, inputs, **options)
    assert form(ours) == form(stock), options
    if isinstance(stock, tuple):  # int8 has no ranges for a single text
        assert ours == stock
        return
    for one, other in zip(numbers(ours), numbers(stock), strict=True):
        step = 1e-4 if options["precision"] == "float32" else 256
        torch.testing.assert_close(one, other, atol=step, rtol=0)


def test_truncated_embeddings_stand_by_themselves(makers, draw):
    model, dim = makers["bert"](), draw.randint(1, HIDDEN - 1)
    found = model.encode(strings(draw, 64)[:64], truncate_dim=dim, convert_to_tensor=True)
    assert found.view(-1).untyped_storage().nbytes() == found.nbytes
    memoryview(model.encode(strings(draw), truncate_dim=dim)).cast("B")


# ---- wrong arguments ----

ODD = {
    "batch_size": [2.5, "3", 0, -1, None, True, np.int64(3), [2], 10**9, float("nan"), 4.0],
    "truncate_dim": ["a", 2.5, [3], -1, 0, 10**6, True, np.int64(2)],
    "prompt": [5, b"x", ["a"], "", "weather : "],
    "prompt_name": ["unknown", 5, ["a"]],
    "output_value": ["other", 5, "token_embeddings", "attention_mask", "input_ids"],
    "precision": ["int3", None, 5],
    "normalize_embeddings": ["yes", None, 0, 2.5],
    "convert_to_numpy": ["x", None, 0],
    "convert_to_tensor": ["x", None, 1],
    "device": ["nothing", "cpu", torch.device("cpu"), 2.5],
    "unknown": [1],
    "pool": [5],
}
INPUTS = [5, None, [5], [None], [["a"]], [("a", "b", "c")], [b"x"], "", [], [[]], [{}], ["a", 5], 2.5, ["a", None]]


@pytest.mark.parametrize("number", range(20))
def test_wrong_arguments(makers, number, draw):
    model = makers["bert"]()
    for _ in range(4):
        inputs = draw.choice(INPUTS) if draw.random() < 0.3 else ["a b", "the weather", "c"][: draw.randint(1, 3)]
        names = draw.sample(sorted(ODD), draw.choice([1, 1, 2]))
        options = {name: draw.choice(ODD[name]) for name in names}
        ours = outcome(model.encode, inputs, **options)
        with sentfast.disabled():
            stock = outcome(model.encode, inputs, **options)
        failed = isinstance(stock, tuple) and isinstance(stock[0], type)
        assert (ours == stock) if failed else (form(ours) == form(stock)), (inputs, options, ours, stock)


# ---- features that have been through the model ----


def sentence_model(path, draw):
    tail = draw.choice([[], [models.Normalize()], [models.Dense(HIDDEN, 8)]])
    return build(path, *tail), lambda model, inputs: model.tokenize(inputs), "sentence_embedding"


def sparse_model(path, draw):
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    torch.manual_seed(1)
    model = SparseEncoder(modules=[MLMTransformer(path), SpladePooling("max")], device="cpu")
    return model, lambda model, inputs: model.tokenize(inputs), "sentence_embedding"


def cross_model(path, draw):
    torch.manual_seed(1)
    model = CrossEncoder(path, num_labels=1, device="cpu")
    return model, lambda model, inputs: model.preprocess([(x, inputs[0]) for x in inputs]), "scores"


MODELS = {"sentence": sentence_model, "sparse": sparse_model}
if VERSION >= (5, 4):
    MODELS["cross"] = cross_model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_features_that_have_been_through_the_model(path, kind, training, draw):
    model, features_of, name = MODELS[kind](path, draw)
    features = features_of(model.train(training), texts(draw.randint(2, 9), draw.randrange(1000)))
    with sentfast.disabled():
        stock = model(model(copy.deepcopy(features)))
    sentfast.report(reset=True)
    first = model(features)[name]
    for _ in range(2):
        again = model(features)
        assert torch.equal(again[name], first) and again.keys() == stock.keys()
    assert not sentfast.report().fallbacks
    torch.testing.assert_close(first, stock[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "cls", [losses.GISTEmbedLoss, losses.CachedGISTEmbedLoss, losses.CachedMultipleNegativesRankingLoss]
)
def test_losses_call_the_model_twice(path, cls, draw):
    model = build(path).train()
    options = {} if cls is losses.CachedMultipleNegativesRankingLoss else {"guide": guide_of(path)}
    if "Cached" in cls.__name__:
        options["mini_batch_size"] = draw.randint(1, 9)
    loss, inputs = cls(model, **options), columns(draw.randint(2, 3))
    features = [model.tokenize(column) for column in inputs]
    sentfast.report(reset=True)
    values = [loss(features, None).detach() for _ in range(3)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert not sentfast.report().fallbacks, sentfast.report()


# ---- models and guides that are no modules ----


class Callable:
    """What a loss needs of a model or a guide, and no more."""

    def __init__(self, model, dtype=torch.float32):
        self.model, self.dtype = model, dtype
        self.tokenizer, self.max_seq_length = model.tokenizer, model.max_seq_length

    def __call__(self, features):
        return {"sentence_embedding": self.model(features)["sentence_embedding"].to(self.dtype)}

    def __getitem__(self, number):
        return self.model[number]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("who", ["model", "guide", "both"])
def test_losses_over_callables(path, who, dtype, draw):
    model, guide, inputs = build(path).train(), guide_of(path), columns(draw.randint(2, 3))
    plain = Callable(model, dtype) if who != "guide" else model, Callable(guide, dtype) if who != "model" else guide
    loss = losses.GISTEmbedLoss(*plain)

    def value_and_gradient():
        model.zero_grad()
        features = [model.tokenize(column) for column in inputs]
        # Before 6.0 the features are gone through twice.
        value = loss(iter(features) if VERSION >= (6, 0) else features, None)
        value.backward()
        return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours = value_and_gradient()
    with sentfast.disabled():
        stock = value_and_gradient()
    for one, other in zip(ours, stock, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_wrong_columns_of_a_guided_loss(path, draw):
    loss = losses.GISTEmbedLoss(build(path), guide_of(path))
    features = [loss.model.tokenize(column) for column in columns(draw.choice([1, 4]))]
    ours = outcome(loss, features, None)
    with sentfast.disabled():
        assert ours == outcome(loss, features, None) and isinstance(ours[0], type)


# ---- the Dense at the end ----


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


def sequential(width):
    return nn.Sequential(nn.Tanh(), nn.Linear(width, 5))


ACTIVATIONS = {
    "softmax": lambda width: nn.Softmax(dim=-1),
    "log softmax": lambda width: nn.LogSoftmax(dim=1),
    "glu": lambda width: nn.GLU(),
    "layer norm": nn.LayerNorm,
    "prelu": lambda width: nn.PReLU(width),
    "sequential": sequential,
    "own": lambda width: Centred(),
    "function": lambda width: torch.sin,
    "gelu": lambda width: nn.GELU(),
    "sigmoid": lambda width: nn.Sigmoid(),
    "relu": lambda width: nn.ReLU(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_dense(path, activation, draw):
    width = 2 * draw.randint(1, 24)
    model = build(path, models.Dense(HIDDEN, width, activation_function=ACTIVATIONS[activation](width)))
    inputs = strings(draw)
    ours = model.encode(inputs)
    with sentfast.disabled():
        eager, exact = model.encode(inputs), copy.deepcopy(model).double().encode(inputs)
    assert form(ours) == form(eager)
    assert_accurate(*map(torch.as_tensor, (ours, eager, exact)), size=1.0)


@needs_fused
@pytest.mark.parametrize("what", ["hook", "forward", "class"])
def test_tail_that_others_have_changed(path, what, draw, monkeypatch):
    model, inputs, seen = build(path, models.Dense(HIDDEN, 8)), strings(draw), []
    original = type(model[2]).forward

    def changed(self, features):
        seen.append(sorted(features))
        features = original(self, features)
        return {**features, "sentence_embedding": features["sentence_embedding"] * 2}

    if what == "hook":
        model[2].register_forward_hook(lambda module, arguments, output: seen.append(sorted(output)))
    elif what == "forward":
        model[2].forward = changed.__get__(model[2])
    else:
        monkeypatch.setattr(type(model[2]), "forward", changed)
    ours, noted = model.encode(inputs), list(seen)
    seen.clear()
    with sentfast.disabled():
        stock = model.encode(inputs)
    assert noted and noted == seen
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(stock), atol=1e-4, rtol=0)


# ---- a class that changes after the first call ----


def changed_class(target):
    cls = type(target)

    def forward(self, *args, **kwargs):
        found = cls.forward(self, *args, **kwargs)
        if "sentence_embedding" in found:
            return {**found, "sentence_embedding": found["sentence_embedding"] + 1}
        found["last_hidden_state" if "last_hidden_state" in found else "token_embeddings"] += 1
        return found

    return type("Own", (cls,), {"forward": forward})


@pytest.mark.parametrize("where", ["model", "transformer", "base", "pooling"])
def test_class_that_changes_after_the_first_call(path, where, draw):
    model, inputs = build(path), strings(draw)
    model.encode(inputs)
    target = {"model": model, "transformer": model[0], "base": model[0].auto_model, "pooling": model[1]}[where]
    target.__class__ = changed_class(target)
    ours = model.encode(inputs), model(model.tokenize(inputs[:3]))["sentence_embedding"]
    with sentfast.disabled():
        stock = model.encode(inputs), model(model.tokenize(inputs[:3]))["sentence_embedding"]
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), atol=1e-4, rtol=0)
