"""The scoring inside sentence-transformers' evaluator of retrieval and inside its mining of hard negatives."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sentfast.integrations import search
from sentfast.integrations.versions import Version
from sentfast.report import fallback
from sentfast.search import segments
from sentfast.search.corpus import Corpus

_QUERIES_AT_ONCE = 1 << 10  # whose best rows are merged together

# ---- InformationRetrievalEvaluator ---------------------------------------------------------------------------------


def retrieval_metrics(
    version: Version,
    name: str,
    original: Callable,
    evaluator: Any,
    model: Any,
    corpus_model: Any = None,
    corpus_embeddings: Any = None,
    output_path: str | None = None,
) -> dict[str, Any] | str:
    """``compute_all_metrics``: the corpus is embedded and searched by chunks; equal scores stand by their id."""
    metrics = {key: search.metric_of(function) for key, function in (evaluator.score_functions or {}).items()}
    if not metrics or not all(metrics.values()):
        return "SF101"
    try:
        by_id = sorted(range(len(evaluator.corpus_ids)), key=evaluator.corpus_ids.__getitem__)
    except TypeError:  # ids that do not compare
        return "SF107"
    queries = _embed(evaluator, model, evaluator.queries, "query")
    hits = {key: _Hits(len(evaluator.queries), _longest(evaluator)) for key in metrics}
    reason = _search(version, evaluator, corpus_model or model, queries, corpus_embeddings, by_id, metrics, hits)
    if reason:
        fallback(name, reason)
        # The queries need not be embedded again.
        return original(_with_queries(evaluator, queries), model, corpus_model, corpus_embeddings, output_path)
    ids = [evaluator.corpus_ids[index] for index in by_id]
    results = {key: found.results(ids) for key, found in hits.items()}
    if evaluator.write_predictions and output_path is not None:
        _write(evaluator, output_path, results)
    return _metrics(version, evaluator, results)


def _search(
    version: Version,
    evaluator: Any,
    model: Any,
    queries: Any,
    embeddings: Any,
    by_id: list[int],
    metrics: dict[str, str],
    hits: dict[str, _Hits],
) -> str:
    """Fills `hits`, or says why the original has to do it."""
    place = torch.empty(len(by_id), dtype=torch.int64, device="cpu")
    place[torch.tensor(by_id, dtype=torch.int64, device="cpu")] = torch.arange(len(by_id), device="cpu")
    size, step = len(evaluator.corpus), evaluator.corpus_chunk_size
    trange = sys.modules[version.evaluator].trange  # by the original's name, which somebody may have replaced
    for start in trange(0, size, step, desc="Corpus Chunks", disable=not evaluator.show_progress_bar):
        end = min(start + step, size)
        if embeddings is None:
            chunk = _embed(evaluator, model, evaluator.corpus[start:end], "document")
        else:
            chunk = embeddings[start:end]
        reason, wanted, rows = search.operands(version, queries, chunk)
        if reason or len(rows) != end - start or len(wanted) != len(evaluator.queries):
            return reason or "SF107"
        # Rows in the order of their ids: an equal score goes to the lower id.
        order = place[start:end].argsort()
        ordered = place[start:end][order]
        rows = rows if torch.equal(ordered, place[start:end]) else rows[order]
        corpus = Corpus.for_one_search(rows, len(wanted))
        for name, metric in metrics.items():
            k = min(hits[name].k, len(rows))
            scores, indices, stats = segments.topk(corpus.segments, wanted, k, metric)
            if stats.nans:
                return "SF128"
            hits[name].add(scores.cpu(), ordered.int()[indices.cpu()])
    return ""


def _embed(evaluator: Any, model: Any, texts: Any, kind: str) -> Any:
    prompt = "query" if kind == "query" else "corpus"
    return evaluator.embed_inputs(
        model,
        texts,
        encode_fn_name=kind,
        prompt_name=getattr(evaluator, f"{prompt}_prompt_name"),
        prompt=getattr(evaluator, f"{prompt}_prompt"),
    )


def _with_queries(evaluator: Any, queries: Any) -> Any:
    """The evaluator, which has embedded its queries already."""
    again = copy.copy(evaluator)

    def embed_inputs(model: Any, texts: Any, encode_fn_name: Any = None, *args: Any, **kwargs: Any) -> Any:
        if encode_fn_name == "query" and texts is evaluator.queries:
            return queries
        return evaluator.embed_inputs(model, texts, encode_fn_name, *args, **kwargs)

    again.embed_inputs = embed_inputs
    return again


def _longest(evaluator: Any) -> int:
    kinds = ("mrr", "ndcg", "accuracy", "precision_recall", "map")
    return max(max(getattr(evaluator, f"{kind}_at_k")) for kind in kinds)


class _Hits:
    """The best rows of each query so far, by score and then by the place of their id."""

    def __init__(self, queries: int, k: int):
        self.k = k
        self._scores = torch.empty(queries, 0, dtype=torch.float32, device="cpu")
        self._places = self._scores.to(torch.int32)

    def add(self, scores: Tensor, places: Tensor) -> None:
        width = min(self.k, self._scores.shape[1] + scores.shape[1])
        best, best_places = scores.new_empty(len(scores), width), self._places.new_empty(len(scores), width)
        for start in range(0, len(scores), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            both = torch.cat([self._places[part], places[part].int()], dim=1)
            both, by_place = both.sort(dim=1)
            found = torch.cat([self._scores[part], scores[part]], dim=1).gather(1, by_place)
            found, order = found.sort(dim=1, descending=True, stable=True)
            best[part], best_places[part] = found[:, :width], both.gather(1, order)[:, :width]
        self._scores, self._places = best, best_places

    def results(self, ids: list[Any]) -> list[list[dict[str, Any]]]:
        """As the original hands them to ``compute_metrics``."""
        return [
            [{"corpus_id": ids[p], "score": s} for p, s in zip(places.tolist(), scores.tolist(), strict=True)]
            for places, scores in zip(self._places, self._scores, strict=True)
        ]


def _write(evaluator: Any, output_path: str, results: dict[str, Any]) -> None:
    """One file per score function: a line for each query."""
    os.makedirs(output_path, exist_ok=True)
    for name, found in results.items():
        path = os.path.join(output_path, evaluator.predictions_file.replace(".jsonl", f"_{name}.jsonl"))
        with open(path, "w", encoding="utf-8") as file:
            for query_id, query, hits in zip(evaluator.queries_ids, evaluator.queries, found, strict=True):
                file.write(json.dumps({"query_id": query_id, "query": query, "results": hits}) + "\n")


def _metrics(version: Version, evaluator: Any, results: dict[str, Any]) -> dict[str, Any]:
    log = logging.getLogger(version.evaluator)
    log.info(f"Queries: {len(evaluator.queries)}")
    log.info(f"Corpus: {len(evaluator.corpus)}\n")
    scores = {name: evaluator.compute_metrics(found) for name, found in results.items()}
    for name in evaluator.score_function_names:
        log.info(f"Score-Function: {name}")
        evaluator.output_scores(scores[name])
    return scores


# ---- mine_hard_negatives -------------------------------------------------------------------------------------------


def search_through(version: Version, dataset: Any, model: Any, *rest: Any) -> tuple:
    """The arguments of ``mine_hard_negatives``, the model's scores being found without their matrix."""
    return dataset, _Searching(version, model), *rest


class _Searching:
    """A model whose `similarity` answers a top-k. All else is the model's own."""

    def __init__(self, version: Version, model: Any):
        self._version, self._model = version, model
        self._rows: Any = None
        self._corpus: Corpus | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def similarity(self, queries: Any, corpus: Any) -> Any:
        function = self._model.similarity
        metric = search.metric_of(function)
        reason, wanted, rows = search.operands(self._version, queries, corpus)
        if not metric or reason:
            reason = reason if metric else "SF101"
            fallback("mine_hard_negatives", reason)
            return function(queries, corpus)
        if self._rows is not corpus:  # packed once for all chunks of queries
            self._rows, self._corpus = corpus, Corpus.for_one_search(rows, 1 << 20)
        return _Scores(wanted, self._corpus, metric, lambda: function(queries, corpus))


class _Scores:
    """Scores of which only the best are asked for. Anything but that makes the matrix."""

    def __init__(self, queries: Tensor, corpus: Any, metric: str, matrix: Callable[[], Tensor]):
        self._queries, self._corpus, self._metric, self._matrix = queries, corpus, metric, matrix
        self._device: Any = None
        self._made: Tensor | None = None

    def to(self, device: Any) -> _Scores:
        self._device = device
        return self

    def topk(self, k: int, dim: int = -1) -> Any:
        if dim not in (1, -1) or not 0 < k <= len(self._corpus):
            return torch.topk(self.matrix(), k, dim)
        scores, indices, stats = segments.topk(self._corpus.segments, self._queries, k, self._metric)
        if stats.nans:
            fallback("mine_hard_negatives", "SF128")
            return torch.topk(self.matrix(), k, dim)
        return torch.return_types.topk((scores.to(self._device), indices.to(self._device)))

    def matrix(self) -> Tensor:
        if self._made is None:
            self._made = self._matrix().to(self._device)
        return self._made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matrix(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.topk and isinstance(args[0], cls) and not kwargs.keys() - {"k", "dim"} and len(args) < 4:
            return args[0].topk(*args[1:], **kwargs)
        made = [x.matrix() if isinstance(x, cls) else x for x in args]
        return function(*made, **{name: x.matrix() if isinstance(x, cls) else x for name, x in kwargs.items()})
