"""Before ours stands for a function of sentence-transformers, both run on a small example."""

from __future__ import annotations

import math

import pytest
import torch
from sentence_transformers import losses, models, util
from tiny_models import HIDDEN, pooling

import sentfast
from sentfast import functional
from sentfast.integrations import gain, proofs, similarity

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """Nothing has been proven yet."""
    monkeypatch.setattr(gain, "on", False)
    sentfast.disable()
    sentfast.enable()
    yield
    sentfast.disable()
    sentfast.enable()


def search(x):
    return util.semantic_search(x[:1], x, top_k=3)


def ranking(x):
    loss = losses.MultipleNegativesRankingLoss(model=torch.nn.Identity())
    return loss.compute_loss_from_embeddings([x, x.flip(0)], None)


def pooled(x):
    return pooling()({"token_embeddings": x.view(5, 8, HIDDEN), "attention_mask": torch.ones(5, 8).long()})


# Name of the patched function, of our operator below it where it is looked up, and a call.
CALLS = {
    "cos_sim": (similarity, "cosines", lambda x: util.cos_sim(x, x)),
    "dot_score": (similarity, "dots", lambda x: util.dot_score(x, x)),
    "pairwise_cos_sim": (similarity, "pairwise", lambda x: util.pairwise_cos_sim(x, x)),
    "normalize_embeddings": (similarity, "normalized", util.normalize_embeddings),
    "Normalize.forward": (functional, "l2_normalize", lambda x: models.Normalize()({"sentence_embedding": x})),
    "Pooling.forward": (functional, "pool", pooled),
    "MultipleNegativesRankingLoss.compute_loss_from_embeddings": (functional, "contrastive_loss", ranking),
}


@pytest.mark.parametrize("name", CALLS)
def test_ours_that_differs_does_not_run(name, monkeypatch):
    module, operator, call = CALLS[name]
    original, factor = getattr(module, operator), 1 + 10 ** -(1 + 2 * torch.rand(()).item())
    monkeypatch.setattr(module, operator, lambda *args, **kwargs: original(*args, **kwargs) * factor)
    sentfast.report(reset=True)
    call(torch.randn(40, HIDDEN))
    assert (name, "SF129") in sentfast.report().fallbacks


@pytest.mark.parametrize("name", [*CALLS, "semantic_search"])
def test_a_proof_leaves_no_trace(name):
    call = search if name == "semantic_search" else CALLS[name][2]
    x = torch.randn(40, HIDDEN)
    inference = bool(torch.randint(2, ()))
    sentfast.report(reset=True)
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        call(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not sentfast.report().fallbacks, sentfast.report()
    first = dict(sentfast.report().calls)
    sentfast.report(reset=True)
    call(x)
    assert first == sentfast.report().calls


def test_examples_are_taken_by_ours():
    """Else they would prove nothing."""
    for name in proofs._EXAMPLES.keys() - proofs._LOSSES.keys():
        examples = proofs._EXAMPLES[name]
        module = {"Pooling.forward": pooling(), "Normalize.forward": models.Normalize()}.get(name)
        given = list(examples(proofs_version(), (module,)))
        assert given, name
        for numbers in (list(proofs._numbers(list(x))) for x in given):
            assert len(set(numbers)) > 5 and all(map(math.isfinite, numbers)), name


def proofs_version():
    from sentfast.integrations import sentence_transformers as table

    return table.resolve(table.installed())
