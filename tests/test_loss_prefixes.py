"""The contrastive loss of several prefixes: one pass that equals the sum of one call for each."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from cases import CONTRASTIVE, contrastive_call
from sentence_transformers.sentence_transformer import losses as stock
from test_losses import SIMILARITIES, Columns, agree, columns_of, double, every_backend, features, with_gradients
from torch import Tensor

import sentfast.functional as F
from sentfast import native, registry

LENGTHS, WEIGHTS = (24, 16, 5), (1.0, 0.5, 0.25)


def one_by_one(tensors: list[Tensor], dims: Any, dim_weights: Any, **options: Any) -> Tensor:
    """The sum of a call for each prefix."""
    options["similarity"] = "cosine"
    return sum(  # type: ignore[return-value]
        weight * contrastive([x[:, :dim] for x in tensors], **options)
        for dim, weight in zip(dims, dim_weights, strict=True)
    )


def contrastive(tensors: list[Tensor], **options: Any) -> Tensor:
    queries, documents, *all_queries = tensors
    return F.contrastive_loss(queries, documents, all_queries=all_queries[0] if all_queries else None, **options)


@every_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_equals_matryoshka_loss(backend: Backend, similarity: str) -> None:
    inner = stock.MultipleNegativesRankingLoss(Columns(), similarity_fct=SIMILARITIES[similarity])
    theirs = stock.MatryoshkaLoss(inner.model, inner, LENGTHS, WEIGHTS)
    agree(
        backend,
        columns_of(3, 5 if backend.slow else 21, 24, device=backend.device),
        lambda c: F.contrastive_loss(c[0], torch.cat(c[1:]), similarity=similarity, dims=LENGTHS, dim_weights=WEIGHTS),
        lambda c: theirs(features(c), torch.empty(0)),
        similarity,
    )


@every_backend
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_equals_one_call_for_each(backend: Backend, name: str) -> None:
    options = {key: value for key, value in CONTRASTIVE[name].items() if key not in ("dims", "reduction")}
    sizes = (4, 6, 2, 9) if backend.slow else (23, 40, 1, 31)
    tensors, options = contrastive_call(options, sizes, torch.float64, backend.device)
    dims, dim_weights = (3, 9, 6) if backend.slow else (31, 7, 8, 20), (0.5, 1.0, 2.0, -0.25)
    options.update(dims=dims, dim_weights=dim_weights[: len(dims)])
    scale = torch.tensor(options.pop("scale", 3.0), dtype=torch.float64, device=backend.device)
    wide = [x.requires_grad_() for x in (*tensors, scale)]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    with registry.use_backend("reference"):
        exact = with_gradients(lambda: one_by_one(wide[:-1], scale=wide[-1], **options), wide)
        together = with_gradients(lambda: contrastive(wide[:-1], scale=wide[-1], **options), wide)
        eager = with_gradients(lambda: one_by_one(narrow[:-1], scale=narrow[-1], **options), narrow)
    for got, want in zip(together, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    with backend.forced("contrastive_loss"):
        result = with_gradients(lambda: contrastive(narrow[:-1], scale=narrow[-1], **options), narrow)
    for got, plain, true in zip(result, eager, exact, strict=True):
        assert_accurate(got, plain, true, size=1.0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_behind_the_longest_prefix_get_no_gradient(backend: Backend, dtype: torch.dtype) -> None:
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")
    tensors = columns_of(2, 5, 12, dtype, backend.device)
    for dims in ((7,), (7, 3)):
        with backend.forced("contrastive_loss"):
            _, *gradients = with_gradients(lambda d=dims: F.contrastive_loss(*tensors, dims=d), tensors)
        for gradient in gradients:
            assert gradient.dtype == dtype
            assert not gradient[:, 7:].any()
            assert gradient[:, :7].any(dim=1).all()


@every_backend
def test_rows_that_begin_with_zeros(backend: Backend) -> None:
    """The shorter prefix of such a row has no direction, and its norm counts as a constant."""
    tensors = columns_of(2, 4, 6, device=backend.device)
    with torch.no_grad():
        tensors[0][1, :3] = tensors[1][2, :3] = 0
    wide = double(tensors)
    options = {"dims": (3, 6), "dim_weights": (1.0, 1.0)}
    with registry.use_backend("reference"):
        eager, exact = (with_gradients(lambda x=x: one_by_one(x, **options), x) for x in (tensors, wide))
    with backend.forced("contrastive_loss"):
        result = with_gradients(lambda: contrastive(tensors, **options), tensors)
    for got, plain, true in zip(result, eager, exact, strict=True):
        assert_accurate(got, plain, true)


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_as_one_call_for_each(backend: Backend, value: float) -> None:
    for spoiled, column in ((0, 1), (1, 1), (0, 5), (1, 5)):
        tensors = columns_of(2, 5, 6, device=backend.device)
        with torch.no_grad():
            tensors[spoiled][2, column] = value
        options = {"dims": (3, 6), "dim_weights": (1.0, 2.0), "reduction": "none"}
        with backend.forced("contrastive_loss"):
            got = contrastive(tensors, **options)
            torch.testing.assert_close(got, one_by_one(tensors, **options), rtol=1e-5, atol=1e-4, equal_nan=True)


@every_backend
def test_the_workspace_does_not_matter(backend: Backend) -> None:
    tensors = columns_of(2, 7, 8, device=backend.device)
    dims = (8, 5, 2)
    with backend.forced("contrastive_loss"):
        whole = with_gradients(lambda: F.contrastive_loss(*tensors, dims=dims), tensors)
        for rows in (1, 2, 5):
            space = rows * 4 * 7 * (len(dims) + 2)
            parts = with_gradients(lambda s=space: F.contrastive_loss(*tensors, dims=dims, workspace=s), tensors)
            for got, want in zip(parts, whole, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))
    with pytest.raises(ValueError, match="workspace: expected at least the 140 bytes"):
        F.contrastive_loss(*tensors, dims=dims, workspace=139)


@pytest.mark.skipif(not native.cpu_loaded() or BACKENDS[0].slow, reason="about the compiled CPU kernels")
def test_the_matrices_are_never_held() -> None:
    """10,000 x 10,000 scores are 400 MB for each prefix; the peak may grow by the workspace and some embeddings."""
    queries, documents = columns_of(2, 10_000, 16)
    dims = (16, 8, 4)
    F.contrastive_loss(queries[:64], documents[:64], dims=dims).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.contrastive_loss(queries, documents, dims=dims, workspace=16 << 20).backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"


@every_backend
def test_a_unit_vector_of_one_number_does_not_change(backend: Backend) -> None:
    """However small the number: its gradient is not what rounding has left, divided by it."""
    for rest in ((), (9,), (3, 7)):
        given = [torch.randn(count, 9, device=backend.device) for count in (5, 8)]
        for x in given:
            x[:, 0] = x[:, 0].sign() * 10.0 ** torch.randint(-9, 1, (len(x),), device=backend.device)

        def gradients(dims: tuple[int, ...], given: list[Tensor] = given) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in given]
            with backend.forced("contrastive_loss"):
                value = contrastive(leaves, scale=20.0, dims=dims, directions=("query_to_doc", "query_to_query"))
            return list(torch.autograd.grad(value.mean(), leaves))

        found = gradients((*rest, 1))
        expected = gradients(rest) if rest else [0 * x for x in found]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 if rest else 0)
