"""One hostile edit, one call, ours against stock."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import NamedTuple

import hostile
import numpy
import pytest
import torch
from hostile_common import InapplicableError
from sentence_transformers import util

import sentfast
from sentfast.integrations import transformers as adapter

# Edits that round: results in half precision have another tolerance.
ROUNDED = ("half", "one_layer_half", "autocast", "default_dtype")


class Case(NamedTuple):
    """kind: of the model. called: once before the edit."""

    kind: str
    edit: str
    call: str
    called: bool
    seed: int

    @classmethod
    def drawn(cls, kind: str, edits, calls, seed: int) -> Case:
        torch.manual_seed(seed)
        edit = hostile.one(list(edits))
        # In others too: ours may look up what stock does not.
        shown = [call for call in hostile.SHOWN_BY.get(edit, calls) if call in calls]
        call = hostile.one(shown if shown and torch.rand(()) < 0.75 else list(calls))
        return cls(kind, edit, call, bool(torch.randint(2, ())), seed)


# ---- calls -----------------------------------------------------------------------------------------------------------


def encoded(model):
    as_tensor, normalize = torch.randint(2, (2,)).tolist()
    found = model.encode(hostile.TEXTS, convert_to_tensor=bool(as_tensor), normalize_embeddings=bool(normalize))
    return [torch.tensor(found) if isinstance(found, numpy.ndarray) else found]


def base_model(model):
    features = model.tokenize(hostile.TEXTS)
    arguments = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in features}
    with torch.no_grad():
        found = model[0].auto_model(**arguments)
    whole, found = isinstance(found, tuple), found if isinstance(found, tuple) else found.to_tuple()
    return [torch.tensor(float(whole)), *(y for x in found for y in (x if isinstance(x, tuple) else [x]))]


def embedding(model):
    return [model(model.tokenize(hostile.TEXTS))["sentence_embedding"]]


def gradient(model):
    model.zero_grad()
    with torch.enable_grad():
        x = embedding(model)[0]
        (x * torch.linspace(-1, 2, x.shape[-1])).sum().backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return [x, torch.cat(found or [torch.zeros(1)])]


def training(model):
    """Dropout has the probability 0 where no edit says otherwise."""
    model.train()
    return gradient(model)


def scores(model):
    x = model.encode(hostile.TEXTS, convert_to_tensor=True)
    found = util.semantic_search(x[:2], x, top_k=2, score_function=model.similarity)
    found += util.semantic_search(x[:2], x, top_k=2)
    # Which of two equal ones comes first is left to chance.
    ranked = torch.tensor([[hit["score"] for hit in hits] for hits in found])
    return [model.similarity(x, x), model.similarity_pairwise(x, x.flip(0)), ranked]


CALLS = {call.__name__: call for call in (encoded, base_model, embedding, gradient, training, scores)}


# ---- comparison ------------------------------------------------------------------------------------------------------


def outcome(call, model, context, seed):
    """Tensors, or the type of the error."""
    torch.manual_seed(seed)
    try:
        with context or contextlib.nullcontext():
            return [x.detach().clone() for x in CALLS[call](model)]
    except Exception as error:
        return type(error)


def alike(found, expected, allowed):
    """What differs; "" for nothing."""
    if isinstance(found, type) or isinstance(expected, type):
        return (
            ""
            if found is expected
            else " for ".join(str(x if isinstance(x, type) else "a result") for x in (found, expected))
        )
    if len(found) != len(expected):
        return f"{len(found)} results for {len(expected)}"
    return next(filter(None, (_alike(x, y, allowed) for x, y in zip(found, expected, strict=True))), "")


def _alike(found, expected, allowed):
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{found.shape} {found.dtype} for {expected.shape} {expected.dtype}"
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return "finite elsewhere"
    if not finite.any():
        return ""
    size = expected[finite].abs().max().clamp(min=1e-20)
    worst = float((found - expected)[finite].abs().max() / size)
    return "" if worst <= allowed else f"off by {worst:.2g}"


def edited(case, model, patch):
    torch.manual_seed(case.seed)
    return hostile.EDITS[case.edit](model, patch)


def attempt(case, plain, undone=True):
    """Ours after the edit against stock after the edit, and if asked for again when the patch is undone.

    Edits that hold during a call only are made anew for stock.
    """
    model = copy.deepcopy(plain)
    allowed = 0.1 if case.edit in ROUNDED else 1e-3
    adapter.mark(model[0].auto_model)  # as any call of the sentence model does
    if case.called:
        outcome(case.call, model, None, case.seed)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            context = edited(case, model, patch)
        except InapplicableError:
            return "inapplicable"
        found = outcome(case.call, model, context, case.seed)
        again = edited(case, model, patch) if context is not None else None
        with sentfast.disabled():
            expected = outcome(case.call, model, again, case.seed)
        difference = alike(found, expected, allowed)
        assert not difference, f"{case}: {difference}"
    if not undone:
        return "alike"
    found = outcome(case.call, model, None, case.seed)
    with sentfast.disabled():
        expected = outcome(case.call, model, None, case.seed)
    difference = alike(found, expected, allowed)
    assert not difference, f"{case}, when it is undone: {difference}"
    return "alike"


def shows(case, plain):
    """Whether stock's own result shows the edit."""
    with sentfast.disabled(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = outcome(case.call, copy.deepcopy(plain), None, case.seed)
        model = copy.deepcopy(plain)
        try:
            context = edited(case, model, patch)
        except InapplicableError:
            return False
        return bool(alike(outcome(case.call, model, context, case.seed), before, 1e-3))
