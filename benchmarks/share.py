"""Where the encoder's time goes: the share of each of its stages, and the rate of those that multiply."""

from __future__ import annotations

from typing import Any

import study
import texts
from encode_models import MODELS, base_of, token_counts
from study import OURS, OURS_BF16, Settings, switched

TABLE = "encoder_share"
ROUNDS = 3


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model, kind of text and precision."""
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        variants, _ = study.variants_of(model, stock_bf16=False)
        for kind, count in MODELS[name].texts.items():
            sample = texts.KINDS[kind](settings.extra.get("texts") or count, settings.seed)
            lengths = token_counts(model, sample)
            for variant in (OURS, OURS_BF16):
                if variant not in variants:
                    continue
                precision = "bf16" if variant == OURS_BF16 else "fp32"
                row = _measure(variants[variant], sample, settings)
                row.update(table=TABLE, title=f"{MODELS[name].title}, {kind}, {precision}", weights=weights)
                row.update(
                    threads=settings.threads, dtype=variants[variant].dtype, flops=flops(base_of(model).config, lengths)
                )
                rows[f"encoder_share_{name}_{kind}_{precision}"] = row
    return rows


def _measure(variant: study.Variant, sample: list[str], settings: Settings) -> dict[str, Any]:
    from sentfast import _C

    _, ran = study.checked("share", variant, sample, settings.backends)
    with switched(True):
        _C.encoder_profile(True)
        try:
            for _ in range(ROUNDS):
                study.encode(variant, sample)
        finally:
            seconds = _C.encoder_profile(False)
    return {"seconds": {stage: total / ROUNDS for stage, total in seconds.items()}, "ran": {OURS: ran}, "targets": {}}


def flops(config: Any, lengths: list[int]) -> dict[str, float]:
    """Operations of each stage that multiplies."""
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, sum(lengths)
    per_layer = {
        "query, key, value": 6 * hidden * hidden * tokens,
        "attention": 4 * hidden * sum(length * length for length in lengths),
        "output projection": 2 * hidden * hidden * tokens,
        "up + activation": 2 * hidden * inner * tokens,
        "down": 2 * hidden * inner * tokens,
    }
    return {stage: float(config.num_hidden_layers * count) for stage, count in per_layer.items()}


def run(settings: Settings, timeout: float = 240.0) -> dict[str, Any]:
    return study.in_child("share", settings, timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds shares, and the part of one thread's multiply-add peak that a stage reaches."""
    total = sum(row["seconds"].values())
    peak = limits.get(f"peak_{row['dtype']}")
    row["shares"] = {stage: seconds / total for stage, seconds in row["seconds"].items()}
    row["of_peak"] = {
        stage: count / row["seconds"][stage] / (peak / row["threads"]) for stage, count in row["flops"].items() if peak
    }


if __name__ == "__main__":
    study.serve(measure)
