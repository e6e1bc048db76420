"""InformationRetrievalEvaluator with sentfast on: the same metrics and predictions, without score matrices."""

from __future__ import annotations

import functools
import json
import random
import sys
from contextlib import nullcontext

import pytest
import torch
from both_sides import METRICS, both_of_texts, clustered, table_model
from brute_force import exact
from sentence_transformers import util
from sentence_transformers.evaluation import InformationRetrievalEvaluator
from tiny_models import build

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]


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


def test_the_progress_bar_is_the_one_that_the_module_has(path, capsys, monkeypatch):
    """Somebody may have put another in its place."""
    evaluator, model = retrieval(path, corpus_chunk_size=7, show_progress_bar=True)
    home = sys.modules[type(evaluator).__module__]
    monkeypatch.setattr(home, "trange", functools.partial(home.trange, ascii=True, unit="chunk"))
    shown = []
    for context in (nullcontext(), sentfast.disabled()):
        with context:
            evaluator(model)
        shown.append(capsys.readouterr().err.rpartition("\r")[2].partition("[")[0])
    assert shown[0] == shown[1] and "##" in shown[0]


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
