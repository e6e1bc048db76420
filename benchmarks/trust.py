"""What being sure costs: a model is examined and tried at its first call, and compared at each call with that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import study
import texts
from encode_models import MODELS, token_counts
from study import Settings, judged, switched

TABLE = "encoder_trust"
RUNS, QUICK_RUNS = 9, 3
CALLS, QUICK_CALLS = 2000, 200
BATCH = 32
EACH = 15e-6  # seconds


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model."""
    runs, calls = (QUICK_RUNS, QUICK_CALLS) if settings.quick else (RUNS, CALLS)
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        with switched(True):
            row = measure_model(model, runs, calls, settings.seed)
        row.update(model=name, weights=weights, seed=settings.seed, title=MODELS[name].title)
        rows[f"encoder_trust_{name}"] = row
    return rows


def measure_model(model: Any, runs: int, calls: int, seed: int) -> dict[str, Any]:
    """Medians: of the first calls, of the comparison, and of the calls of which it is a part."""
    import sentfast

    base = model[0].auto_model
    queries, batch = texts.queries(8, seed), texts.KINDS["short"](BATCH, seed)
    model.encode(queries, show_progress_bar=False)
    if ("encoder", "cpu") not in sentfast.report().calls:
        raise SystemExit(f"the encoder did not run: {sentfast.report()}")
    taken = {
        "examined": statistics.median(_seconds(lambda: _examine(base)) for _ in range(runs)),
        "compared": _each(lambda: _compare(base), calls),
        "query": _each(lambda: model.encode(queries[0], show_progress_bar=False), max(runs, calls // 20)),
        "batch": _each(lambda: model.encode(batch, show_progress_bar=False), runs),
    }
    return {
        "table": TABLE,
        "tokens": {"query": token_counts(model, queries[:1])[0], "batch": sum(token_counts(model, batch))},
        "parameters": sum(1 for _ in base.parameters()),
        "seconds": taken,
        "shares": {what: taken["compared"] / taken[what] for what in ("query", "batch")},
        "ran": {study.OURS: sentfast.report(reset=True).to_dict()},
    }


def _examine(base: Any) -> None:
    """As a first call does it."""
    import torch

    from sentfast.encoder import encoder

    encoder.forget(base)
    with torch.inference_mode():
        found = encoder.encoder_of(base)
    if isinstance(found, str):
        raise SystemExit(f"no encoder: {found}")


def _compare(base: Any) -> None:
    from sentfast.encoder import encoder_of

    encoder_of(base)


def _each(call: Callable[[], object], calls: int) -> float:
    """The median of blocks, as a single comparison is shorter than a look at the clock is exact."""
    import torch

    block = max(1, calls // 10)
    with torch.inference_mode():
        call()
        return statistics.median(_seconds(lambda: [call() for _ in range(block)]) / block for _ in range(10))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def run(settings: Settings, timeout: float = 180.0) -> dict[str, Any]:
    return study.in_child("trust", settings, timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the target, for the model that it was made for."""
    row["targets"] = {}
    if row["model"] == "minilm":
        words = "compared at each call in at most 15 µs"
        row["targets"]["compared"] = judged(words, EACH * 1e6, row["seconds"]["compared"] * 1e6, "µs", at_most=True)


if __name__ == "__main__":
    study.serve(measure)
