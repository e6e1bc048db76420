"""Latency of one query of 8 to 16 tokens: p50 and p90 over the calls, stock and sentfast by turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import gate
import study
import texts
from encode_models import MODELS, token_counts
from study import OURS, OURS_BF16, STOCK, Settings, Variant, judged, switched
from timing import turns

TABLE = "encoder_latency"
CALLS, QUICK_CALLS = 200, 20
BLOCK = 20  # calls of one variant in a row: switching sentfast is not part of a query
FASTER = {"minilm": 2.0, "tiny": 3.0}
SAME_TEXT = 0.99


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model."""
    calls = QUICK_CALLS if settings.quick else CALLS
    queries = texts.queries(calls, settings.seed)
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        variants, missing = study.variants_of(model, stock_bf16=False)
        row = measure_queries(model, variants, queries, settings)
        row.update(model=name, weights=weights, missing=missing, seed=settings.seed, title=MODELS[name].title)
        rows[f"encoder_latency_{name}"] = row
    return rows


def measure_queries(
    model: Any, variants: dict[str, Variant], queries: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """Checks every variant on the first queries, then times single calls."""
    ran, outputs = {}, {}
    for name, variant in variants.items():
        outputs[name], found = study.checked(name, variant, queries[:8], settings.backends)
        if variant.ours:
            ran[name] = found
    cosine = {name: study.cosines(outputs[STOCK], found) for name, found in outputs.items() if name != STOCK}
    for name, found in cosine.items():
        if not found["mean"] >= SAME_TEXT:
            raise gate.Refused(f"{name}: its embeddings have mean cosine {found['mean']:.4f} to stock")
    samples = _time(variants, queries)
    return {
        "table": TABLE,
        "calls": len(queries),
        "tokens": statistics.mean(token_counts(model, queries)),
        "cosine": cosine,
        "ran": ran,
        "seconds": {name: _percentiles(taken) for name, taken in samples.items()},
    }


def _time(variants: dict[str, Variant], queries: Sequence[str]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number, name in turns(list(variants), math.ceil(len(queries) / BLOCK)):
        samples[name] += _block(variants[name], queries[number * BLOCK : (number + 1) * BLOCK])
    return samples


def _block(variant: Variant, queries: Sequence[str]) -> list[float]:
    """Seconds of each query, as a caller who gets a numpy vector sees them."""
    taken = []
    with switched(variant.ours):
        _one(variant, queries[-1])
        for query in queries:
            start = time.perf_counter()
            _one(variant, query)
            taken.append(time.perf_counter() - start)
    return taken


def _one(variant: Variant, query: str) -> Any:
    return variant.model.encode([query], show_progress_bar=False)


def _percentiles(taken: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(taken, n=10, method="inclusive")
    return {"p50": statistics.median(taken), "p90": tenths[8], "min": min(taken), "max": max(taken)}


def run(settings: Settings, timeout: float = 180.0) -> dict[str, Any]:
    return study.in_child("latency", settings, timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds ratios and targets."""
    stock = row["seconds"][STOCK]
    row["ratios"] = {
        name: {which: stock[which] / taken[which] for which in ("p50", "p90")}
        for name, taken in row["seconds"].items()
        if name != STOCK
    }
    row["targets"] = {}
    least = FASTER.get(row["model"])
    if least:
        for name, dtype in ((OURS, "fp32"), (OURS_BF16, "bf16")):
            if name == OURS_BF16 and name not in row["ratios"]:
                continue
            words = f"one query, {dtype}: p50 at least {least:g} × lower than sentence-transformers"
            row["targets"][f"{dtype} p50"] = judged(words, least, row["ratios"][name]["p50"], "×")


if __name__ == "__main__":
    study.serve(measure)
