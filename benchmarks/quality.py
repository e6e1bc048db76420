"""What precision costs: cosine to stock for every gloss of a corpus, and retrieval of a gloss by its word."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import gate
import study
import texts
import torch
from encode import LEAST_COSINE, MEAN_COSINE_BF16, SAME_TEXT
from encode_models import MODELS
from study import OURS, OURS_BF16, STOCK, Settings, judged
from texts import Gloss
from torch import Tensor

TABLE = "encoder_quality"
# model -> glosses and queries: about a minute of stock encoding.
SIZES = {"minilm": (10_000, 2_000), "mpnet": (1_500, 500)}
QUICK_SIZE = (64, 16)
TOP = 10
NDCG_POINTS = 0.1


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model."""
    rows = {}
    for name in settings.models:
        size = QUICK_SIZE if settings.quick else SIZES[name]
        corpus, queries, relevant = task(*size, settings.seed)
        model, weights = MODELS[name].build()
        variants, missing = study.variants_of(model, stock_bf16=False)
        row: dict[str, Any] = {"table": TABLE, "title": MODELS[name].title, "model": name, "weights": weights}
        row.update(glosses=len(corpus), queries=len(queries), seed=settings.seed, missing=missing)
        row.update(compare(variants, corpus, queries, relevant, settings.backends))
        rows[f"encoder_quality_{name}"] = row
    return rows


def task(glosses: int, queries: int, seed: int) -> tuple[list[str], list[str], list[set[int]]]:
    """Corpus, queries, and for each query the numbers of the glosses of that word.

    Glosses that several synsets share are taken once, and belong to the words of all of them.
    """
    draw = random.Random(seed)
    every: dict[str, list[Gloss]] = {}
    for gloss in texts.glosses():
        every.setdefault(gloss.text, []).append(gloss)
    corpus = draw.sample(sorted(every), min(glosses, len(every)))
    owners: dict[str, set[int]] = {}
    for number, text in enumerate(corpus):
        for gloss in every[text]:
            for word in gloss.words:
                owners.setdefault(word, set()).add(number)
    words = draw.sample(sorted(owners), min(queries, len(owners)))
    return corpus, words, [owners[word] for word in words]


def compare(
    variants: dict[str, study.Variant],
    corpus: Sequence[str],
    queries: Sequence[str],
    relevant: Sequence[set[int]],
    backends: Sequence[str],
) -> dict[str, Any]:
    """Cosines to stock and retrieval figures of every variant."""
    found: dict[str, Any] = {"cosine": {}, "ndcg": {}, "accuracy": {}, "ran": {}}
    stock: Tensor | None = None
    for name, variant in variants.items():
        both, ran = study.checked(name, variant, [*corpus, *queries], backends)
        if variant.ours:
            found["ran"][name] = ran
        if stock is None:
            stock = both
        else:
            found["cosine"][name] = study.cosines(stock, both)
            if not found["cosine"][name]["mean"] >= SAME_TEXT:
                raise gate.Refused(f"{name}: mean cosine {found['cosine'][name]['mean']:.4f} to stock")
        found["ndcg"][name], found["accuracy"][name] = scores(both[: len(corpus)], both[len(corpus) :], relevant)
    return found


def scores(corpus: Tensor, queries: Tensor, relevant: Sequence[set[int]]) -> tuple[float, float]:
    """nDCG@10 and accuracy@1, in points of 100; the ranking is by cosine in float64."""
    corpus, queries = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (corpus, queries))
    top = (queries @ corpus.T).topk(min(TOP, len(corpus)), dim=-1).indices.tolist()
    gain = [1 / math.log2(rank + 2) for rank in range(TOP)]
    ndcg = accuracy = 0.0
    for hits, wanted in zip(top, relevant, strict=True):
        reached = sum(gain[rank] for rank, number in enumerate(hits) if number in wanted)
        ndcg += reached / sum(gain[: len(wanted)])
        accuracy += hits[0] in wanted
    return 100 * ndcg / len(relevant), 100 * accuracy / len(relevant)


def run(settings: Settings, timeout: float = 300.0) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name in settings.models:
        rows.update(study.in_child("quality", Settings(**{**vars(settings), "models": (name,)}), timeout))
    return rows


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets."""
    least = row["cosine"][OURS]["min"]
    found = {"fp32 cosine": judged("fp32: every cosine to stock at least 1 - 1e-6", LEAST_COSINE, least, "cosine")}
    if OURS_BF16 in row["cosine"]:
        words = f"bf16: mean cosine to stock at least {MEAN_COSINE_BF16}"
        found["bf16 cosine"] = judged(words, MEAN_COSINE_BF16, row["cosine"][OURS_BF16]["mean"], "cosine")
    for name, dtype in ((OURS, "fp32"), (OURS_BF16, "bf16")):
        if name in row["ndcg"]:
            off = abs(row["ndcg"][name] - row["ndcg"][STOCK])
            words = f"{dtype}: nDCG@10 within {NDCG_POINTS:g} point of stock"
            found[f"{dtype} nDCG"] = judged(words, NDCG_POINTS, off, "points", at_most=True)
    row["targets"] = found


if __name__ == "__main__":
    study.serve(measure)
