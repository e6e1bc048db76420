"""What is changed in place before the backward pass, results and inputs: allowed wherever it is with the originals."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Call, Case
from sentence_transformers import losses, models, util
from test_ops import leaves
from tiny_models import VERSION, build, pooling, texts
from torch import Tensor, nn

import sentfast
from sentfast import registry

CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "times 20": (lambda y: y.mul_(20), lambda y: y * 20),
    "plus": (lambda y: y.add_(1), lambda y: y + 1),
    "squared": (lambda y: y.square_(), lambda y: y.square()),
    "zeroed": (lambda y: y.zero_(), lambda y: y * 0),
    "clamped": (lambda y: y.clamp_(min=0.1), lambda y: y.clamp(min=0.1)),
    "activated": (lambda y: y.tanh_(), lambda y: y.tanh()),
}
# Attention keeps its result for the gradient, as PyTorch's and flash-attention's fused kernels do.
KEEPS_ITS_RESULT = ("varlen_attention", "varlen_attention_qkvpacked")


def gradients(case: Case, call: Call, change: Callable[[Tensor], Tensor], weight: Tensor) -> list[Tensor]:
    call = leaves(call)
    out = change(case.run(call))
    return list(torch.autograd.grad((out * weight.to(out.dtype)).sum(), call.tensors))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_changed_in_place(case: Case) -> None:
    calls = [c for c in case.calls(torch.float32, "cpu", True) if torch.isfinite(case.run(c)).all()]
    for number in torch.randperm(len(calls))[:8].tolist():
        call, names = calls[number], list(CHANGES)
        name = names[int(torch.randint(len(names), ()))]
        in_place, apart = CHANGES[name]
        weight = torch.randn_like(case.run(call))
        if case.name in KEEPS_ITS_RESULT:
            q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                in_place(torch.nn.functional.scaled_dot_product_attention(q, k, v)).sum().backward()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(case, call, in_place, weight)
            continue
        found, expected = (gradients(case, call, change, weight) for change in (in_place, apart))
        with registry.use_backend("reference"):
            again = gradients(case, call, in_place, weight)
        for got, want, other in zip(found, expected, again, strict=True):
            assert torch.equal(got, want), f"{case.name} {call.label} {name}"
            torch.testing.assert_close(other, want, rtol=1e-3, atol=1e-4)


# ---- inputs ----

Inputs = dict[str, Tensor]
ROWS, COLUMNS = 70, 32
MODES = ("mean", "max", "cls", "lasttoken")


def pair(function: Callable) -> Callable[[], tuple[Inputs, Callable]]:
    return lambda: ({"a": torch.randn(ROWS, COLUMNS), "b": torch.randn(ROWS, COLUMNS)}, lambda a, b: function(a, b))


def normalized() -> tuple[Inputs, Callable]:
    return {"a": torch.randn(ROWS, COLUMNS)}, lambda a: models.Normalize()({"sentence_embedding": a})[EMBEDDING]


EMBEDDING = "sentence_embedding"


def pooled(mode: str) -> Callable[[], tuple[Inputs, Callable]]:
    def make() -> tuple[Inputs, Callable]:
        lengths = torch.randint(1, 8, (5, 1))
        mask = (torch.arange(7) < lengths).to((torch.int64, torch.int32, torch.bool)[int(torch.randint(3, ()))])
        module = pooling((mode,))

        def call(x: Tensor, mask: Tensor) -> Tensor:
            return module({"token_embeddings": x, "attention_mask": mask})[EMBEDDING]

        return {"x": torch.randn(5, 7, COLUMNS), "mask": mask}, call

    return make


def loss_of(cls: type, columns: int, similarity: Callable = util.cos_sim) -> Callable[[], tuple[Inputs, Callable]]:
    loss = cls(nn.Module(), scale=2.0, similarity_fct=similarity)
    names = "abc"[:columns]

    def call(**embeddings: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([embeddings[name] for name in names], None)

    return lambda: ({name: torch.randn(9, COLUMNS) for name in names}, call)


INPUTS: dict[str, Callable[[], tuple[Inputs, Callable]]] = {
    **{name: pair(getattr(util, name)) for name in ("cos_sim", "dot_score")},
    **{
        f"pairwise_{name}": pair(getattr(util, f"pairwise_{name}"))
        for name in ("cos_sim", "dot_score", "euclidean_sim", "manhattan_sim", "angle_sim")
    },
    "Normalize": normalized,
    **{f"Pooling {mode}": pooled(mode) for mode in MODES},
}
if VERSION >= (5, 4):
    INPUTS |= {
        "MNRL of pairs": loss_of(losses.MultipleNegativesRankingLoss, 2),
        "MNRL of triplets": loss_of(losses.MultipleNegativesRankingLoss, 3, util.dot_score),
        "symmetric MNRL": loss_of(losses.MultipleNegativesSymmetricRankingLoss, 2),
    }


def gradients_after(
    call: Callable, inputs: Inputs, needed: list[str], leaf: bool, changed: str, twice: bool
) -> list[Tensor] | str:
    """Of the inputs that need one, after a change of one input in place; or that PyTorch has refused it."""
    given = {name: x.clone() for name, x in inputs.items()}
    roots = [given[name].requires_grad_() for name in needed]
    given |= {} if leaf else {name: given[name] * 1 for name in needed}
    out = call(**given)
    if changed:
        with torch.no_grad():
            given[changed].copy_(given[changed] == 0)
    try:
        found = torch.autograd.grad(out.square().sum(), roots, create_graph=twice)
        return list(torch.autograd.grad(sum(x.square().sum() for x in found), roots) if twice else found)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return "refused"


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_changed_in_place(name: str) -> None:
    """Refused only where the original refuses it; else the gradients are those of the numbers before the change."""
    draw = random.Random(int(torch.randint(2**31, ())))
    for _ in range(8):
        inputs, call = INPUTS[name]()
        floats = [key for key, x in inputs.items() if x.is_floating_point()]
        needed = draw.sample(floats, draw.randint(1, len(floats)))
        options: Any = inputs, needed, draw.random() < 0.5
        changed, twice = draw.choice(list(inputs)), draw.random() < 0.2
        ours, plain = (gradients_after(call, *options, key, twice) for key in (changed, ""))
        with sentfast.disabled():
            stock = gradients_after(call, *options, changed, twice)
        what = f"gradient of {needed}, {changed} changed, leaf {options[-1]}, twice {twice}"
        assert ours != "refused" or stock == "refused", what
        if ours != "refused":
            for got, want in zip(ours, plain, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=what)


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_parameters_and_features_changed_in_place(paths: dict[str, str], kind: str) -> None:
    draw = random.Random(int(torch.randint(2**31, ())))
    model = build(paths[kind]).eval()
    first = model.state_dict()
    first = {name: x.clone() for name, x in first.items()}

    def gradients(changed: str) -> Tensor | str:
        model.load_state_dict(first)
        model.zero_grad()
        features = model.tokenize(texts(5))
        out = model(features)[EMBEDDING]
        with torch.no_grad():
            if changed:
                x = features[changed] if changed in features else model.get_parameter(changed)
                x.copy_(x == 0)
        try:
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return "refused"
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients("")
    names = ["attention_mask", "input_ids", "token_embeddings", *dict(model.named_parameters())]
    for changed in draw.sample(names, 10):
        ours = gradients(changed)
        if isinstance(ours, str):
            with sentfast.disabled():
                assert gradients(changed) == "refused", changed
        else:
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4, msg=changed)
