"""Search and mining of sentence-transformers with sentfast on: the same results, without score matrices."""

from __future__ import annotations

import heapq
import importlib.util
import inspect
import json
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from brute_force import exact
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.evaluation import InformationRetrievalEvaluator, ParaphraseMiningEvaluator
from sentence_transformers.util import (
    community_detection,
    mine_hard_negatives,
    paraphrase_mining,
    paraphrase_mining_embeddings,
    semantic_search,
)
from sentence_transformers.util.similarity import euclidean_sim
from tiny_models import VERSION, build
from training_runs import save_model

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
NEW = VERSION >= (6, 2)
DATASETS = importlib.util.find_spec("datasets") is not None
METRICS = {"cos": util.cos_sim, "dot": util.dot_score, "euclidean": euclidean_sim}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class Table(SentenceTransformer):
    """A model whose embeddings are given."""

    table: dict

    def encode(self, sentences, convert_to_tensor=False, convert_to_numpy=True, normalize_embeddings=False, **kwargs):
        rows = torch.stack([self.table[sentence] for sentence in sentences])
        rows = torch.nn.functional.normalize(rows) if normalize_embeddings else rows
        self.encoded = [*getattr(self, "encoded", []), list(sentences)]
        return rows if convert_to_tensor else rows.numpy()

    encode_query = encode_document = encode


def table_model(path, table) -> Table:
    model = build(path, cls=Table)
    model.table = table
    return model


def clustered(count: int, dim: int = 16, clusters: int = 12, spread: float = 0.3) -> torch.Tensor:
    centers = torch.randn(clusters, dim)
    return centers[torch.randint(clusters, (count,))] + spread * torch.randn(count, dim)


def outcome(function, *args, **kwargs):
    """The result, or the type and the text of the error."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


def both(function, *args, code=None, **kwargs):
    """Ours and the original's; `code` says why ours must have been the original's."""
    sentfast.report(reset=True)
    ours = outcome(function, *args, **kwargs)
    report = sentfast.report()
    ran = any(name.startswith("search_") for name, _ in report.calls)
    codes = {reason for site, reason in report.fallbacks if site == function.__name__}
    assert codes == ({code} if code else set()), report
    assert ran or code, "no operator ran"
    with sentfast.disabled():
        return ours, outcome(function, *args, **kwargs)


def alike(ours, stock) -> bool:
    """The same but for the rounding of floats: the original's own parts run in our operators."""
    if isinstance(ours, float):
        return ours == pytest.approx(stock, abs=1e-5, nan_ok=True)
    if isinstance(ours, dict):
        return list(ours) == list(stock) and alike(list(ours.values()), list(stock.values()))
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(stock) and all(alike(*pair) for pair in zip(ours, stock, strict=True))
    return ours == stock


# ---- semantic_search -----------------------------------------------------------------------------------------------


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


def with_nan(rows: int) -> torch.Tensor:
    x = torch.randn(rows, 8)
    x[3, 2] = float("nan")
    return x


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


# ---- paraphrase mining ---------------------------------------------------------------------------------------------


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


def both_of_texts(call):
    sentfast.report(reset=True)
    ours = call()
    assert any(name == "search_topk" for name, _ in sentfast.report().calls)
    with sentfast.disabled():
        return ours, call()


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


# ---- InformationRetrievalEvaluator ---------------------------------------------------------------------------------


def retrieval(path, rows=90, queries=25, duplicates=False, **options):
    """An evaluator, and a model that knows the embeddings of its texts."""
    texts = {f"d{i}": f"text {i}" for i in range(rows)}
    questions = {f"q{i}": f"question {i}" for i in range(queries)}
    embeddings = clustered(rows)[torch.randint(8, (rows,))] if duplicates else clustered(rows)
    table = dict(zip(texts.values(), embeddings, strict=True))
    table.update(zip(questions.values(), clustered(queries), strict=True))
    draw = random.Random(int(torch.randint(1 << 30, ())))
    relevant = {name: set(draw.sample(sorted(texts), draw.randrange(1, 9))) for name in questions}
    return InformationRetrievalEvaluator(questions, texts, relevant, **options), table_model(path, table)


@pytest.mark.parametrize("chunk", [7, 50, 1000])
@pytest.mark.parametrize("names", [("cos",), ("cos", "dot")], ids=str)
def test_retrieval_evaluator(path, chunk, names):
    functions = {name: METRICS[name] for name in names}
    options = dict(score_functions=functions, corpus_chunk_size=chunk, map_at_k=[20, 100])
    evaluator, model = retrieval(path, **options)
    ours, stock = both_of_texts(lambda: evaluator(model))
    assert ours == pytest.approx(stock, abs=1e-12) and len(ours) == 15 * len(names) + len(names)


def test_retrieval_evaluator_with_the_similarity_of_the_model(path):
    evaluator, model = retrieval(path)
    ours, stock = both_of_texts(lambda: evaluator(model))
    assert ours == pytest.approx(stock, abs=1e-12)
    assert evaluator.primary_metric == "cosine_ndcg@10"


def hits_of(evaluator, model) -> list:
    """What `compute_metrics` is given."""
    seen = []
    compute = type(evaluator).compute_metrics
    evaluator.compute_metrics = lambda found: seen.append(found) or compute(evaluator, found)
    try:
        evaluator(model)
    finally:
        del evaluator.compute_metrics
    return seen[0]


@pytest.mark.parametrize("chunk", [11, 1000])
def test_hits_of_equal_scores_stand_by_their_id(path, chunk):
    evaluator, model = retrieval(path, duplicates=True, corpus_chunk_size=chunk, map_at_k=[13])
    ours = hits_of(evaluator, model)
    scores = exact(*(torch.stack([model.table[x] for x in side]) for side in (evaluator.queries, evaluator.corpus)))
    for row, found in zip(scores.tolist(), ours, strict=True):
        best = sorted(zip(row, evaluator.corpus_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[:13]
        assert [(hit["score"], hit["corpus_id"]) for hit in found] == best


def test_predictions_are_written(path, tmp_path):
    evaluator, model = retrieval(path, write_predictions=True, name="some")
    lines = {}
    for kind in ("ours", "stock"):
        (tmp_path / kind).mkdir()
        with nullcontext() if kind == "ours" else sentfast.disabled():
            evaluator(model, str(tmp_path / kind))
        (file,) = (tmp_path / kind).glob("*.jsonl")
        lines[kind] = [json.loads(line) for line in file.read_text().splitlines()]
        assert file.name.endswith("some_predictions_cosine.jsonl")
    for one, other in zip(lines["ours"], lines["stock"], strict=True):
        assert list(one) == list(other) and one["query_id"] == other["query_id"] and one["query"] == other["query"]
        assert [x["corpus_id"] for x in one["results"]] == [x["corpus_id"] for x in other["results"]]


def test_retrieval_evaluator_takes_embeddings_of_the_corpus(path):
    evaluator, model = retrieval(path)
    method = getattr(evaluator, "compute_all_metrics", None) or evaluator.compute_metrices
    evaluator.score_functions = {"cosine": util.cos_sim}
    embeddings = torch.stack([model.table[text] for text in evaluator.corpus])
    ours, stock = both_of_texts(lambda: method(model, corpus_embeddings=embeddings))
    assert str(ours) == str(stock)


@pytest.mark.parametrize("what", ["float64", "NaN", "another function", "ids that do not compare"])
def test_retrieval_of_the_original(path, what):
    """The queries are not embedded again where that was found out too late."""
    code = {"float64": "SF102", "NaN": "SF128", "another function": "SF101"}.get(what, "SF107")
    functions = {"own": lambda a, b: util.cos_sim(a, b)} if what == "another function" else {"own": util.cos_sim}
    evaluator, model = retrieval(path, score_functions=functions)
    if what == "float64":
        model.table = {text: row.double() for text, row in model.table.items()}
    if what == "NaN":
        model.table[evaluator.corpus[4]][0] = float("nan")
    if what == "ids that do not compare":
        evaluator.corpus_ids = [7, *evaluator.corpus_ids[1:]]
    sentfast.report(reset=True)
    ours = evaluator(model)
    codes = {reason for site, reason in sentfast.report().fallbacks if "Evaluator" in site}
    assert codes == {code}
    assert model.encoded.count(evaluator.queries) == 1
    with sentfast.disabled():
        stock = evaluator(model)
    assert ours == pytest.approx(stock, nan_ok=True)


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


def test_scores_become_a_matrix_when_anything_but_the_best_is_asked_for(path):
    from sentfast.integrations import evaluation
    from sentfast.integrations.sentence_transformers import installed, resolve

    queries, corpus = torch.randn(6, 20).numpy(), torch.randn(30, 20)
    model = evaluation._Searching(resolve(installed()), build(path))
    full = util.cos_sim(queries, corpus)
    scores = model.similarity(queries, corpus).to("cpu")
    values, indices = torch.topk(scores, k=5, dim=1)
    assert torch.equal(indices, full.topk(5).indices) and values.allclose(full.topk(5).values, atol=1e-6)
    assert torch.equal(torch.sort(scores, dim=1).values, full.sort(dim=1).values)
    assert torch.equal(scores.sum(dim=1), full.sum(dim=1)) and scores.shape == (6, 30)
    with pytest.raises(RuntimeError):
        torch.topk(scores, k=31, dim=1)
