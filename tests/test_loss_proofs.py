"""Before ours stands for a loss, both run on a small example with that loss's settings, and their gradients agree."""

from __future__ import annotations

import copy
import gc
import random
import sys
import weakref
from functools import partial

import pytest
import torch
from sentence_transformers import losses
from text_losses import CACHED, CACHED_GIST, CACHED_SYMMETRIC, GIST, MNRL, SYMMETRIC, columns, value_and_gradient
from tiny_models import VERSION, build
from torch import nn

import sentfast
from sentfast import functional
from sentfast.integrations import loss_proofs, proofs
from sentfast.integrations import sentence_transformers as table

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
RANKING, CACHED_RANKING = "compute_loss_from_embeddings", "calculate_loss"
SITES = {
    "ranking": (MNRL, f"MultipleNegativesRankingLoss.{RANKING}"),
    "symmetric": (SYMMETRIC, f"MultipleNegatives{'Symmetric' if VERSION < (5, 3) else ''}RankingLoss.{RANKING}"),
    "cached": (partial(CACHED, mini_batch_size=3), f"CachedMultipleNegativesRankingLoss.{CACHED_RANKING}"),
    "cached symmetric": (
        partial(CACHED_SYMMETRIC, mini_batch_size=3),
        f"CachedMultipleNegatives{'Symmetric' if VERSION < (5, 3) else ''}RankingLoss.{CACHED_RANKING}",
    ),
    "guided": (GIST, "GISTEmbedLoss.forward"),
    "cached guided": (partial(CACHED_GIST, mini_batch_size=3), f"CachedGISTEmbedLoss.{CACHED_RANKING}"),
}
if (5, 4) <= VERSION < (6, 0):
    del SITES["guided"]


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    """Nothing has been proven yet."""
    sentfast.disable()
    sentfast.enable()
    yield
    sentfast.disable()
    sentfast.enable()


@pytest.fixture(scope="module")
def model(path):
    return build(path).train()


def loss_of(what, model, matryoshka=False):
    make, name = SITES[what]
    loss = make(model, **({"guide": copy.deepcopy(model)} if "guided" in what else {}))
    if not matryoshka:
        return loss, name
    outer = losses.MatryoshkaLoss(model, loss, [32, 8], n_dims_per_step=1)
    return outer, "CachedLossDecorator.__call__" if "cached" in what else "MatryoshkaLoss.forward"


def assert_alike(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("where", ["value", "gradient"])
@pytest.mark.parametrize("what", SITES)
def test_ours_that_differs_does_not_run(what, where, model, monkeypatch):
    original, factor = functional.contrastive_loss, 1 + 10 ** -(1 + 2 * torch.rand(()).item())

    def other(*args, **kwargs):
        value = original(*args, **kwargs)
        return value * factor if where == "value" else value.detach() + (value - value.detach()) * factor

    monkeypatch.setattr(functional, "contrastive_loss", other)
    for matryoshka in (False, True):
        loss, name = loss_of(what, model, matryoshka)
        sentfast.report(reset=True)
        found = value_and_gradient(loss, columns(2))
        counted = sentfast.report().fallbacks
        # Matryoshka asks for the inner loss first.
        assert (SITES[what][1] if matryoshka else name, "SF129") in counted, counted
        with sentfast.disabled():
            assert_alike(found, value_and_gradient(loss, columns(2)))


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("what", SITES)
def test_a_proof_leaves_no_trace(what, matryoshka, model):
    loss, _ = loss_of(what, model, matryoshka)
    settings = {name: value for name, value in vars(loss).items() if not name.startswith("_")}
    seen = []
    hooks = [x.register_forward_hook(lambda *args: seen.append("hook")) for x in (loss, model)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append("saved") or x, lambda x: x):
        sentfast.report(reset=True)
        state, other = torch.get_rng_state(), random.getstate()
        name = loss_of(what, model, matryoshka)[1]
        site, original, attempt = stands_for(name, loss, matryoshka)
        assert proofs.prove(name, VERSION_HERE, original, attempt, (site,)) == ""
    assert not seen and not sentfast.report().calls
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == other
    assert settings.keys() == {name for name in vars(loss) if not name.startswith("_")}
    assert all(value is vars(loss)[name] for name, value in settings.items())
    for hook in hooks:
        hook.remove()


VERSION_HERE = table.resolve(table.installed())


def stands_for(name, loss, matryoshka):
    """The object that a function is called with, the function itself, and ours."""
    site = loss.loss.calculate_loss if name.startswith("CachedLossDecorator") else loss
    cls = next(cls for cls in type(site).__mro__ if name.partition(".")[2] in vars(cls))
    row = next(row for row in table.table(VERSION_HERE) if row.owner.endswith(f":{cls.__name__}"))
    original = vars(cls)[row.attribute].__wrapped__
    leading = (name, original) if row.wrap is table.with_original else ()
    return site, original, partial(row.replacement, VERSION_HERE, *leading)


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("what", SITES)
def test_an_example_is_taken_by_ours(what, matryoshka, model):
    """Else it would prove nothing; where a loss runs as it is, there is none."""
    loss, name = loss_of(what, model, matryoshka)
    site, _, attempt = stands_for(name, loss, matryoshka)
    given = list(proofs._EXAMPLES[name](VERSION_HERE, (site,)))
    apart = matryoshka and (what == "guided" and VERSION < (6, 0))
    assert bool(given) != apart
    for example in given:
        found = attempt(*proofs._copied(example))
        assert isinstance(found, torch.Tensor) and found.isfinite() and found > 0.01


def test_every_setting_is_proven_by_itself(model, monkeypatch):
    """A first loss that runs as it is proves nothing for the next one, nor one with other settings."""
    proven = []
    original = proofs._EXAMPLES[SITES["ranking"][1]]

    def examples(version, args):
        proven.append(loss_proofs.settings(args))
        return original(version, args)

    monkeypatch.setitem(proofs._EXAMPLES, SITES["ranking"][1], examples)
    x = torch.randn(4, 8)
    several = [MNRL(model, similarity_fct=torch.cdist), MNRL(model), MNRL(model, scale=3.0)]
    if VERSION >= (5, 3):
        several.append(MNRL(model, directions=("query_to_doc", "doc_to_query")))
    for loss in [*several, *several]:
        loss.compute_loss_from_embeddings([x, x.flip(0)], None)
    assert len(proven) == len(set(proven)) == len(several) - 1  # another scale takes no other way


def changed(module, how):
    """Of a module inside a loss: its result is twice as large."""
    original = module.forward
    if how == "forward":
        module.forward = lambda *args: 2 * original(*args)
    else:
        module.register_forward_hook(lambda module, args, result: 2 * result)


@pytest.mark.parametrize("how", ["forward", "hook"])
@pytest.mark.parametrize("what", SITES)
def test_a_module_inside_a_loss_is_honoured(what, how, model):
    for first in (False, True):
        loss, _ = loss_of(what, model, bool(torch.randint(2, ())))
        if not first:
            value_and_gradient(loss, columns(2))
        inner = loss.loss if isinstance(loss, losses.MatryoshkaLoss) else loss
        for module in (getattr(inner, "cross_entropy_loss", None), getattr(inner, "similarity_fct", None)):
            if isinstance(module, torch.nn.Module):
                changed(module, how)
        found = value_and_gradient(loss, columns(2))
        with sentfast.disabled():
            assert_alike(found, value_and_gradient(loss, columns(2)))


def _edits_of_settings(loss):
    names = [name for name, value in vars(loss).items() if not name.startswith("_") and not isinstance(value, list)]
    if not names:  # every one was deleted
        loss.added, names = 1, ["added"]
    name = names[int(torch.randint(len(names), ()))]
    return [
        lambda: setattr(loss, name, [3, -1.5, None, "other", (1, 2), len, object()][int(torch.randint(7, ()))]),
        lambda: setattr(loss, f"new{int(torch.randint(9, ()))}", 1),
        lambda: delattr(loss, name),
        lambda: vars(loss).update({name: partial(abs, 1)}),
        lambda: setattr(loss, "__class__", type("Other", (type(loss),), {})),
        lambda: setattr(loss, "cache", [torch.zeros(1)]),
    ]


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("what", SITES)
def test_settings_are_those_of_now(what, matryoshka, model):
    """Read once and compared; after an edit of the loss or of the one inside they are what they would be read as."""
    loss, _ = loss_of(what, model, matryoshka)
    for _ in range(12):
        before = loss_proofs.settings((loss,))
        assert loss_proofs.settings((loss,)) is before
        edited = loss.loss if matryoshka and torch.randint(2, ()) else loss
        edits = _edits_of_settings(edited)
        edits[int(torch.randint(len(edits), ()))]()
        found = loss_proofs.settings((loss,))
        loss_proofs._known.pop(edited)
        assert found == loss_proofs.settings((loss,))


def test_settings_keep_no_loss_alive(model):
    for what in SITES:
        for matryoshka in (False, True):
            loss, _ = loss_of(what, model, matryoshka)
            inner = loss.loss if matryoshka else loss
            loss_proofs.settings((loss,))
            if "cached" in what and matryoshka:
                loss_proofs.settings((inner.calculate_loss,))
            dead = weakref.ref(inner)
            del loss, inner
            gc.collect()
            assert dead() is None


def _flipped(out):
    return {**out, "sentence_embedding": out["sentence_embedding"].flip(-1)}


def _called(self, features, **kwargs):
    return _flipped(nn.Module.__call__(self, features, **kwargs))


# Around the inner loss and the model: (edit of a MatryoshkaLoss by a patch).
AROUND = {
    "hook of the inner loss": lambda loss, patch: loss.loss.register_forward_hook(lambda module, args, out: out * 2),
    "hook before the inner loss": lambda loss, patch: loss.loss.register_forward_pre_hook(
        lambda module, args: (args[0][::-1], args[1])
    ),
    "backward hook of the inner loss": lambda loss, patch: loss.loss.register_full_backward_pre_hook(
        lambda module, gradients: tuple(x * 2 for x in gradients)
    ),
    "hook of the model": lambda loss, patch: loss.model.register_forward_hook(lambda module, args, out: _flipped(out)),
    "call of the model": lambda loss, patch: patch.setattr(type(loss.model), "__call__", _called, raising=False),
    "shrink": lambda loss, patch: patch.setattr(
        sys.modules[losses.MatryoshkaLoss.__module__], "shrink", lambda x, dim: x[..., -dim:]
    ),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("edit", AROUND)
def test_what_is_around_a_loss_for_all_lengths(edit, called, model, monkeypatch):
    """Which runs once where the original runs the inner loss for each length."""
    what = list(SITES)[int(torch.randint(len(SITES), ()))]
    loss, _ = loss_of(what, copy.deepcopy(model), matryoshka=True)
    loss.n_dims_per_step = -1
    if called:
        value_and_gradient(loss, columns(2))
    AROUND[edit](loss, monkeypatch)
    random.seed(0)
    found = value_and_gradient(loss, columns(2))
    random.seed(0)
    with sentfast.disabled():
        assert_alike(found, value_and_gradient(loss, columns(2)))
