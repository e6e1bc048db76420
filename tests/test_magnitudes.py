"""Rows of every magnitude that float32 has: what leaves its range on the way leaves it where stock's does."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from torch import Tensor

import sentfast.functional as F

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-12
# Smaller results have lost digits to subnormal numbers, differently in every order of their sum.
LEAST = 1e-30
RANGE = {torch.float32: 38.0, torch.bfloat16: 38.0, torch.float16: 4.0}


def rows(count: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of magnitudes drawn evenly in their logarithm, some of zeros and some with an inf or a NaN."""
    power = (torch.rand(count, 1) * 2 - 1) * RANGE[dtype]
    values = torch.randn(count, dim).clamp(-2, 2).double() * 10.0**power
    values[torch.rand(count) < 0.1] = 0.0
    odd = torch.rand(count) < 0.1
    values[odd, torch.randint(dim, (count,))[odd]] = [float("inf"), float("-inf"), float("nan")][
        int(torch.randint(3, ()))
    ]
    return values.to(dtype)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dim = 1 if torch.rand(()) < 0.2 else int(torch.randint(2, 70, ()))  # one column is not squared
    a, b = (rows(int(torch.randint(1, 60, ())), dim, dtype) for _ in range(2))
    return a, b


def stock(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


def unit(x: Tensor) -> Tensor:
    """Stock's formula in float64, but for the norms that float32 cannot hold."""
    norm = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
    beyond = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).isinf()
    return x.double() / torch.where(beyond, torch.inf, norm).clamp(min=EPS)


def assert_close(got: Tensor, eager: Tensor, exact: Tensor, size: Tensor, what: str) -> None:
    """The tolerance rule for each element by itself, relative to what it was made of."""
    size = size.nan_to_num(nan=1.0, posinf=1.0).clamp(min=LEAST).cpu()
    assert_accurate(
        *((x.detach().cpu().double() / size).float() for x in (got, eager)), exact.detach() / size, size=1.0, what=what
    )


def skip_unsupported(backend: Backend, dtype: torch.dtype) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} does not compute {dtype}")


@every_backend
@every_dtype
def test_cosine_similarity(backend: Backend, dtype: torch.dtype) -> None:
    skip_unsupported(backend, dtype)
    a, b = drawn(dtype)
    with backend.forced("cosine_similarity"):
        got = F.cosine_similarity(a.to(backend.device), b.to(backend.device))
    exact, size = unit(a) @ unit(b).T, unit(a).abs() @ unit(b).abs().T
    assert_close(got, stock(a) @ stock(b).T, exact, size, "cosine_similarity")


@every_backend
@every_dtype
def test_pairwise_cosine_similarity(backend: Backend, dtype: torch.dtype) -> None:
    skip_unsupported(backend, dtype)
    a, _ = drawn(dtype)
    b = rows(*a.shape, dtype)
    with backend.forced("pairwise_similarity"):
        got = F.pairwise_cosine_similarity(a.to(backend.device), b.to(backend.device))
    products = unit(a) * unit(b)
    eager = (stock(a) * stock(b)).sum(dim=-1)
    assert_close(got, eager, products.sum(dim=-1), products.abs().sum(dim=-1), "pairwise_cosine_similarity")


@every_backend
def test_l2_normalize(backend: Backend) -> None:
    x, _ = drawn(torch.float32)
    with backend.forced("l2_normalize"):
        got = F.l2_normalize(x.to(backend.device))
    assert_close(got, stock(x), unit(x), unit(x).abs(), "l2_normalize")


@every_backend
@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_distances(backend: Backend, metric: str) -> None:
    x, _ = drawn(torch.float32)
    y = rows(*x.shape, torch.float32)
    x, y = (z[(x.isfinite() & y.isfinite()).all(dim=-1)] for z in (x, y))
    with backend.forced("pairwise_similarity"):
        got = F.pairwise_similarity(x.to(backend.device), y.to(backend.device), metric=metric)
    order = 2 if metric == "euclidean" else 1
    eager, exact = (-torch.linalg.vector_norm(a - b, ord=order, dim=-1) for a, b in ((x, y), (x.double(), y.double())))
    exact = torch.where(eager.isinf(), eager.double(), exact)
    # A squared difference below 1e-38 is a subnormal number.
    assert_close(got, eager, exact, exact.abs().clamp(min=1e-15), metric)


@every_backend
@pytest.mark.parametrize("pairwise", [False, True], ids=["matrix", "pairwise"])
def test_gradients_of_cosines(backend: Backend, pairwise: bool) -> None:
    a, b = drawn(torch.float32)
    a, b = a[a.isfinite().all(dim=-1)], b[b.isfinite().all(dim=-1)]
    if pairwise:
        a, b = a[: len(b)], b[: len(a)]
    grad = torch.randn(len(a)) if pairwise else torch.randn(len(a), len(b))
    cosine = F.pairwise_cosine_similarity if pairwise else F.cosine_similarity

    def gradients(dtype: torch.dtype, similarity, device: str = "cpu") -> tuple[Tensor, ...]:
        x, y = (z.to(device, dtype).detach().requires_grad_() for z in (a, b))
        return torch.autograd.grad(similarity(x, y), (x, y), grad.to(device, dtype))

    def by(normalized):
        return lambda x, y: (normalized(x) * normalized(y)).sum(-1) if pairwise else normalized(x) @ normalized(y).T

    with backend.forced():
        found = gradients(torch.float32, cosine, backend.device)
    eager, exact = gradients(torch.float32, by(stock)), gradients(torch.float64, by(unit))
    # What a row's gradient is made of: unit vectors times the scores' gradients, divided by its norm.
    sums = (grad.abs(), grad.abs()) if pairwise else (grad.abs().sum(dim=1), grad.abs().sum(dim=0))
    for x, total, got, plain, want in zip((a, b), sums, found, eager, exact, strict=True):
        divisor = torch.linalg.vector_norm(x, dim=-1).double().clamp(min=EPS)
        assert_close(got, plain, want, (total / divisor)[:, None].expand_as(want), "gradient")


@every_backend
def test_unit_numbers_have_no_gradient(backend: Backend) -> None:
    """x / |x| of one column is 1 or -1, and its gradient zero, not what roundings leave."""
    a, b = (torch.randn(int(torch.randint(1, 40, ())), 1, requires_grad=True, device=backend.device) for _ in range(2))
    count = min(len(a), len(b))
    with backend.forced():
        for out in (
            F.cosine_similarity(a, b),
            F.pairwise_cosine_similarity(a[:count], b[:count]),
            F.l2_normalize(a) + F.l2_normalize(b).sum(),
        ):
            for grad in torch.autograd.grad(out, (a, b), torch.randn_like(out)):
                assert not grad.any()


PAIRWISE = {
    "dot": lambda a, b: (a * b).sum(dim=-1),
    "euclidean": lambda a, b: -torch.linalg.vector_norm(a - b, dim=-1),
    "manhattan": lambda a, b: -(a - b).abs().sum(dim=-1),
}


@every_backend
@pytest.mark.parametrize("metric", PAIRWISE)
def test_gradients_of_pairs(backend: Backend, metric: str) -> None:
    """Infinity and NaN where PyTorch has them, and nowhere else."""
    a, _ = drawn(torch.float32)
    b, grad = rows(*a.shape, torch.float32), torch.randn(len(a))
    needed = [z for z in (a, b) if torch.rand(()) < 0.7] or [b]
    for z in needed:
        z.requires_grad_()

    def gradients(similarity, device: str = "cpu") -> tuple[Tensor, ...]:
        return torch.autograd.grad(similarity(a.to(device), b.to(device)), needed, grad.to(device))

    with backend.forced("pairwise_similarity", "pairwise_similarity_backward"):
        found = gradients(lambda x, y: F.pairwise_similarity(x, y, metric), backend.device)
    for got, want in zip(found, gradients(PAIRWISE[metric]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cuda"], ids=str)
def test_contrastive_loss(backend: Backend) -> None:
    a, b = (x[x.isfinite().all(dim=-1)] for x in drawn(torch.float32))
    a = a[: len(b)]
    if not len(a):
        return

    def by(normalized):
        own = torch.arange(len(a))
        return lambda x, y: torch.nn.functional.cross_entropy(20 * normalized(x) @ normalized(y).T, own)

    def step(dtype: torch.dtype, loss) -> tuple[Tensor, ...]:
        x, y = (z.to(dtype).detach().requires_grad_() for z in (a, b))
        value = loss(x, y)
        return value, *torch.autograd.grad(value, (x, y))

    with backend.forced():
        found = step(torch.float32, lambda x, y: F.contrastive_loss(x, y, scale=20.0))
    eager, exact = step(torch.float32, by(stock)), step(torch.float64, by(unit))
    assert_accurate(found[0], eager[0], exact[0], size=20.0, what="loss")
    for x, got, plain, want in zip((a, b), found[1:], eager[1:], exact[1:], strict=True):
        # What a row's gradient is made of: unit vectors, divided by its norm.
        divisor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).double().clamp(min=EPS)
        assert_close(got, plain, want, (20 / len(a) / divisor).expand_as(want), "gradient of the loss")
