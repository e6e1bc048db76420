"""The contrastive loss against sentence-transformers' own losses, its edges, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from cases import ALL_DIRECTIONS, contrastive_call
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, nn

import sentfast
import sentfast.functional as F
from sentfast import native, registry

every_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cuda"], ids=str)
SIMILARITIES = {"cosine": cos_sim, "dot": dot_score}
DIRECTIONS = (("query_to_doc",), ("query_to_doc", "doc_to_query"), ALL_DIRECTIONS)
HARDNESS = ((None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 3.0))


class Columns(nn.Module):
    """Stands in for a model: the features are the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> None:
        return None


def features(columns: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"sentence_embedding": column} for column in columns]


def with_gradients(loss: Callable[[], Tensor], columns: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss()
    return value, *torch.autograd.grad(value, columns)


def columns_of(
    count: int, rows: int, dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    return [torch.randn(rows, dim, dtype=dtype, device=device, requires_grad=True) for _ in range(count)]


def double(columns: list[Tensor]) -> list[Tensor]:
    return [column.detach().double().requires_grad_() for column in columns]


def agree(backend: Backend, columns: list[Tensor], ours: Callable, theirs: Callable, what: str) -> None:
    """Values and gradients by the rule, with sentence-transformers in float64 as the truth."""
    with sentfast.disabled():
        eager = with_gradients(lambda: theirs(columns), columns)
        wide = double(columns)
        exact = with_gradients(lambda: theirs(wide), wide)
    with backend.forced("contrastive_loss"):
        result = with_gradients(lambda: ours(columns), columns)
    smallest = min(column.norm(dim=-1).min().item() for column in columns)
    for i, (got, plain, true) in enumerate(zip(result, eager, exact, strict=True)):
        assert_accurate(got, plain, true, size=0.0 if i == 0 else 1 / min(1.0, smallest), what=f"{what}, result {i}")


def ranking_options() -> Iterator[dict[str, Any]]:
    """Every combination that MultipleNegativesRankingLoss takes."""
    for similarity, directions, partition, (hardness, strength) in itertools.product(
        SIMILARITIES, DIRECTIONS, ("joint", "per_direction"), HARDNESS
    ):
        if partition == "joint" or len(directions) < 3:
            yield {
                "similarity": similarity,
                "scale": 20.0 if similarity == "cosine" else 0.5,
                "directions": directions,
                "partition_mode": partition,
                "hardness_mode": hardness,
                "hardness_strength": strength,
            }


def ranking_loss(options: dict[str, Any]) -> stock.MultipleNegativesRankingLoss:
    options = dict(options)
    return stock.MultipleNegativesRankingLoss(
        Columns(), similarity_fct=SIMILARITIES[options.pop("similarity")], **options
    )


@every_backend
def test_equals_multiple_negatives_ranking_loss(backend: Backend) -> None:
    for i, options in enumerate(ranking_options()):
        if backend.slow and i % 4:
            continue
        theirs = ranking_loss(options)
        for negatives in (0, 2):
            columns = columns_of(2 + negatives, 6 if backend.slow else 37, 19, device=backend.device)
            agree(
                backend,
                columns,
                lambda c, o=options: F.contrastive_loss(c[0], torch.cat(c[1:]), workspace=40000, **o),
                lambda c, t=theirs: t.compute_loss_from_embeddings(c, None),
                f"{options} {negatives} negatives",
            )


def test_reference_equals_multiple_negatives_ranking_loss_in_float64() -> None:
    for options in ranking_options():
        theirs = ranking_loss(options)
        for negatives, reduction in itertools.product((0, 1), ("mean", "none")):
            columns = columns_of(2 + negatives, 5, 7, torch.float64)
            with sentfast.disabled():
                expected = with_gradients(lambda c=columns, t=theirs: t.compute_loss_from_embeddings(c, None), columns)
            result = with_gradients(
                lambda c=columns, o=options, r=reduction: F.contrastive_loss(
                    c[0], torch.cat(c[1:]), reduction=r, workspace=700, **o
                ).mean(),
                columns,
            )
            for got, want in zip(result, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@every_backend
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_ranks_share_one_loss(backend: Backend, directions: tuple[str, ...]) -> None:
    """Each process has its rows and everyone's candidates: together they are the loss of the whole batch."""
    rows, ranks = (3, 2) if backend.slow else (9, 3)
    queries, positives, negatives = columns_of(3, rows * ranks, 11, device=backend.device)
    documents = torch.cat([positives, negatives])
    with backend.forced("contrastive_loss"):
        whole = F.contrastive_loss(queries, documents, directions=directions)
        expected = torch.autograd.grad(whole, (queries, positives, negatives))
        parts = [
            F.contrastive_loss(
                queries[offset : offset + rows],
                documents,
                all_queries=queries,
                offset=offset,
                directions=directions,
            )
            for offset in range(0, rows * ranks, rows)
        ]
        mean = torch.stack(parts).mean()
        torch.testing.assert_close(mean, whole)
        for got, want in zip(torch.autograd.grad(mean, (queries, positives, negatives)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Guide(Columns):
    """The guide's embeddings come with the features."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["guide"]}


def guided(columns: list[Tensor], guides: list[Tensor], **options: Any) -> Tensor:
    """GISTEmbedLoss from its own code, over given embeddings."""
    loss = stock.GISTEmbedLoss.__new__(stock.GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize = Columns(), Guide(), False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    loss.gather_across_devices = False
    for name, value in options.items():
        setattr(loss, name, value)
    both = [{"sentence_embedding": c, "guide": g} for c, g in zip(columns, guides, strict=True)]
    return loss(both, torch.empty(0))


@every_backend
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize(("anchors", "positives"), [(True, True), (True, False), (False, True)])
def test_equals_gist_embed_loss(backend: Backend, strategy: str, anchors: bool, positives: bool) -> None:
    directions = ("query_to_doc", *(["query_to_query"] * anchors), *(["doc_to_doc"] * positives))
    for margin, negatives in ((0.0, 0), (0.1, 1), (-0.2, 1)):
        rows = 5 if backend.slow else 33
        columns = columns_of(2 + negatives, rows, 13, device=backend.device)
        # Half-way between each anchor and noise, so that thresholds differ and some candidates exceed them.
        first = torch.randn(rows, 6, device=backend.device)
        guides = [first, *(first + torch.randn_like(first) for _ in range(1 + negatives))]
        agree(
            backend,
            columns,
            lambda c, g=guides, m=margin: F.contrastive_loss(
                c[0],
                torch.cat(c[1:]),
                scale=10.0,
                directions=directions,
                guide=(g[0], torch.cat(g[1:])),
                margin_strategy=strategy,
                margin=m,
                workspace=20000,
            ),
            lambda c, g=guides, m=margin: guided(
                c,
                [x.to(c[0].dtype) for x in g],
                temperature=0.1,
                margin_strategy=strategy,
                margin=m,
                contrast_anchors=anchors,
                contrast_positives=positives,
            ),
            f"{strategy} {margin} {negatives} negatives",
        )


@every_backend
def test_a_learned_scale_gets_its_gradient(backend: Backend) -> None:
    for options in (
        {},
        {"directions": ALL_DIRECTIONS},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 4.0},
    ):
        queries, documents = columns_of(2, 6 if backend.slow else 31, 9, device=backend.device)
        scale = torch.tensor(15.0, device=backend.device, requires_grad=True)
        wide = double([queries, documents, scale])

        def loss(q: Tensor, d: Tensor, s: Tensor, o: dict[str, Any] = options) -> tuple[Tensor, ...]:
            return with_gradients(lambda: F.contrastive_loss(q, d, scale=s, **o), [q, d, s])

        with registry.use_backend("reference"):
            eager, exact = loss(queries, documents, scale), loss(*wide)
        with backend.forced("contrastive_loss"):
            result = loss(queries, documents, scale)
        for got, plain, true in zip(result, eager, exact, strict=True):
            assert_accurate(got, plain, true, size=1.0)


def test_reference_gradient_of_the_scale_is_the_derivative() -> None:
    queries, documents = columns_of(2, 4, 5, torch.float64)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda q, d, s: F.contrastive_loss(q, d, scale=s, directions=ALL_DIRECTIONS), (queries, documents, scale)
    )


@every_backend
def test_duplicates_are_left_out(backend: Backend) -> None:
    """As if the duplicates of a row's positive were not among its candidates."""
    rows, dim = 5, 8
    queries, documents = (torch.randn(n, dim, device=backend.device) for n in (rows, 2 * rows))
    ids = torch.tensor([7, 8, 7, 9, 10, 11, 7, 12, 8, 7], device=backend.device)
    with backend.forced("contrastive_loss"):
        losses = F.contrastive_loss(queries, documents, document_ids=ids, reduction="none")
        for i in range(rows):
            others = [j for j in range(2 * rows) if j != i and ids[j] != ids[i]]
            alone = F.contrastive_loss(queries[i : i + 1], documents[[i, *others]])
            torch.testing.assert_close(losses[i], alone)


@every_backend
def test_the_order_of_rows_and_the_workspace_do_not_matter(backend: Backend) -> None:
    tensors, options = contrastive_call(
        {"directions": ALL_DIRECTIONS, "ids": True, "reduction": "none"}, (7, 7, 1, 12), torch.float32, backend.device
    )
    with backend.forced("contrastive_loss"):
        whole = F.contrastive_loss(*tensors, **options)
        for rows in (1, 2, 5):
            bytes_of_row = 4 * (2 * len(tensors[0]) + 2 * len(tensors[1]))
            torch.testing.assert_close(F.contrastive_loss(*tensors, workspace=rows * bytes_of_row, **options), whole)


@every_backend
@pytest.mark.parametrize("dims", [None, (3, 7)], ids=str)
def test_a_row_without_other_candidates_has_no_gradient(backend: Backend, dims: tuple[int, ...] | None) -> None:
    """As the last batch of an epoch may be: not the rounding of a probability that is 1, which Adam would blow up."""
    for _ in range(5):
        columns = columns_of(2, 1, 7, device=backend.device)
        scale = float(torch.rand(()) * 100 + 1)
        with backend.forced():
            value = F.contrastive_loss(*columns, scale=scale, dims=dims)
            gradients = torch.autograd.grad(value, columns)
        assert abs(value.item()) <= 16 * torch.finfo(torch.float32).eps * scale * len(dims or "x")
        assert not any(gradient.any() for gradient in gradients)


@every_backend
def test_empty_and_zero(backend: Backend) -> None:
    with backend.forced("contrastive_loss"):
        none = torch.randn(0, 4, device=backend.device, requires_grad=True)
        loss = F.contrastive_loss(none, none)
        assert loss.isnan()
        loss.backward()
        assert none.grad is not None
        assert none.grad.shape == (0, 4)
        assert F.contrastive_loss(none, none, reduction="none").shape == (0,)
        one = torch.randn(1, 4, device=backend.device)
        assert abs(F.contrastive_loss(one, one).item()) < 1e-6
    zero = [torch.zeros(3, 4, device=backend.device, requires_grad=True), *columns_of(1, 3, 4, device=backend.device)]
    theirs = ranking_loss({"similarity": "cosine"})
    wide = double(zero)
    with sentfast.disabled():
        eager = with_gradients(lambda: theirs.compute_loss_from_embeddings(zero, None), zero)
        exact = with_gradients(lambda: theirs.compute_loss_from_embeddings(wide, None), wide)
    with backend.forced("contrastive_loss"):
        result = with_gradients(lambda: F.contrastive_loss(*zero), zero)
    for got, plain, true in zip(result, eager, exact, strict=True):
        assert_accurate(got, plain, true)


@every_backend
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_as_sentence_transformers(backend: Backend, similarity: str, value: float) -> None:
    theirs = ranking_loss({"similarity": similarity, "scale": 1.0})
    for spoiled in (0, 1):
        columns = columns_of(2, 5, 6, device=backend.device)
        with torch.no_grad():
            columns[spoiled][2, 3] = value
        with sentfast.disabled():
            want = theirs.compute_loss_from_embeddings(columns, None)
            rows = [cos_sim, dot_score][similarity == "dot"](*columns)
            each = torch.logsumexp(rows, 1) - rows.diagonal()
        with backend.forced("contrastive_loss"):
            got = F.contrastive_loss(*columns, scale=1.0, similarity=similarity)
            losses = F.contrastive_loss(*columns, scale=1.0, similarity=similarity, reduction="none")
        torch.testing.assert_close(got, want, equal_nan=True)
        torch.testing.assert_close(losses, each, equal_nan=True)


def columns_that_never_tie(rows: int, dim: int, device: str) -> list[Tensor]:
    """Of small whole numbers, so that scores are exact, and no query has the same one twice."""
    while True:
        columns = [torch.randint(-4, 5, (rows, dim), device=device).float() for _ in range(2)]
        if (columns[0] @ columns[1].T).sort(dim=1).values.diff().all():
            return [column.requires_grad_() for column in columns]


@every_backend
def test_large_scores_do_not_overflow(backend: Backend) -> None:
    # The rounding of such scores would decide between two that nearly tie.
    columns = columns_that_never_tie(5, 8, backend.device)
    theirs = ranking_loss({"similarity": "dot", "scale": 1000.0})
    with sentfast.disabled():
        expected = with_gradients(lambda: theirs.compute_loss_from_embeddings(columns, None), columns)
    with backend.forced("contrastive_loss"):
        result = with_gradients(lambda: F.contrastive_loss(*columns, scale=1000.0, similarity="dot"), columns)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


@every_backend
def test_small_losses_beside_large_scores(backend: Backend) -> None:
    """Scores of 10,000 and 10,003, which float32 holds exactly: loss and gradient lose nothing by their size."""
    rows = 6
    large, eye = torch.full((rows, 1), 100.0), torch.eye(rows)
    columns = [torch.cat([large, factor * eye], 1).to(backend.device).requires_grad_() for factor in (1.0, 3.0)]
    wide = double(columns)
    for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query")):
        loss = functools.partial(F.contrastive_loss, scale=1.0, similarity="dot", directions=directions)
        with registry.use_backend("reference"):
            exact = with_gradients(functools.partial(loss, *wide), wide)
        with backend.forced("contrastive_loss"):
            result = with_gradients(functools.partial(loss, *columns), columns)
        for got, want in zip(result, exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.cpu_loaded() or BACKENDS[0].slow, reason="about the compiled CPU kernels")
def test_the_matrix_is_never_held() -> None:
    """10,000 x 10,000 scores are 400 MB; the peak may grow by the workspace and a few matrices of embeddings."""
    queries, documents = columns_of(2, 10_000, 16)
    F.contrastive_loss(queries[:64], documents[:64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.contrastive_loss(queries, documents, workspace=16 << 20).backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB"


Q, D = torch.randn(3, 4), torch.randn(6, 4)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no tensor": (lambda: F.contrastive_loss([[1.0]], D), TypeError, "queries: expected a tensor"),  # type: ignore[arg-type]
    "rank": (lambda: F.contrastive_loss(Q[0], D), ValueError, "queries: expected"),
    "integers": (lambda: F.contrastive_loss(Q.long(), D), TypeError, "queries: expected"),
    "columns": (lambda: F.contrastive_loss(Q, D[:, :3]), ValueError, "documents: expected 4 columns"),
    "dtype": (lambda: F.contrastive_loss(Q, D.half()), TypeError, "documents: expected the dtype"),
    "device": (lambda: F.contrastive_loss(Q, D.to("meta")), ValueError, "documents: expected the device"),
    "all_queries": (lambda: F.contrastive_loss(Q, D, all_queries=Q[:, :2]), ValueError, "all_queries: expected"),
    "few documents": (lambda: F.contrastive_loss(Q, D[:2]), ValueError, "positives: expected at most the 2"),
    "offset": (lambda: F.contrastive_loss(Q, D, offset=1), ValueError, "offset: expected"),
    "negative offset": (lambda: F.contrastive_loss(Q, D, offset=-1), ValueError, "offset: expected"),
    "offset of queries": (
        lambda: F.contrastive_loss(Q, D, offset=3, all_queries=Q, positives=6),
        ValueError,
        "offset: expected",
    ),
    "positives": (lambda: F.contrastive_loss(Q, D, positives=7), ValueError, "positives: expected"),
    "scale": (lambda: F.contrastive_loss(Q, D, scale=0.0), ValueError, "scale: expected a number"),
    "scale nan": (lambda: F.contrastive_loss(Q, D, scale=float("nan")), ValueError, "scale: expected a number"),
    "scale tensor": (lambda: F.contrastive_loss(Q, D, scale=torch.ones(1)), ValueError, "scale: expected"),
    "scale below 0": (lambda: F.contrastive_loss(Q, D, scale=torch.tensor(-1.0)), ValueError, "scale: expected more"),
    "scale type": (lambda: F.contrastive_loss(Q, D, scale="20"), TypeError, "scale: expected"),  # type: ignore[arg-type]
    "similarity": (lambda: F.contrastive_loss(Q, D, similarity="l2"), ValueError, "similarity: expected"),  # type: ignore[arg-type]
    "direction": (lambda: F.contrastive_loss(Q, D, directions=("up",)), ValueError, "directions: expected"),
    "no direction": (lambda: F.contrastive_loss(Q, D, directions=()), ValueError, "directions: expected"),
    "string": (lambda: F.contrastive_loss(Q, D, directions="query_to_doc"), TypeError, "directions: expected"),
    "needed direction": (
        lambda: F.contrastive_loss(Q, D, directions=("doc_to_query",)),
        ValueError,
        "directions: expected 'query_to_doc'",
    ),
    "partition": (lambda: F.contrastive_loss(Q, D, partition_mode="x"), ValueError, "partition_mode: expected"),  # type: ignore[arg-type]
    "partition of all": (
        lambda: F.contrastive_loss(Q, D, partition_mode="per_direction", directions=ALL_DIRECTIONS),
        ValueError,
        "partition_mode: expected 'joint'",
    ),
    "hardness": (lambda: F.contrastive_loss(Q, D, hardness_mode="very"), ValueError, "hardness_mode: expected"),
    "strength": (lambda: F.contrastive_loss(Q, D, hardness_strength=-1.0), ValueError, "hardness_strength: expected"),
    "ids": (lambda: F.contrastive_loss(Q, D, document_ids=torch.ones(6)), TypeError, "document_ids: expected"),
    "count of ids": (
        lambda: F.contrastive_loss(Q, D, query_ids=torch.ones(2, dtype=torch.long)),
        ValueError,
        "query_ids: expected 3",
    ),
    "guide": (lambda: F.contrastive_loss(Q, D, guide=(Q,)), TypeError, "guide: expected"),
    "rows of the guide": (lambda: F.contrastive_loss(Q, D, guide=(Q, D[:5])), ValueError, r"guide\[1\]: expected 6"),
    "columns of the guide": (lambda: F.contrastive_loss(Q, D, guide=(Q, D[:, :1])), ValueError, r"guide\[1\]"),
    "third guide": (lambda: F.contrastive_loss(Q, D, guide=(Q, D, Q)), ValueError, "guide: expected two"),
    "no third guide": (lambda: F.contrastive_loss(Q, D, all_queries=Q, guide=(Q, D)), ValueError, "guide: expected"),
    "strategy": (lambda: F.contrastive_loss(Q, D, margin_strategy="x"), ValueError, "margin_strategy: expected"),  # type: ignore[arg-type]
    "dims": (lambda: F.contrastive_loss(Q, D, dims=(5,)), ValueError, "dims: expected 1 to 4"),
    "no dims": (lambda: F.contrastive_loss(Q, D, dims=()), ValueError, "dims: expected"),
    "weights of dims": (lambda: F.contrastive_loss(Q, D, dims=(4,), dim_weights=()), ValueError, "dim_weights"),
    "weights alone": (lambda: F.contrastive_loss(Q, D, dim_weights=(1.0,)), ValueError, "dim_weights"),
    "reduction": (lambda: F.contrastive_loss(Q, D, reduction="sum"), ValueError, "reduction: expected"),  # type: ignore[arg-type]
    "workspace": (lambda: F.contrastive_loss(Q, D, workspace=23), ValueError, "workspace: expected at least the 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
