"""sentence-transformers' functions on embeddings on the GPU; without one the same calls on the CPU."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from sentence_transformers import util
from torch import Tensor

import sentfast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"cuda", "triton"} if DEVICE == "cuda" else {"cpu", "reference"}
pytestmark = pytest.mark.usefixtures("switched_on")


def unit(count: int) -> Tensor:
    """Clusters of unit rows."""
    centers = torch.randn(12, 32)
    x = centers[torch.randint(12, (count,))] + 0.3 * torch.randn(count, 32)
    return torch.nn.functional.normalize(x).to(DEVICE)


def ran_on_the_device(*operators: str) -> bool:
    calls = sentfast.report().calls
    return set(operators) <= {name for name, _ in calls} and {backend for _, backend in calls} <= BACKENDS


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("function", ["cos_sim", "dot_score", "pairwise_cos_sim", "pairwise_dot_score"])
def test_similarities_on_the_device(function: str, kind: str) -> None:
    a, b = (unit(70).to(getattr(torch, kind)) for _ in range(2))
    with sentfast.disabled():
        stock, exact = getattr(util, function)(a, b), getattr(util, function)(a.double(), b.double())
    sentfast.report(reset=True)
    ours = getattr(util, function)(a, b)
    assert ran_on_the_device() and sentfast.report().calls
    assert ours.device == stock.device and ours.dtype == stock.dtype
    assert_accurate(ours.cpu(), stock.cpu(), exact.cpu(), size=1.0)


@pytest.mark.parametrize(("queries", "rows", "top_k"), [(1, 900, 10), (150, 700, 5), (3, 4, 10)])
def test_semantic_search_on_the_device(queries: int, rows: int, top_k: int) -> None:
    q, corpus = unit(queries), unit(rows)
    exact, order = (q.double() @ corpus.double().T).float().sort(dim=1, descending=True, stable=True)
    sentfast.report(reset=True)
    found = util.semantic_search(q, corpus, top_k=top_k)
    assert ran_on_the_device("search_topk")
    with sentfast.disabled():
        stock = util.semantic_search(q, corpus, top_k=top_k)
    count = min(top_k, rows)
    scores = [torch.tensor([[hit["score"] for hit in row] for row in result]) for result in (found, stock)]
    assert_accurate(*scores, exact[:, :count].double().cpu(), size=1.0)
    assert [[hit["corpus_id"] for hit in row] for row in found] == order[:, :count].tolist()


def test_mining_on_the_device() -> None:
    x = unit(600)
    sentfast.report(reset=True)
    pairs = util.paraphrase_mining_embeddings(x, max_pairs=50)
    groups = util.community_detection(x, threshold=0.9, min_community_size=5)
    assert ran_on_the_device() and sentfast.report().calls
    with sentfast.disabled():
        stock = util.paraphrase_mining_embeddings(x, max_pairs=50)
        others = util.community_detection(x, threshold=0.9, min_community_size=5)
    assert [score for score, *_ in pairs] == pytest.approx([score for score, *_ in stock], abs=1e-5)
    assert [sorted(group) for group in groups] == [sorted(group) for group in others]
