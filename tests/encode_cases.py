"""What the tests of `encode` share: texts, the three forms of the project's models, and the comparison with stock."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKEND
from sentence_transformers import models
from tiny_models import HIDDEN, VERSION, build, save_base, texts

import sentfast

FUSED = VERSION >= (6, 2)  # before, `encode` is one piece, and the encoder runs inside its loop
TEXTS = texts(23)
PAIRS = list(zip(TEXTS[:8], TEXTS[8:16], strict=True))
PROMPTS = {"query": "query : ", "passage": "the passage: ", "empty": ""}
KINDS = ("bert", "mpnet", "xtremedistil")

needs_fused = pytest.mark.skipif(not FUSED, reason="encode has no loop of its own before 6.2")
needs_native = pytest.mark.skipif(BACKEND != "cpu", reason="the compiled CPU kernels are not loaded")


def save_bases(folder) -> dict[str, str]:
    return {kind: save_base(folder, kind) for kind in ("bert", "mpnet")}


def makers_of(paths):
    """The three forms of the project's models: mean; mean + Normalize; mean + Dense of tanh, short texts."""

    def distil(**kwargs):
        model = build(paths["bert"], models.Dense(HIDDEN, 16), **kwargs)
        model.max_seq_length = 16
        return model

    return {
        "bert": lambda **kwargs: build(paths["bert"], **kwargs),
        "mpnet": lambda **kwargs: build(paths["mpnet"], models.Normalize(), **kwargs),
        "xtremedistil": distil,
    }


@contextmanager
def ran(*operators: str, codes: set[str] = frozenset(), fused: bool = FUSED):
    """The block calls these operators on the expected backend, and falls back for these reasons and no other."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    names = {name for name, _ in report.calls}
    assert {backend for _, backend in report.calls} <= {BACKEND}, str(report)
    assert set(operators) <= names, f"{set(operators) - names} did not run\n{report}"
    assert {code for _, code in report.fallbacks} == codes, str(report)
    if fused and "encoder" in operators:
        assert "pool" not in names, f"pooling ran by itself\n{report}"


def check(
    model, inputs, *operators, method="encode", codes=frozenset(), fused=FUSED, encoder=frozenset({"encoder"}), **kwargs
):
    """Ours against stock and against stock in float64; encoder: what runs the layers."""
    with sentfast.disabled():
        eager = getattr(model, method)(inputs, **kwargs)
        exact = getattr(copy.deepcopy(model).double(), method)(inputs, **kwargs)
    with ran(*encoder, *operators, codes=codes, fused=fused):
        result = getattr(model, method)(inputs, **kwargs)
    assert type(result) is type(eager)
    if isinstance(result, list):
        assert [x.shape for x in result] == [x.shape for x in eager]
        result, eager, exact = (torch.cat([x.flatten() for x in each]) for each in (result, eager, exact))
    result, eager, exact = (torch.as_tensor(x) for x in (result, eager, exact))
    assert result.dtype == eager.dtype and result.device == eager.device
    assert result.is_inference() == eager.is_inference()
    # Stock's own error in a small sum may be nil by chance; the vectors have rows of about this size.
    assert_accurate(result, eager, exact, size=1.0)
