"""MatryoshkaLoss with sentfast on: the same value and gradient, by one call for all lengths where that can be."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
from sentence_transformers import SentenceTransformer, losses, models, util
from text_losses import (
    CACHED,
    CACHED_GIST,
    CACHED_SYMMETRIC,
    GIST,
    MNRL,
    OPERATORS,
    SYMMETRIC,
    assert_same,
    columns,
    guide_of,
    ran,
    value_and_gradient,
)
from tiny_models import VERSION, build
from torch import nn

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
DIMS = [32, 12, 5]
INNER = {
    "ranking": MNRL,
    "cached ranking": partial(CACHED, mini_batch_size=3),
    "symmetric": SYMMETRIC,
    "cached symmetric": partial(CACHED_SYMMETRIC, mini_batch_size=3),
    "dot": partial(MNRL, similarity_fct=util.dot_score),
    "gathered from one": partial(MNRL, gather_across_devices=True),
    "guided": GIST,
    "cached guided": partial(CACHED_GIST, mini_batch_size=3),
}
OPTIONS = {
    "all": {},
    "two": dict(matryoshka_weights=[1, 0.5, 2], n_dims_per_step=2),
    "one": dict(matryoshka_weights=[1, 0.5, 2], n_dims_per_step=1),
}


@pytest.fixture(scope="module")
def model(path):
    return build(path).train()


@pytest.fixture(scope="module")
def guide(path):
    return guide_of(path)


def calls_of(loss, count=3, labels=None) -> int:
    """How often one step calls the operator."""
    sentfast.report(reset=True)
    value_and_gradient(loss, columns(count), labels)
    return sum(n for (name, _), n in sentfast.report().calls.items() if name in OPERATORS)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("inner", INNER)
def test_all_lengths_in_one_call(model, guide, inner, options):
    others = {"guide": guide} if "guided" in inner else {}

    def make(model, **others):
        return losses.MatryoshkaLoss(model, INNER[inner](model, **others), DIMS, **OPTIONS[options])

    assert_same(make, model, columns(3), **others)
    # Before 6.0 a guide writes over the embeddings of all lengths but the first, so the original has to do it.
    apart = inner == "guided" and VERSION < (6, 0)
    lengths = OPTIONS[options].get("n_dims_per_step", len(DIMS))
    assert calls_of(make(model, **others)) == (lengths if apart else 1)


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside another"])
def test_guided_by_the_model_itself(path, inside):
    """Its embeddings are cut as the model's are, since the loss cuts what comes out of the model."""
    model = build(path).eval()  # without dropout

    def make(model):
        guide = SentenceTransformer(modules=[model], device="cpu") if inside else model
        return losses.MatryoshkaLoss(model, GIST(model, guide), DIMS)

    assert_same(make, model, columns(3), operators=())


@pytest.mark.parametrize("outer", [losses.Matryoshka2dLoss, losses.AdaptiveLayerLoss])
def test_over_the_layers_too(path, outer):
    model = build(path).train()
    make = partial(outer, matryoshka_dims=DIMS) if outer is losses.Matryoshka2dLoss else outer

    def loss(model):
        inner = MNRL(model) if outer is losses.Matryoshka2dLoss else losses.MatryoshkaLoss(model, MNRL(model), DIMS)
        return make(model, inner)

    assert_same(loss, model, columns(3))


def test_static_embeddings(path):
    """Where the loss is nearly all of a step."""
    tokenizer = build(path).tokenizer
    static = models.StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=32)
    model = SentenceTransformer(modules=[static], device="cpu").train()

    def make(model):
        return losses.MatryoshkaLoss(model, MNRL(model), DIMS)

    assert_same(make, model, columns(3))
    assert calls_of(make(model)) == 1


@pytest.mark.parametrize("inner", [MNRL, CACHED, SYMMETRIC, GIST, CACHED_GIST], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_loss(path, guide, inner, autocast, dtype):
    model = build(path).to(dtype)
    others = [copy.deepcopy(guide).to(dtype)] if "GIST" in inner.__name__ else []
    loss = losses.MatryoshkaLoss(model, inner(model, *others), DIMS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with sentfast.disabled():
            eager = value_and_gradient(loss, columns(3))
        with ran():
            result = value_and_gradient(loss, columns(3))
    assert [x.dtype for x in result] == [x.dtype for x in eager]
    if not others:  # half embeddings turn the guide's comparisons
        torch.testing.assert_close(result[0], eager[0], atol=0.15 * len(DIMS), rtol=0.05)


def test_learned_scale(model):
    gradients = []
    for context in (sentfast.disabled(), ran()):
        with context:
            inner = MNRL(model)
            inner.scale = nn.Parameter(torch.tensor(11.0))
            value_and_gradient(losses.MatryoshkaLoss(model, inner, DIMS), columns(3))
            gradients.append(inner.scale.grad)
    torch.testing.assert_close(*gradients)


def similarity_of_the_user(a, b):
    return util.cos_sim(a, b) * 0.5


class Doubled(MNRL):
    def compute_loss_from_embeddings(self, embeddings, labels):
        return 2 * super().compute_loss_from_embeddings(embeddings, labels)


class Noted(MNRL):
    def forward(self, sentence_features, labels):
        self.seen = [*getattr(self, "seen", []), labels]
        return super().forward(sentence_features, labels)


STEP, CACHED_STEP = "MultipleNegativesRankingLoss.compute_loss_from_embeddings", f"{CACHED.__name__}.calculate_loss"
ONE_BY_ONE = {
    "a similarity of the user": (partial(MNRL, similarity_fct=similarity_of_the_user), 0, {STEP: "SF101"}),
    "the same, cached": (partial(CACHED, similarity_fct=similarity_of_the_user), 0, {CACHED_STEP: "SF101"}),
    "CoSENT": (losses.CoSENTLoss, 0, {}),
    "a subclass with another step": (Doubled, 2, {}),
    "a subclass with another forward": (Noted, 2, {}),
}


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_left_to_the_loop(model, case):
    """Then the same lengths are drawn as without sentfast."""
    make, calls, codes = ONE_BY_ONE[case]
    labels = torch.linspace(0, 1, 7)
    loss = losses.MatryoshkaLoss(model, make(model), DIMS, n_dims_per_step=2)
    with sentfast.disabled():
        expected = value_and_gradient(loss, columns(2), labels)
    drawn = random.random()
    with ran(set(), codes):
        torch.testing.assert_close(value_and_gradient(loss, columns(2), labels), expected, rtol=1e-3, atol=1e-4)
    assert random.random() == drawn
    assert calls_of(loss, 2, labels) == calls


def test_another_model_inside(model, path):
    loss = losses.MatryoshkaLoss(model, MNRL(build(path)), DIMS)
    with sentfast.disabled():
        expected = loss([model.tokenize(column) for column in columns(2)], None)
    torch.testing.assert_close(loss([model.tokenize(column) for column in columns(2)], None), expected)


@pytest.mark.skipif(VERSION < (6, 0), reason="the guide does not run once for all lengths")
def test_a_guide_with_dropout_runs_once_for_each(model, guide):
    noisy = copy.deepcopy(guide).train()
    loss = losses.MatryoshkaLoss(model, GIST(model, noisy), DIMS)
    assert calls_of(loss) == 1
    for module in noisy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    assert calls_of(loss) == len(DIMS)


@pytest.mark.parametrize("inner", [MNRL, CACHED], ids=lambda cls: cls.__name__)
def test_a_length_beyond_the_embeddings_is_the_originals_error(model, inner):
    loss = losses.MatryoshkaLoss(model, inner(model), DIMS)
    for holder in (loss, getattr(loss.loss, "calculate_loss", loss)):
        if hasattr(holder, "matryoshka_dims"):
            holder.matryoshka_dims = (33, 12, 5)
    with sentfast.disabled(), pytest.raises(ValueError, match="33") as expected:
        value_and_gradient(loss, columns(2))
    with pytest.raises(ValueError, match="33") as found:
        value_and_gradient(loss, columns(2))
    assert str(found.value) == str(expected.value)


def test_one_that_exists_already(model):
    """A cached loss's step was bound when the loss was made, perhaps before sentfast was on."""
    sentfast.disable()
    cached = losses.MatryoshkaLoss(model, CACHED(model, mini_batch_size=3), DIMS)
    assert calls_of(cached) == 0
    sentfast.enable()
    assert calls_of(cached) == 1


def test_a_hook_on_all_modules_sees_the_inner_loss(model):
    loss = losses.MatryoshkaLoss(model, MNRL(model), DIMS)
    assert calls_of(loss, 2) == 1

    def double(module, given, out):
        return out * 2 if isinstance(module, MNRL) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        found = value_and_gradient(loss, columns(2))
        with sentfast.disabled():
            expected = value_and_gradient(loss, columns(2))
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
