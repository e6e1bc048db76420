"""Similarity, search, losses and modules: what the originals look up is honoured when somebody else has replaced it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import losses, models, util

import sentfast
from sentfast.integrations import gain

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


@pytest.fixture(autouse=True)
def small_too(monkeypatch):
    monkeypatch.setattr(gain, "on", False)


def drawn(count: int) -> int:
    return int(torch.randint(count, ()))


def twice(function):
    """The same function with results twice as large."""

    def patched(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return patched


@contextlib.contextmanager
def replaced(owner, name, make):
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def other_code(function):
    """Another ``__code__`` in the same function, of the same arguments."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    space: dict = {"sum": sum}
    exec(
        compile(
            f"def made({', '.join(names)}): return {names[0]}[:, None, 0] * {names[1]}[None, :, 1]", __file__, "exec"
        ),
        space,
    )
    before = function.__code__
    function.__code__ = space["made"].__code__
    try:
        yield
    finally:
        function.__code__ = before


SIMILARITY = util.similarity if hasattr(util, "similarity") else util
PATCHES = {
    "F.normalize": lambda: replaced(F, "normalize", twice),
    "torch.mm": lambda: replaced(torch, "mm", twice),
    "normalize_embeddings": lambda: replaced(SIMILARITY, "normalize_embeddings", twice),
    "torch.logsumexp": lambda: replaced(torch, "logsumexp", twice),
    "cross_entropy": lambda: replaced(F, "cross_entropy", twice),
    "forward of CrossEntropyLoss": lambda: replaced(torch.nn.CrossEntropyLoss, "forward", twice),
    "Tensor.transpose": lambda: replaced(torch.Tensor, "transpose", twice),
    "Tensor.__mul__": lambda: replaced(torch.Tensor, "__mul__", twice),
    "code of cos_sim": lambda: other_code(util.cos_sim),
    "code of dot_score": lambda: other_code(util.dot_score),
}


def ranking_loss(a, b, function=util.cos_sim):
    loss = losses.MultipleNegativesRankingLoss(model=torch.nn.Identity(), similarity_fct=function)
    return loss.compute_loss_from_embeddings([a, b], None)


def cached_loss(a, b):
    loss = losses.CachedMultipleNegativesRankingLoss(
        model=torch.nn.ModuleList([torch.nn.Identity()]), mini_batch_size=2
    )
    return loss.calculate_loss([list(a.split(2)), list(b.split(2))])


class Given(torch.nn.Module):
    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return 16

    get_sentence_embedding_dimension = get_embedding_dimension


def matryoshka_loss(a, b):
    model = Given()
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8])
    return loss([{"embedding": a}, {"embedding": b}], None)


def search(a, b, function=util.cos_sim):
    return [[hit["score"] for hit in hits] for hits in util.semantic_search(a, b, top_k=3, score_function=function)]


def mining(a, b, function=util.cos_sim):
    return [score for score, *_ in util.paraphrase_mining_embeddings(b, top_k=3, max_pairs=9, score_function=function)]


CALLS = {
    "cos_sim": util.cos_sim,
    "dot_score": util.dot_score,
    "pairwise_cos_sim": lambda a, b: util.pairwise_cos_sim(a, b[: len(a)]),
    "pairwise_dot_score": lambda a, b: util.pairwise_dot_score(a, b[: len(a)]),
    "normalize_embeddings": lambda a, b: util.normalize_embeddings(b),
    "ranking loss": lambda a, b: ranking_loss(a, b[: len(a)]),
    "ranking loss of dots": lambda a, b: ranking_loss(a, b[: len(a)], util.dot_score),
    "Matryoshka": lambda a, b: matryoshka_loss(a, b[: len(a)]),
    "cached loss": lambda a, b: cached_loss(a, b[: len(a)]),
    "search": search,
    "search by dots": lambda a, b: search(a, b, util.dot_score),
    "mining": mining,
    "Normalize": lambda a, b: models.Normalize()({"sentence_embedding": a.clone()})["sentence_embedding"],
}


def outcome(call, *args):
    """As an array, or the type of the error."""
    try:
        found = call(*args)
    except Exception as error:
        return type(error)
    return np.asarray(found.detach() if isinstance(found, torch.Tensor) else found, dtype=np.float64)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("first", [True, False], ids=["before the first call", "later"])
def test_what_the_originals_call_is_honoured(call, first):
    a, b = torch.randn(4 + drawn(3), 16), torch.randn(40 + drawn(20), 16)
    plain = outcome(CALLS[call], a, b)
    for what in PATCHES:
        sentfast.enable()
        if first:  # as in a new process: nothing has been read yet
            sentfast.disable()
            sentfast.enable()
        else:
            np.testing.assert_allclose(outcome(CALLS[call], a, b), plain, rtol=1e-4, atol=1e-5)
        with PATCHES[what]():
            found = outcome(CALLS[call], a, b)
            with sentfast.disabled():
                expected = outcome(CALLS[call], a, b)
        if isinstance(expected, type):
            assert found is expected, what
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=what)
    np.testing.assert_allclose(outcome(CALLS[call], a, b), plain, rtol=1e-4, atol=1e-5)


def test_after_a_patch_ours_runs_again():
    a, b = torch.randn(5, 16), torch.randn(7, 16)
    with replaced(torch, "mm", twice):
        sentfast.report(reset=True)
        util.cos_sim(a, b)
        assert ("cos_sim", "SF110") in sentfast.report().fallbacks
    sentfast.report(reset=True)
    util.cos_sim(a, b)
    assert not sentfast.report().fallbacks
