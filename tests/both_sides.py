"""Calls of sentence-transformers' search, mining and evaluation with sentfast on and off, over given embeddings."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.util.similarity import euclidean_sim
from tiny_models import VERSION, build

import sentfast

NEW = VERSION >= (6, 2)
DATASETS = importlib.util.find_spec("datasets") is not None
METRICS = {"cos": util.cos_sim, "dot": util.dot_score, "euclidean": euclidean_sim}


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


def both_of_texts(call):
    sentfast.report(reset=True)
    ours = call()
    assert any(name == "search_topk" for name, _ in sentfast.report().calls)
    with sentfast.disabled():
        return ours, call()


def with_nan(rows: int) -> torch.Tensor:
    x = torch.randn(rows, 8)
    x[3, 2] = float("nan")
    return x
