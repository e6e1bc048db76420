"""The tables of the encoder's studies. report.py places them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from words import duration, markdown, rate, three_digits, times

Row = dict[str, Any]
OURS, STOCK = "sentfast", "stock"
OURS_BF16, STOCK_BF16 = "sentfast bf16", "stock bf16"
OPENVINO, OPENVINO_BF16 = "OpenVINO", "OpenVINO bf16"


def weights(row: Row) -> str:
    return "" if row.get("weights") == "real" else " (random weights)"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def cosine(found: float) -> str:
    """Enough digits to tell it from one."""
    return f"{found:.8f}" if 1 - found < 1e-4 else f"{found:.5f}"


def throughput(rows: list[Row]) -> str:
    """Real tokens per second, and times faster than sentence-transformers in fp32."""
    names = [STOCK_BF16, OPENVINO, OPENVINO_BF16, OURS, OURS_BF16]
    header = ["real tokens per second", "texts, tokens", "stock", *names, "of the peak, fp32", "bf16"]
    body = []
    for row in rows:
        cells = [_speed(row, name) for name in names]
        title = row["title"] + weights(row)
        counted = f"{row['texts']}, {row['tokens'] / row['texts']:.1f} each"
        fractions = [percent(row["fractions"].get(name)) for name in (OURS, OURS_BF16)]
        body.append([title, counted, three_digits(row["rates"][STOCK]), *cells, *fractions])
    return markdown(header, body) + _missing(rows)


def _speed(row: Row, name: str) -> str:
    if name not in row["rates"]:
        return ""
    return f"{three_digits(row['rates'][name])}, {times(row['ratios'][name])}"


def _missing(rows: list[Row]) -> str:
    """Why a variant was not measured, once for each reason."""
    reasons = dict.fromkeys(f"{name}: {why}" for row in rows for name, why in row.get("missing", {}).items() if why)
    return "".join(f"\nNot measured: {reason}.\n" for reason in reasons)


def latency(rows: list[Row]) -> str:
    names = [STOCK, OURS, OURS_BF16]
    header = ["one query, p50 (p90)", "tokens", *names, "times lower, fp32", "bf16"]
    body = []
    for row in rows:
        taken, ratios = row["seconds"], row["ratios"]
        cells = [f"{duration(taken[n]['p50'])} ({duration(taken[n]['p90'])})" if n in taken else "" for n in names]
        lower = [f"**{three_digits(ratios[n]['p50'])}×**" if n in ratios else "" for n in (OURS, OURS_BF16)]
        body.append([row["title"] + weights(row), three_digits(row["tokens"]), *cells, *lower])
    return markdown(header, body) + _missing(rows)


def gemm(rows: list[Row]) -> str:
    """sentfast / torch, and what fraction of the peak sentfast reaches."""
    shapes = list(dict.fromkeys(shape for row in rows for shape in row["rates"]))
    body = [[row["title"], rate(row["peak"], "FLOP/s"), *(_cell(row, shape) for shape in shapes)] for row in rows]
    return markdown(["sentfast / torch, GFLOP/s (of the peak)", "peak", *shapes], body)


def _cell(row: Row, shape: str) -> str:
    if shape not in row["rates"]:
        return ""
    ours, theirs = (row["rates"][shape][name] / 1e9 for name in ("sentfast", "torch"))
    reached = f" ({row['fractions'][shape]['sentfast']:.0%})" if "fractions" in row else ""
    return f"{three_digits(ours)} / {three_digits(theirs)}{reached}"


def memory(rows: list[Row]) -> str:
    names = [STOCK, OURS, OURS_BF16]
    header = ["MB", *(f"{n}, {w}" for w in ("after loading", "added by encode", "peak") for n in names)]
    body = []
    for row in rows:
        cells = []
        for what in ("loaded", "encode", "peak"):
            cells += [f"{row['bytes'][n][what] / 1e6:,.0f}" if n in row["bytes"] else "" for n in names]
        body.append([row["title"] + weights(row), *cells])
    return markdown(header, body)


def start(rows: list[Row]) -> str:
    names = [STOCK, OURS, OURS_BF16]
    whats = {"imports": "imports", "load": "load", "first_encode": "first encode", "first_embedding": "total"}
    body = []
    for row in rows:
        for name in names:
            if name in row["seconds"]:
                found = row["seconds"][name]
                body.append([f"{row['title']}{weights(row)}, {name}", *(duration(found[what]) for what in whats)])
    return markdown(["from the start of the process to the first embedding", *whats.values()], body)


def trust(rows: list[Row]) -> str:
    """What the first call and each call spend on being sure."""
    header = [
        "",
        "parameters",
        "examined at the first call",
        "compared at each call",
        "of one query",
        "of 32 short texts",
    ]
    body = []
    for row in rows:
        taken, shares = row["seconds"], row["shares"]
        cells = [duration(taken["examined"]), duration(taken["compared"])]
        cells += [f"{percent(shares[what])} of {duration(taken[what])}" for what in ("query", "batch")]
        body.append([row["title"] + weights(row), str(row["parameters"]), *cells])
    return markdown(header, body)


def quality(rows: list[Row]) -> str:
    header = ["", "texts", "cosine to stock, least", "mean", "nDCG@10", "accuracy@1"]
    body = []
    for row in rows:
        counted = f"{row['queries']:,} words, {row['glosses']:,} glosses"
        for name in row["ndcg"]:
            found = row["cosine"].get(name)
            cells = [cosine(found["min"]), cosine(found["mean"])] if found else ["", ""]
            figures = [f"{row[what][name]:.2f}" for what in ("ndcg", "accuracy")]
            body.append([f"{row['title']}{weights(row)}, {name}", counted, *cells, *figures])
    return markdown(header, body) + _missing(rows)


def share(rows: list[Row]) -> str:
    """Part of the encoder's time by stage and, where it multiplies, the part of the peak that it reaches."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["shares"]))

    def cell(row: Row, stage: str) -> str:
        rate = row["of_peak"].get(stage)
        return percent(row["shares"].get(stage)) + (f" ({percent(rate)})" if rate else "")

    body = [[row["title"] + weights(row), *(cell(row, stage) for stage in stages)] for row in rows]
    return markdown(["share of the time (of the peak)", *stages], body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "encoder": throughput,
    "encoder_latency": latency,
    "encoder_trust": trust,
    "encoder_gemm": gemm,
    "encoder_memory": memory,
    "encoder_startup": start,
    "encoder_quality": quality,
    "encoder_share": share,
}


# ---- targets -----------------------------------------------------------------------------------------------------


def _measured(judged: dict[str, Any]) -> str:
    got, unit = judged["got"], judged["unit"]
    if got is None:
        return "not measured"
    if unit == "%":
        return f"{got:.1%}"
    if unit == "cosine":
        return f"1 - {1 - got:.1e}"
    if unit == "relative":
        return f"{got:.1e}"
    return f"{got:.3f} {unit}" if unit == "points" else f"{three_digits(got)} {unit}"


def targets(rows: list[Row]) -> list[list[str]]:
    """title, target, measured, met: a line for each target."""
    lines = []
    for row in rows:
        for judged in row["targets"].values():
            met = {True: "yes", False: "**no**", None: ""}[judged["met"]]
            title = f"{row['table'].replace('_', ', ')}: {row['title']}{weights(row)}"
            lines.append([title, judged["words"], _measured(judged), met])
    return lines
