"""Gradients of gradients through sentence-transformers' functions, modules, losses and whole models: as without us."""

from __future__ import annotations

from collections.abc import Callable

import encoders
import pytest
import torch
from sentence_transformers import losses, models, util
from tiny_models import build, pooling, texts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sentfast

pytestmark = pytest.mark.usefixtures("switched_on")


def close(ours: Tensor, stock: Tensor) -> None:
    size = max(1.0, stock.abs().max().item())
    torch.testing.assert_close(ours, stock, rtol=2e-4, atol=2e-4 * size)


def drawn_mask(batch: int, length: int) -> Tensor:
    return (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()


def pooled(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def score(x: Tensor, weights: Tensor) -> Tensor:
        tokens = x.view(len(x), -1, 4)
        features = {"token_embeddings": tokens * tokens, "attention_mask": drawn_mask(*tokens.shape[:2])}
        return pooling((mode,))(features)["sentence_embedding"].pow(2).sum() + 0 * weights.sum()

    return score


def ranking(x: Tensor, y: Tensor, **options) -> Tensor:
    loss = losses.MultipleNegativesRankingLoss(None, **options)
    return loss.compute_loss_from_embeddings([x, y], None)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos_sim": lambda x, y: util.cos_sim(x, y).sum(),
    "cos_sim with itself": lambda x, y: (util.cos_sim(x, x) * util.cos_sim(y, x * 2)).sum(),
    "dot_score": lambda x, y: util.dot_score(x, y).sum(),
    "pairwise_cos_sim": lambda x, y: util.pairwise_cos_sim(x, y).sum(),
    "pairwise_dot_score": lambda x, y: util.pairwise_dot_score(x, y).sum(),
    "pairwise_euclidean_sim": lambda x, y: util.pairwise_euclidean_sim(x, y).sum(),
    "pairwise_manhattan_sim": lambda x, y: util.pairwise_manhattan_sim(x, y).pow(2).sum(),
    "normalize_embeddings": lambda x, y: (util.normalize_embeddings(x) * y).sum(),
    "Normalize": lambda x, y: (models.Normalize()({"sentence_embedding": x})["sentence_embedding"] * y).sum(),
    "ranking loss": ranking,
    "ranking loss of products": lambda x, y: ranking(x, y, scale=0.5, similarity_fct=util.dot_score),
    **{f"Pooling {mode}": pooled(mode) for mode in ("mean", "max", "cls", "lasttoken")},
}


def both(measure: Callable[[], tuple[Tensor, ...]]) -> None:
    """`measure` with and without us, from the same random numbers."""
    state = torch.get_rng_state()
    sentfast.report(reset=True)
    ours = measure()
    assert sentfast.report().calls, "no operator ran"
    torch.set_rng_state(state)
    with sentfast.disabled():
        stock = measure()
    for got, want in zip(ours, stock, strict=True):
        close(got, want)


@pytest.mark.parametrize("name", SCORES)
def test_a_gradient_penalty(name: str) -> None:
    """As WGAN-GP has it: the loss contains how far the norm of a gradient is from 1."""
    rows, columns = int(torch.randint(2, 7, ())), 4 * int(torch.randint(1, 6, ()))
    x, y = torch.randn(rows, columns, requires_grad=True), torch.randn(rows, columns, requires_grad=True)

    def measure() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        value = SCORES[name](x, y)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().sum()
        return slope, *torch.autograd.grad(value + 10 * penalty, (x, y), materialize_grads=True)

    both(measure)


@pytest.mark.parametrize("name", SCORES)
def test_hessian(name: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)

    def measure() -> tuple[Tensor, ...]:
        def score(x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return SCORES[name](x, y)

        jacobian = torch.autograd.functional.jacobian(score, x)
        return jacobian, torch.autograd.functional.hessian(score, x), torch.autograd.functional.vhp(score, x, y)[1]

    both(measure)


def curvature(model: torch.nn.Module, score: Callable[[], Tensor], directions: list[Tensor]) -> tuple[Tensor, ...]:
    """The product of the Hessian by the model's parameters and a vector, as one row."""
    parameters = list(model.parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    torch.manual_seed(0)
    grads = torch.autograd.grad(score(), parameters, create_graph=True, **options)
    product = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    again = torch.autograd.grad(product, parameters, **options)
    return torch.cat([g.flatten() for g in grads]).detach(), torch.cat([g.flatten() for g in again])


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_curvature_of_a_whole_model(model_type: str) -> None:
    """With eager attention; PyTorch's fused attention has no second derivative, ours has."""
    model = encoders.model(model_type, attn_implementation="eager")
    sentfast.accelerate(model)
    batch, length = int(torch.randint(2, 5, ())), int(torch.randint(2, 12, ()))
    ids, mask = torch.randint(2, encoders.VOCABULARY, (batch, length)), drawn_mask(batch, length)
    directions = [torch.randn_like(p) for p in model.parameters()]
    weights = torch.randn(batch, 32)

    def score() -> Tensor:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        return util.cos_sim(hidden, weights).sum()

    both(lambda: curvature(model, score, directions))
    sentfast.restore(model)


def test_curvature_of_a_training_step(path: str) -> None:
    model = build(path, models.Normalize()).train()
    loss = losses.MultipleNegativesRankingLoss(model)
    columns = [texts(3, seed=int(torch.randint(1000, ()))) for _ in range(2)]
    directions = [torch.randn_like(p) for p in model.parameters()]

    def score() -> Tensor:
        tokenize = getattr(model, "preprocess", None) or model.tokenize
        return loss([tokenize(column) for column in columns], None)

    with sdpa_kernel(SDPBackend.MATH):  # the one of PyTorch's fused kernels that has a second derivative
        both(lambda: curvature(model, score, directions))
