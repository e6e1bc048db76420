"""Paraphrase mining, communities and hard negatives with sentfast on: the same results, without score matrices."""

from __future__ import annotations

import heapq
import random

import numpy as np
import pytest
import torch
from both_sides import (
    DATASETS,
    METRICS,
    NEW,
    alike,
    both,
    both_of_texts,
    clustered,
    outcome,
    table_model,
    with_nan,
)
from brute_force import exact
from sentence_transformers.evaluation import ParaphraseMiningEvaluator
from sentence_transformers.util import (
    community_detection,
    mine_hard_negatives,
    paraphrase_mining,
    paraphrase_mining_embeddings,
)
from tiny_models import VERSION, build

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


def gap(scores: torch.Tensor, near: float) -> float:
    """A number between two scores that are not next to each other in float32, close to `near`."""
    ordered = scores.flatten().double().sort().values
    middle = int(torch.searchsorted(ordered, near))
    around = ordered[max(0, middle - 20) : middle + 20]
    widest = int(around.diff().argmax())
    return float((around[widest] + around[widest + 1]) / 2)


def assert_pairs(ours, stock, scores) -> None:
    """The same pairs; scores but for rounding; best first, equal ones by their rows, before 6.2 as they were found."""
    found = {(i, j): score for score, i, j in ours}
    eager = {(i, j): score for score, i, j in stock}
    assert len(found) == len(ours) == len(stock)
    assert all(found[pair] == scores[pair].item() for pair in found)
    assert ours == sorted(ours, key=lambda entry: (-entry[0], *(entry[1:] if NEW else ())))
    assert {(type(score), type(i), type(j)) for score, i, j in ours} <= {(float, int, int)}
    assert found.keys() == eager.keys()
    assert all(abs(score - eager[pair]) < 1e-5 for pair, score in found.items())


@pytest.mark.parametrize("max_pairs, top_k", [(500000, 100), (500000, 7), (60, 10), (13, 3), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_paraphrase_mining(kind, max_pairs, top_k):
    rows = torch.randn(150, 16) if kind == "random" else clustered(150)
    options = dict(max_pairs=max_pairs, top_k=top_k)
    ours, stock = both(paraphrase_mining_embeddings, rows, query_chunk_size=40, **options)
    assert_pairs(ours, stock, exact(rows, rows))
    assert ours or max_pairs == 1


@pytest.mark.parametrize("chunk", [1, 40, 149, 150])
def test_paraphrase_mining_in_chunks_of_the_corpus(chunk):
    rows = clustered(150)
    options = dict(corpus_chunk_size=chunk, max_pairs=300, top_k=4, query_chunk_size=35)
    ours, stock = both(paraphrase_mining_embeddings, rows, **options)
    assert_pairs(ours, stock, exact(rows, rows))


def heap_of(scores: torch.Tensor, max_pairs: int, top_k: int) -> list:
    """What the original's heap holds when each row's scores come in our order: best first, then by index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices.tolist()
    heap, queued, dropped = [], set(), -float("inf")
    for i, row in enumerate(order):
        neighbours = [j for j in row if j != i][:top_k] if NEW else row[: top_k + 1]
        for j in neighbours:
            score, pair = scores[i, j].item(), (min(i, j), max(i, j)) if NEW else (i, j)
            if i == j or pair in queued or score <= (dropped if NEW else max(dropped, -1)):
                continue
            queued.add(pair)
            heapq.heappush(heap, (score, *pair))
            if len(heap) > (max_pairs if NEW else max_pairs - 1):
                dropped, *pair = heapq.heappop(heap)
                queued.discard(tuple(pair))
    best = {(min(i, j), max(i, j)): score for score, i, j in heap}
    return sorted(([score, i, j] for (i, j), score in best.items()), key=lambda x: -x[0])


@pytest.mark.parametrize("max_pairs", [1, 2, 17, 100, 400, 10**6])
@pytest.mark.parametrize("top_k", [1, 5, 60])
def test_paraphrase_mining_of_duplicates(max_pairs, top_k):
    rows = torch.randn(9, 16)[torch.randint(9, (60,))]
    ours, stock = both(paraphrase_mining_embeddings, rows, max_pairs=max_pairs, top_k=top_k)
    assert sorted(map(tuple, ours)) == sorted(map(tuple, heap_of(exact(rows, rows), max_pairs, top_k)))
    if NEW:  # before, how many of a pair's two directions stay is left to chance where scores are equal
        assert len(ours) == len(stock)
        assert torch.tensor([x[0] for x in ours]).allclose(torch.tensor([x[0] for x in stock]), atol=1e-5)


def test_paraphrase_mining_of_many_rows_drops_what_cannot_come_in():
    """More rows than are looked at together, and far more pairs than are kept."""
    from sentfast.integrations import search

    rows = clustered(500)
    before, search._ROWS_AT_ONCE = search._ROWS_AT_ONCE, 64
    try:
        ours, stock = both(paraphrase_mining_embeddings, rows, max_pairs=40, top_k=20)
    finally:
        search._ROWS_AT_ONCE = before
    assert_pairs(ours, stock, exact(rows, rows))


@pytest.mark.parametrize("max_pairs, top_k", [(200, 5), (1500, 10), (10**6, 3)])
@pytest.mark.parametrize("misled", [False, True])
def test_paraphrase_mining_with_a_limit_from_a_sample(max_pairs, top_k, misled, monkeypatch):
    """A sample that promises too much costs time, and changes nothing."""
    from sentfast.integrations import search

    rows = clustered(400)
    monkeypatch.setattr(search, "_SAMPLE", 16)
    if misled:
        monkeypatch.setattr(search, "_MARGIN", 0.01)
    ours, stock = both(paraphrase_mining_embeddings, rows, max_pairs=max_pairs, top_k=top_k)
    assert_pairs(ours, stock, exact(rows, rows))


@pytest.mark.parametrize("metric", METRICS)
def test_paraphrase_mining_with_other_functions(metric):
    rows = torch.randn(50, 12)
    ours, stock = both(paraphrase_mining_embeddings, rows, score_function=METRICS[metric], max_pairs=200)
    scores = exact(rows, rows, metric)
    assert len(ours) == len(stock) > 0 or not NEW
    assert [score for score, _, _ in ours] == sorted((scores[i, j].item() for _, i, j in ours), reverse=True)
    assert {tuple(x[1:]) for x in ours} == {tuple(x[1:]) for x in stock}


PAIR_CASES = {
    "one row": (None, lambda: torch.randn(1, 8), {}),
    "two rows": (None, lambda: torch.randn(2, 8), {}),
    "an array": (None, lambda: torch.randn(9, 8).numpy(), {}),
    "no rows": ("SF107", lambda: torch.randn(0, 8), {}),
    "NaN": ("SF128", lambda: with_nan(9), {}),
    "top_k of 0": ("SF107", lambda: torch.randn(9, 8), dict(top_k=0)),
    "float64": ("SF102", lambda: torch.randn(9, 8).double(), {}),
    "another function": ("SF101", lambda: torch.randn(9, 8), dict(score_function=lambda a, b: a @ b.T)),
}


@pytest.mark.parametrize("case", PAIR_CASES)
def test_paraphrase_mining_of(case):
    code, make, options = PAIR_CASES[case]
    rows = make()
    sentfast.report(reset=True)
    ours = outcome(paraphrase_mining_embeddings, rows, **options)
    assert {reason for _, reason in sentfast.report().fallbacks} == ({code} if code else set())
    with sentfast.disabled():
        stock = outcome(paraphrase_mining_embeddings, rows, **options)
    assert alike(ours, stock) if code else [x[1:] for x in ours] == [x[1:] for x in stock]


def test_paraphrase_mining_of_texts(path):
    model = build(path)
    texts = [" ".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(40)]
    ours, stock = both_of_texts(lambda: paraphrase_mining(model, texts, top_k=5, max_pairs=50))
    assert {tuple(x[1:]) for x in ours} == {tuple(x[1:]) for x in stock}
    duplicates = [(f"{i}", f"{j}") for _, i, j in stock[::3]]
    evaluator = ParaphraseMiningEvaluator({f"{i}": text for i, text in enumerate(texts)}, duplicates, top_k=5)
    ours, stock = both_of_texts(lambda: evaluator(model))
    assert ours == pytest.approx(stock, abs=1e-5) and 0 < ours["average_precision"] <= 1


# ---- community_detection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold, least", [(0.75, 10), (0.6, 3), (0.9, 2), (0.95, 1), (-0.3, 5), (0.75, 400)])
@pytest.mark.parametrize("batch_size", [1024, 37])
def test_community_detection(threshold, least, batch_size):
    rows = clustered(300)
    scores = exact(rows, rows)
    options = dict(threshold=gap(scores, threshold), min_community_size=least, batch_size=batch_size)
    ours, stock = both_communities(rows, **options)
    assert list(map(len, ours)) == list(map(len, stock))
    assert sorted(sorted(x) for x in ours) == sorted(sorted(x) for x in stock)
    for community in ours:
        members = community[1:] if NEW else community
        if NEW:
            assert community[0] in {x[0] for x in stock}
        assert all(type(member) is int for member in community)
        if NEW or len(members) == len(set(members)):
            center = community[0]
            ordered = scores[center, members].tolist()
            assert not NEW or ordered == sorted(ordered, reverse=True)


def both_communities(rows, **options):
    ours = community_detection(rows, **options)
    with sentfast.disabled():
        return ours, community_detection(rows, **options)


def test_community_detection_on_the_threshold():
    """Cosines of exactly 1/2: rows of ±1 in four places of sixteen."""
    base = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, -1], [-1, 1, 1, 1]])
    rows = base[torch.randint(5, (40,))]  # from 50 on, the older versions drop some of the equal ones
    for threshold in (0.5, float(np.nextafter(np.float32(0.5), np.float32(1))), 1.0):
        ours, stock = both_communities(rows, threshold=threshold, min_community_size=2)
        assert sorted(map(len, ours)) == sorted(map(len, stock)), threshold
        assert all((rows[x] == rows[x[0]]).all() for x in ours) or threshold == 0.5


def test_community_detection_of_texts_in_small_pieces(monkeypatch):
    """Centres are looked up a few at a time, and communities stay the same."""
    from sentfast.integrations import search

    rows = clustered(300, clusters=40)
    threshold = gap(exact(rows, rows), 0.8)
    whole = community_detection(rows, threshold, 2)
    monkeypatch.setattr(search, "_PAIRS_AT_ONCE", 20)
    monkeypatch.setattr(search, "_CENTERS_AT_ONCE", 3)
    ours, stock = both_communities(rows, threshold=threshold, min_community_size=2)
    assert ours == whole and list(map(len, ours)) == list(map(len, stock))


COMMUNITY_CASES = {
    "an array": (None, lambda: clustered(50).numpy(), {}),
    "fewer rows than the size": (None, lambda: torch.randn(5, 8), {}),
    "no rows": ("SF107", lambda: torch.randn(0, 8), {}),
    "NaN": ("SF128", lambda: with_nan(30), {}),
    "bfloat16": ("SF102", lambda: torch.randn(30, 8).bfloat16(), {}),
    "a threshold of NaN": ("SF107", lambda: torch.randn(30, 8), dict(threshold=float("nan"))),
    "a size of 0": ("SF107", lambda: torch.randn(30, 8), dict(min_community_size=0)),
}


@pytest.mark.parametrize("case", COMMUNITY_CASES)
def test_community_detection_of(case):
    code, make, options = COMMUNITY_CASES[case]
    rows = make()
    sentfast.report(reset=True)
    ours = outcome(community_detection, rows, **options)
    assert {reason for _, reason in sentfast.report().fallbacks} == ({code} if code else set())
    with sentfast.disabled():
        stock = outcome(community_detection, rows, **options)
    assert ours == stock


# ---- mine_hard_negatives -------------------------------------------------------------------------------------------

NEGATIVES = {
    "defaults": {},
    "range": dict(range_min=3, range_max=12, num_negatives=2),
    "random": dict(range_max=15, sampling_strategy="random"),
    "margins": dict(absolute_margin=0.05, relative_margin=0.02, range_max=60, num_negatives=2),
    "limits": dict(max_score=0.8, min_score=-0.5),
    "n-tuple": dict(output_format="n-tuple", num_negatives=4),
    "labeled-pair": dict(output_format="labeled-pair"),
    "labeled-list": dict(output_format="labeled-list", range_max=9),
    "small batches": dict(faiss_batch_size=7, range_max=20),
}
if VERSION >= (5, 3):
    NEGATIVES["scores"] = dict(output_scores=True)


@pytest.mark.skipif(not DATASETS, reason="needs datasets")
@pytest.mark.parametrize("case", NEGATIVES)
def test_mine_hard_negatives(path, case, capsys):
    import datasets

    anchors = [f"anchor {i % 30}" for i in range(40)]  # some have two positives
    positives = [f"positive {i}" for i in range(40)]
    corpus = [f"other {i}" for i in range(50)]
    texts = [*dict.fromkeys(anchors), *positives, *corpus]
    model = table_model(path, dict(zip(texts, clustered(len(texts)), strict=True)))
    data = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})

    def mined():
        random.seed(5)
        return mine_hard_negatives(data, model, corpus=corpus, verbose=False, **NEGATIVES[case]).to_dict()

    ours, stock = both_of_texts(mined)
    assert list(ours) == list(stock) and len(ours["anchor"]) > 3
    for column, values in ours.items():
        if column in ("score", "scores"):
            assert torch.tensor(values).allclose(torch.tensor(stock[column]), atol=1e-5)
        else:
            assert values == stock[column]


@pytest.mark.skipif(not DATASETS, reason="needs datasets")
def test_hard_negatives_by_another_similarity_are_the_original_s(path):
    import datasets

    texts = [f"text {i}" for i in range(30)]
    model = table_model(path, dict(zip(texts, torch.randn(30, 8), strict=True)))
    model.similarity_fn_name = "manhattan"
    data = datasets.Dataset.from_dict({"anchor": texts[:15], "positive": texts[15:]})
    sentfast.report(reset=True)
    ours = mine_hard_negatives(data, model, num_negatives=2, verbose=False).to_dict()
    assert ("mine_hard_negatives", "SF101") in sentfast.report().fallbacks
    with sentfast.disabled():
        assert mine_hard_negatives(data, model, num_negatives=2, verbose=False).to_dict() == ours


def test_rows_whose_norm_float32_cannot_hold() -> None:
    """Their cosine is 0 in the original, whose norm is infinite; of one number there is no square."""
    for _ in range(12):
        columns = int(torch.randint(1, 40, ()))
        x = clustered(int(torch.randint(70, 120, ())), columns)
        x[torch.rand(len(x)) < 0.2] *= 10.0 ** float(torch.randint(18, 30, ()))
        units = torch.nn.functional.normalize(x)
        threshold = 0.75 if columns == 1 else gap(units @ units.T, 0.75)
        for function, options in (
            (paraphrase_mining_embeddings, {"top_k": len(x)}),
            (community_detection, {"threshold": threshold, "min_community_size": 1}),
        ):
            ours, stock = both(function, x, **options)
            if function is community_detection:
                assert sorted(map(sorted, ours)) == sorted(map(sorted, stock))
            else:
                assert {(i, j) for score, i, j in ours if score != 0} == {(i, j) for score, i, j in stock if score != 0}
