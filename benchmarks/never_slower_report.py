"""The table of never_slower.py: of each function the worst cell, by instruction set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from words import markdown

TABLE = "never_slower"
SUFFIX = "-never-slower"

Rows = dict[str, dict[str, Any]]


def load(folder: Path) -> dict[str, Any]:
    """Machine -> content of its file, for the machines that were measured."""
    paths = sorted(folder.glob(f"*{SUFFIX}.json"))
    return {path.stem.removesuffix(SUFFIX): json.loads(path.read_text()) for path in paths}


def table(content: dict[str, Any]) -> str:
    tiers: dict[str, Rows] = content["tiers"]
    functions = dict.fromkeys(row["function"] for rows in tiers.values() for row in rows.values())
    header = ["", "cells", "of them the original's"]
    header += [f"{tier}: {what}" for tier in tiers for what in ("the worst", "sentfast and stock")]
    body = [[f"`{name}`" if " " not in name else name, *_cells(tiers, name)] for name in functions]
    costs = [row for rows in tiers.values() for row in rows.values() if "deciding" in row]
    dearest = max(costs, key=lambda row: row["deciding"], default=None)
    text = markdown(header, body)
    if dearest is not None:
        cost = f"{dearest['deciding'] * 1e6:.2f} µs, of `{dearest['function']}`"
        text += f"\nHanding a small call to the original costs at most {cost}.\n"
    failing = sum(row["fails"] for rows in tiers.values() for row in rows.values())
    return text + f"\nCells that fail: {failing or 'none'}.\n"


def _cells(tiers: dict[str, Rows], function: str) -> list[str]:
    timed = {
        tier: {name: row for name, row in rows.items() if row["function"] == function and "ratio" in row}
        for tier, rows in tiers.items()
    }
    first = next(iter(timed.values()))
    found = [str(len(first)), str(sum(bool(row["reasons"]) for row in first.values()))]
    for rows in timed.values():
        name, row = min(rows.items(), key=lambda item: item[1]["ratio"])
        size = name.removeprefix(function).removesuffix(", 1 thread").strip(" ,")
        low, high = row["spread"]
        ours, stock = (row["seconds"][side] * 1e6 for side in ("sentfast", "stock"))
        mark = " **fails**" if row["fails"] else ""
        found += [f"{row['ratio']:.2f}× ({low:.2f} to {high:.2f}), {size}{mark}", f"{ours:,.1f} and {stock:,.1f} µs"]
    return found


def block(content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "sentence-transformers") if name in versions]
    commit = content["commit"][:9] + (" with changes" if content["dirty"] else "")
    return "; ".join([machine["name"], *named, f"commit {commit}"]) + ".\n\n" + table(content)
