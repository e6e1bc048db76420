"""The tables of training and of losses by themselves. report.py places them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from encoder_report import OURS, OURS_BF16, STOCK, STOCK_BF16, percent, weights
from words import duration, markdown, three_digits, times

ENCODER = "varlen_attention"  # the operator that every layer of a packed step runs

Row = dict[str, Any]


def training(rows: list[Row]) -> str:
    """Real tokens per second of whole steps, and times faster than stock of the same precision."""
    names = [STOCK, OURS, STOCK_BF16, OURS_BF16]
    words = [name.replace("bf16", "bf16 autocast") for name in names]
    header = ["training step, real tokens per second", "tokens of a step", *words, "of the peak", "bf16"]
    body = []
    for row in rows:
        fractions = [percent(row["fractions"].get(name)) for name in (OURS, OURS_BF16)]
        cells = [_speed(row, name) for name in names]
        body.append([row["title"] + weights(row), three_digits(row["tokens"]), *cells, *fractions])
    return markdown(header, body) + handed_back(rows)


def _speed(row: Row, name: str) -> str:
    if name not in row["rates"]:
        return ""
    over = f", {times(row['ratios'][name])}" if name in row["ratios"] else ""
    return three_digits(row["rates"][name]) + over


def handed_back(rows: list[Row]) -> str:
    """Says, for each reason once, where the encoder did not run."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        for name, ran in row["ran"].items():
            if original_code(ran):
                lines.setdefault(f"{name}: {original_code(ran)}", []).append(row["title"])
    words = "The encoder did not run, the original code did"
    return "".join(f"\n{words} ({why}): {'; '.join(titles)}.\n" for why, titles in lines.items())


def original_code(ran: dict[str, Any]) -> str:
    """Which calls the encoder handed to the original code, and why; empty if it ran."""
    if ENCODER in ran["calls"]:
        return ""
    codes = sorted(f"{site} {code}" for site, found in ran["fallbacks"].items() for code in found)
    return ", ".join(codes) or "not asked"


def memory(rows: list[Row]) -> str:
    names = [STOCK, OURS]
    header = [
        "MB",
        "tokens of a step",
        *(f"{name}, {what}" for what in ("loaded", "peak") for name in names),
        "of stock",
    ]
    body = []
    for row in rows:
        cells = [f"{row['bytes'][name][what] / 1e6:,.0f}" for what in ("loaded", "peak") for name in names]
        share = percent(row["ratios"][OURS]["peak"])
        body.append([row["title"] + weights(row), three_digits(row["tokens"]), *cells, share])
    return markdown(header, body) + handed_back(rows)


def curve(rows: list[Row]) -> str:
    """Losses at the end of the same training."""
    header = ["loss, mean of the last quarter", "steps", "stock", "sentfast", "largest difference of a step, relative"]
    body = []
    for row in rows:
        title, steps = row["title"] + weights(row), str(row["steps"])
        found = [f"{row['last'][name]:.5f}" for name in (STOCK, OURS)]
        body.append([f"{title}, dropout 0", steps, *found, f"{row['apart']:.1e}"])
        spreads = [f"{min(seeds):.5f} to {max(seeds):.5f}" for seeds in map(row["last_dropout"].get, (STOCK, OURS))]
        body.append([f"{title}, dropout 0.1, {row['seeds']} seeds", steps, *spreads, ""])
    return markdown(header, body) + handed_back(rows)


def loss(rows: list[Row]) -> str:
    header = [
        "forward and backward",
        "stock",
        "sentfast",
        "times faster",
        "stock, extra MB",
        "sentfast, extra MB",
        "by",
    ]
    body = []
    for row in rows:
        taken, extra = row["seconds"], row["extra_memory"]
        cells = [duration(taken[name]["median"]) if name in taken else "" for name in (STOCK, OURS)]
        faster = times(row["ratios"][OURS]) if OURS in row["ratios"] else ""
        added = [f"{extra[name] / 1e6:,.1f}" if name in extra else "" for name in (STOCK, OURS)]
        body.append([row["title"], *cells, faster, *added, ", ".join(row["operator"]) or "original code"])
    return markdown(header, body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "training": training,
    "training_memory": memory,
    "training_curve": curve,
    "loss": loss,
}
