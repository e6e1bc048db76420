"""The one table of the README: a row of each kind of work, picked from the studies of a result file."""

from __future__ import annotations

from typing import Any

from words import duration, markdown, three_digits

TABLE = "summary"

# Study -> what it is called here. The seconds of a table that are not "median" are "p50".
ROWS = {
    "encoder_minilm_short": "`encode`, all-MiniLM-L6-v2, 512 glosses",
    "encoder_mpnet_long": "`encode`, all-mpnet-base-v2, 32 paragraphs",
    "encoder_latency_minilm": "`encode` of one query, all-MiniLM-L6-v2",
    "training_minilm_short": "a training step, all-MiniLM-L6-v2, 128 pairs",
    "loss_mnrl_8192": "MultipleNegativesRankingLoss, 8,192 pairs, with its gradient",
    "search_many": "`semantic_search`, 2,000 queries over 200,000 rows",
}


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The studies of the table that the result file has."""
    studies = result.get("studies", {})
    return [studies[name] for name in ROWS if name in studies]


def _middle(spread: dict[str, float]) -> float:
    return spread["median"] if "median" in spread else spread["p50"]


def _row(title: str, study: dict[str, Any]) -> list[str]:
    seconds, ratios = study["seconds"], study["ratios"]
    # A search has the names of what it is compared with, the others those of what is compared.
    ratio = ratios["sentfast"] if "sentfast" in ratios else ratios["stock"]
    half = seconds.get("sentfast bf16")
    return [
        title,
        duration(_middle(seconds["stock"])),
        duration(_middle(seconds["sentfast"])),
        f"**{three_digits(_middle(ratio))}×**",
        duration(_middle(half)) if half else "",
    ]


def table(result: dict[str, Any]) -> str:
    found = [_row(title, result["studies"][name]) for name, title in ROWS.items() if name in result["studies"]]
    return markdown(["", "stock", "sentfast", "times as fast", "sentfast bf16"], found)
