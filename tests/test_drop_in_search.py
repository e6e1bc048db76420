"""semantic_search with sentfast on: the same results, without score matrices."""

from __future__ import annotations

import inspect

import pytest
import torch
from accuracy import assert_accurate
from both_sides import METRICS, alike, both, clustered, table_model, with_nan
from brute_force import exact
from sentence_transformers import util
from sentence_transformers.util import (
    community_detection,
    mine_hard_negatives,
    paraphrase_mining_embeddings,
    semantic_search,
)
from tiny_models import VERSION, build

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


def assert_hits(ours, stock, scores: torch.Tensor, top_k: int) -> None:
    """Ours are the best exact scores with ties by index; the original's are the same but for their rounding."""
    count = min(top_k, scores.shape[1])
    values, order = scores.sort(dim=1, descending=True, stable=True)
    assert [[hit["corpus_id"] for hit in row] for row in ours] == order[:, :count].tolist()
    found = torch.tensor([[hit["score"] for hit in row] for row in ours])
    eager = torch.tensor([[hit["score"] for hit in row] for row in stock])
    assert found.shape == eager.shape == (len(scores), count)
    assert_accurate(found, eager, values[:, :count].double())
    assert all(list(hit) == ["corpus_id", "score"] for row in ours for hit in row)
    assert {(type(hit["corpus_id"]), type(hit["score"])) for row in ours for hit in row} == {(int, float)}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("top_k", [1, 10, 500])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicates"])
def test_semantic_search(kind, top_k, metric):
    corpus = torch.randn(240, 24) if kind == "random" else clustered(240, 24)
    if kind == "duplicates":
        corpus = corpus[torch.randint(40, (240,))]
    queries = torch.randn(130, 24)
    chunks = dict(query_chunk_size=50, corpus_chunk_size=90)
    ours, stock = both(semantic_search, queries, corpus, top_k=top_k, score_function=METRICS[metric], **chunks)
    assert_hits(ours, stock, exact(queries, corpus, metric), top_k)


FORMS = {
    "arrays": lambda x: x.numpy(),
    "a list of tensors": list,
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "strided": lambda x: x.repeat(1, 2)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("form", FORMS)
def test_semantic_search_takes(form):
    queries, corpus = torch.randn(7, 20), torch.randn(60, 20)
    ours, stock = both(semantic_search, FORMS[form](queries), FORMS[form](corpus))
    assert_hits(ours, stock, exact(queries, corpus), 10)


def test_semantic_search_takes_one_vector():
    query, corpus = torch.randn(20), torch.randn(60, 20)
    ours, stock = both(semantic_search, query, corpus, top_k=3)
    assert_hits(ours, stock, exact(query.unsqueeze(0), corpus), 3)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")], ids=str)
def test_semantic_search_of_halves(dtypes):
    queries, corpus = (torch.randn(n, 20).to(getattr(torch, dtype)) for n, dtype in zip((7, 60), dtypes, strict=True))
    code = None if VERSION >= (6, 0) else "SF109"
    ours, stock = both(semantic_search, queries, corpus, code=code)
    if isinstance(stock, tuple):  # up to 5.3, dtypes that differ are an error
        assert ours == stock
    elif code:
        scores = [torch.tensor([[hit["score"] for hit in row] for row in found]) for found in (ours, stock)]
        assert scores[0].allclose(scores[1], atol=0.02)
    else:
        assert_hits(ours, stock, exact(queries, corpus), 10)


def test_semantic_search_with_the_similarity_of_a_model(path):
    queries, corpus = torch.randn(5, 20), torch.randn(40, 20)
    for name in METRICS:
        model = build(path)
        model.similarity_fn_name = name if name != "cos" else "cosine"
        ours, stock = both(semantic_search, queries, corpus, score_function=model.similarity)
        assert_hits(ours, stock, exact(queries, corpus, name), 10)
    model.similarity_fn_name = "manhattan"
    ours, stock = both(semantic_search, queries, corpus, score_function=model.similarity, code="SF101")
    assert ours == stock


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 8), torch.randn(9, 8)


OTHERS = {
    "another function": ("SF101", pair, dict(score_function=util.manhattan_sim)),
    "float64": ("SF102", lambda: (torch.randn(3, 8).double(), torch.randn(9, 8).double()), {}),
    "whole numbers": ("SF102", lambda: (torch.ones(3, 8).long(), torch.ones(9, 8).long()), {}),
    "sparse": ("SF105", lambda: (torch.randn(3, 8).to_sparse(), torch.randn(9, 8).to_sparse()), {}),
    "another device": ("SF103", lambda: (torch.randn(3, 8, device="meta"), torch.randn(9, 8, device="meta")), {}),
    "no queries": ("SF107", lambda: (torch.randn(0, 8), torch.randn(9, 8)), {}),
    "no corpus": ("SF107", lambda: (torch.randn(3, 8), torch.randn(0, 8)), {}),
    "other columns": ("SF107", lambda: (torch.randn(3, 7), torch.randn(9, 8)), {}),
    "three dimensions": ("SF107", lambda: (torch.randn(3, 8, 1), torch.randn(9, 8)), {}),
    "top_k of 0": ("SF107", pair, dict(top_k=0)),
    "a negative chunk": ("SF107", pair, dict(corpus_chunk_size=-1)),
    "NaN in a query": ("SF128", lambda: (with_nan(4), torch.randn(9, 8)), {}),
    "NaN in the corpus": ("SF128", lambda: (torch.randn(3, 8), with_nan(9)), dict(top_k=9)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_semantic_search_of_the_original(case):
    code, make, options = OTHERS[case]
    ours, stock = both(semantic_search, *make(), code=code, **options)
    assert alike(ours, stock)


def test_semantic_search_under_autocast():
    queries, corpus = torch.randn(3, 8), torch.randn(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = both(semantic_search, queries, corpus, code="SF116")
    scores = [torch.tensor([[hit["score"] for hit in row] for row in found]) for found in (ours, stock)]
    assert scores[0].allclose(scores[1], atol=0.02) and scores[0].shape == (3, 10)


def test_new_tensors_are_on_the_device_of_the_embeddings(path):
    """Every tensor made on the way is given a device: the default one has no memory here."""
    queries, rows = clustered(40), clustered(2200)
    model = table_model(path, {})

    def everything() -> list:
        return [
            semantic_search(queries, rows, top_k=5),
            semantic_search(queries, rows, top_k=5, score_function=model.similarity),
            paraphrase_mining_embeddings(rows, max_pairs=50, top_k=10),
            community_detection(rows, threshold=0.9, min_community_size=3),
        ]

    sentfast.report(reset=True)
    with torch.device("meta"):
        without = everything()
    assert not sentfast.report().fallbacks
    assert without == everything()


def test_the_functions_stay_the_same_objects():
    before = [inspect.signature(function) for function in (semantic_search, mine_hard_negatives)]
    assert util.semantic_search is semantic_search and semantic_search.__defaults__[-1] is util.cos_sim
    sentfast.disable()
    assert [inspect.signature(function) for function in (semantic_search, mine_hard_negatives)] == before
    sentfast.report(reset=True)
    semantic_search(torch.randn(3, 8), torch.randn(20, 8))
    assert not sentfast.report().calls
