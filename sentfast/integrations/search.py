"""What runs in place of sentence-transformers' search and mining functions: exact search without score matrices.

Each function returns the result, or the reason code why the original has to run. Chunk sizes bound the memory of the
originals and mean nothing here, except where a version's result depends on them. Equal scores stand by rising index;
the originals leave their order to chance.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.integrations import gain, guards, originals
from sentfast.integrations.pairs import BestPairs
from sentfast.integrations.versions import Version
from sentfast.search import segments
from sentfast.search.corpus import Corpus
from sentfast.search.segments import Segment

_SIMILARITY = "sentence_transformers.util.similarity"
_METRICS = {"cos_sim": "cos", "pytorch_cos_sim": "cos", "dot_score": "dot", "euclidean_sim": "euclidean"}
_ROWS_AT_ONCE = 1 << 12  # of a corpus that is paired with itself; their pairs are looked at together
_PAIRS_AT_ONCE = 1 << 22
_SAMPLE = 256
_MARGIN = 1.5
_CENTERS_AT_ONCE = 256


def semantic_search(
    version: Version, queries: Any, corpus: Any, query_chunk: Any, corpus_chunk: Any, top_k: Any, function: Any
) -> list[list[dict[str, int | float]]] | str:
    metric = metric_of(function)
    if not metric:
        return "SF101"
    reason, queries, corpus = operands(version, queries, corpus)
    if reason or not _counts(query_chunk, corpus_chunk, top_k):
        return reason or "SF107"
    if gain.semantic_search(queries, corpus):
        return gain.TOO_SMALL
    found = segments.topk(_packed(corpus, len(queries)), queries, min(top_k, len(corpus)), metric)
    scores, indices, stats = found
    if stats.nans:
        return "SF128"
    return [
        [{"corpus_id": index, "score": score} for index, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def paraphrase_mining_embeddings(
    version: Version, embeddings: Any, query_chunk: Any, corpus_chunk: Any, max_pairs: Any, top_k: Any, function: Any
) -> list[list[float | int]] | str:
    metric = metric_of(function)
    if not metric:
        return "SF101"
    reason, rows = _rows(version, embeddings)
    if reason or not _counts(query_chunk, corpus_chunk, max_pairs, top_k):
        return reason or "SF107"
    if gain.mining(rows):
        return gain.TOO_SMALL
    # Up to 6.1, each row gets its top_k from each chunk of the corpus.
    width = len(rows) if version.pairs_once else corpus_chunk
    chunks = [
        _packed(rows[first : first + width], len(rows))[0]._replace(first=first) for first in range(0, len(rows), width)
    ]
    limit = _likely_limit(chunks, rows, max_pairs, top_k, metric)
    while True:
        pairs = BestPairs(len(rows), max_pairs, version.pairs_once, limit)
        if not all(_mine(pairs, chunk, rows, top_k, metric) for chunk in chunks):
            return "SF128"
        if pairs.full or limit == -math.inf:
            return pairs.result()
        limit = -math.inf


def _likely_limit(chunks: list[Segment], rows: Tensor, max_pairs: int, top_k: int, metric: str) -> float:
    """A score that more than max_pairs pairs will reach, going by a sample of the rows; -inf where that is unclear."""
    if len(rows) < 8 * _SAMPLE or len(chunks) > 1:
        return -math.inf
    sample = segments.evenly(len(rows), _SAMPLE, rows.device)
    own = torch.arange(_SAMPLE + 1, device=rows.device), sample
    k = min(top_k, len(rows) - 1)
    scores, _, _ = segments.topk(chunks, rows[sample], k, metric, excluded=own)
    # Each pair may stand in two rows.
    place = int(2 * _MARGIN * max_pairs / len(rows) * _SAMPLE)
    return float(scores.flatten().sort(descending=True).values[place]) if place < 0.9 * scores.numel() else -math.inf


def _mine(pairs: BestPairs, segment: Segment, rows: Tensor, top_k: int, metric: str) -> bool:
    """Adds the best pairs of each row with the rows of a segment; whether none of their scores is NaN."""
    # With its own row left out, which is the same as taking one more and dropping it; the older versions keep one more.
    k = min(top_k, len(rows) - 1) if pairs.once else min(top_k + 1, len(segment.rows))
    height = max(64, min(_ROWS_AT_ONCE, _PAIRS_AT_ONCE // max(1, k)))
    for start in range(0, len(rows) if k else 0, height):
        queries = rows[start : start + height]
        number = torch.arange(len(queries) + 1, device=rows.device)
        own = (number, number[:-1] + start) if pairs.once else None
        scores, indices, stats = segments.topk([segment], queries, k, metric, threshold=pairs.limit, excluded=own)
        if stats.nans:
            return False
        pairs.add(start, scores.cpu().numpy(), indices.cpu().numpy())
    return True


def community_detection(
    version: Version, embeddings: Any, threshold: Any, min_community_size: Any, batch_size: Any, show_progress_bar: Any
) -> list[list[int]] | str:
    # The original multiplies halves in their own dtype.
    reason, rows = _rows(version, embeddings, torch.float32)
    plain = isinstance(threshold, (int, float)) and not math.isnan(threshold)
    if reason or not plain or not _counts(min_community_size, batch_size):
        return reason or "SF107"
    if gain.mining(rows):
        return gain.TOO_SMALL
    if len(rows) < min_community_size:
        if version.pairs_once:
            return []
        min_community_size = len(rows)
    found = _packed(rows, len(rows))
    limit = torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
    text = "Finding clusters" if show_progress_bar else ""
    counts, stats = segments.count_above(found, rows, limit, "cos", text)
    if stats.nans:
        return "SF128"
    return _communities(version, found, rows, counts.cpu().numpy(), limit, min_community_size)


def _communities(
    version: Version, found: list[Segment], rows: Tensor, counts: np.ndarray, limit: float, least: int
) -> list[list[int]]:
    """The largest first; a row belongs to the first community that takes it. Members are looked up when needed."""
    centers = np.argsort(-counts, kind="stable")
    centers = centers[counts[centers] >= least]
    used = np.zeros(len(rows), dtype=bool)
    communities: list[list[int]] = []
    while len(centers) and len(rows) - np.count_nonzero(used) >= least:
        if version.pairs_once:  # a centre that another community has taken makes none of its own
            centers = centers[~used[centers]]
        size = max(1, int(np.searchsorted(counts[centers].cumsum(), _PAIRS_AT_ONCE)))
        batch, centers = centers[: min(size, _CENTERS_AT_ONCE)], centers[min(size, _CENTERS_AT_ONCE) :]
        if not len(batch):
            break
        queries = rows[torch.from_numpy(batch)]
        lengths, indices, scores = (x.cpu().numpy() for x in segments.pairs_above(found, queries, limit, "cos")[:3])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for center, start, end in zip(batch.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            if version.pairs_once and used[center]:
                continue
            order = np.argsort(-scores[start:end], kind="stable")
            members = indices[start:end][order]
            members = members[~used[members]]
            if len(members) < least:
                continue
            community = members.tolist()
            if version.pairs_once:
                community = [center, *members[members != center].tolist()]
            used[community] = True
            communities.append(community)
    return sorted(communities, key=len, reverse=True)


def metric_of(function: Any) -> str:
    """The metric of a score function, "" for one that is not sentence-transformers' own."""
    model = getattr(function, "__self__", None)
    if model is not None and getattr(function, "__name__", "") == "similarity":
        return _metric_of_model(model, function)
    functions = vars(importlib.import_module(_SIMILARITY))
    found = next((metric for name, metric in _METRICS.items() if function is functions.get(name)), "")
    return found if found and originals.intact(function) else ""


def _metric_of_model(model: Any, function: Any) -> str:
    """Since 6.0 `similarity` is a method; a model that overrides it has a function of its own."""
    cls = importlib.import_module("sentence_transformers").SentenceTransformer
    if not isinstance(model, cls) or function.__func__ is not vars(cls).get("similarity"):
        return ""
    if not originals.intact(function.__func__):
        return ""
    _ = model.similarity_fn_name  # sets the function if none was chosen
    return metric_of(model._similarity)


def operands(version: Version, queries: Any, corpus: Any) -> tuple[str, Any, Any]:
    """Queries and corpus in float32, or why the original takes them."""
    reason, queries = _rows(version, queries, vector=True)
    if reason:
        return reason, queries, corpus
    reason, corpus = _rows(version, corpus)
    if not reason and queries.device != corpus.device:
        reason = "SF103"
    if not reason and queries.shape[1] != corpus.shape[1]:
        reason = "SF107"
    return reason, queries, corpus


def _rows(version: Version, x: Any, dtype: torch.dtype | None = None, vector: bool = False) -> tuple[str, Any]:
    if isinstance(x, np.ndarray):
        x = version.to_tensor(x)
    elif isinstance(x, list) and x and all(type(row) is Tensor and row.shape == x[0].shape for row in x):
        x = torch.stack(x)
    reason = guards.tensor(x) or guards.tensor_cores(x.device.type)
    if reason:
        return reason, x
    if dtype is not None and x.dtype != dtype:
        return "SF102", x
    if x.dtype in guards.HALF and not version.scores_float32:
        return "SF109", x
    if torch.is_autocast_enabled(x.device.type):
        return "SF116", x
    x = x.detach().float()
    if vector and x.ndim == 1:
        x = x.unsqueeze(0)
    return "" if x.ndim == 2 else "SF107", x


def _packed(rows: Tensor, queries: int) -> list[Segment]:
    return Corpus.for_one_search(rows, queries).segments


def _counts(*values: Any) -> bool:
    """Whether all are whole numbers from 1 on; for others the originals have results or errors of their own."""
    return all(isinstance(value, int) and value >= 1 for value in values)
