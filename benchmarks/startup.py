"""Memory and start of encode, each variant in fresh processes: peak memory, time to the first embedding.

Each process starts, loads a model, encodes one query and then a sample of texts, as a script of a user would.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import study
import texts
from study import OURS, OURS_BF16, STOCK, Settings, judged

MEMORY, START = "encoder_memory", "encoder_startup"
QUERY = "how much memory does a sentence need"
TIMES = ("imports", "load", "first_encode", "first_embedding")
SAME_TEXT = 0.99


def run(settings: Settings, timeout: float = 120.0) -> dict[str, Any]:
    """Rows of memory for each model and kind of text, and of the start for each model."""
    rows: dict[str, Any] = {}
    for model in settings.models:
        # kind of text -> variant -> what its process found; "" starts and encodes no sample.
        found: dict[str, dict[str, Any]] = {}
        for kind in ("short",) if settings.quick else (*texts.KINDS, ""):
            names = [STOCK, OURS]
            if kind == "long" and not study.why_no_bf16():
                names.append(OURS_BF16)
            # By turns, so that no variant has the machine's better minutes.
            found[kind] = {name: _child(model, name, kind, settings, timeout) for name in names}
            _same(found[kind])
            if kind:
                rows[f"encoder_memory_{model}_{kind}"] = _memory_row(model, kind, found[kind])
        rows[f"encoder_startup_{model}"] = _start_row(model, list(found.values()))
    return rows


def _child(model: str, variant: str, kind: str, settings: Settings, timeout: float) -> dict[str, Any]:
    sample = []
    if kind:
        from encode_models import MODELS

        sample = texts.KINDS[kind](settings.extra.get("texts") or min(256, MODELS[model].texts[kind]), settings.seed)
    extra = {**settings.extra, "model": model, "variant": variant, "sample": sample, "started": time.monotonic()}
    return study.in_child("startup", Settings(**{**vars(settings), "extra": extra}), timeout)


def _memory_row(model: str, kind: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row = _row(MEMORY, model, found, f", {kind}")
    row.update(kind=kind, bytes={name: one["bytes"] for name, one in found.items()})
    # What encoding adds can be nothing at all and has no ratio.
    stock = row["bytes"][STOCK]
    row["ratios"] = {
        name: {what: row["bytes"][name][what] / stock[what] for what in ("loaded", "peak")}
        for name in found
        if name != STOCK
    }
    return row


def _start_row(model: str, runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs that have the variant; ratios are to stock of the same run."""
    every = {name: one for run in runs for name, one in run.items()}
    row = _row(START, model, every, "")
    row["runs"] = {name: sum(name in run for run in runs) for name in every}
    row["seconds"], row["ratios"] = {}, {}
    for name in every:
        pairs = [(run[name]["seconds"], run[STOCK]["seconds"]) for run in runs if name in run]
        row["seconds"][name] = {what: statistics.median(own[what] for own, _ in pairs) for what in TIMES}
        if name != STOCK:
            row["ratios"][name] = {
                what: statistics.median(own[what] / stock[what] for own, stock in pairs) for what in TIMES
            }
    return row


def _row(table: str, model: str, found: dict[str, dict[str, Any]], words: str) -> dict[str, Any]:
    from encode_models import MODELS

    return {
        "table": table,
        "title": MODELS[model].title + words,
        "model": model,
        "weights": found[STOCK]["weights"],
        "ran": {name: one["ran"] for name, one in found.items() if one["ran"]},
    }


def _same(found: dict[str, dict[str, Any]]) -> None:
    """Refuses variants that did not embed the query as stock did."""
    import torch
    from gate import Refused

    stock = torch.tensor(found[STOCK]["embedding"])
    for name, one in found.items():
        cosine = study.cosines(stock[None], torch.tensor(one["embedding"])[None])["min"]
        if not cosine >= SAME_TEXT:
            raise Refused(f"{name}: the first embedding has cosine {cosine:.4f} to stock")


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets: nothing above stock."""
    if row["table"] == MEMORY:
        wanted = {"peak": "peak memory of the process at most that of sentence-transformers"}
    else:
        wanted = {
            "first_encode": "first encode after loading at most as long as sentence-transformers'",
            "first_embedding": "from the start of the process to the first embedding at most as long",
        }
    got = row["ratios"][OURS]
    row["targets"] = {what: judged(words, 1.0, got[what], "×", at_most=True) for what, words in wanted.items()}


# ---- in the fresh process ------------------------------------------------------------------------------------------


def measure(told: dict[str, Any]) -> dict[str, Any]:
    """Times, bytes and the embedding of this process."""
    extra, variant = told["extra"], told["extra"]["variant"]
    sentfast: Any = None
    if variant != STOCK:
        import sentfast
    import torch
    from sentence_transformers import SentenceTransformer  # noqa: F401

    torch.set_num_threads(told["threads"])
    imported = time.monotonic()
    from encode_models import MODELS

    model, weights = MODELS[extra["model"]].build()
    if variant == OURS_BF16:
        sentfast.accelerate(model, precision="bf16")
    loaded = time.monotonic()
    embedding = model.encode(QUERY, show_progress_bar=False)
    first = time.monotonic()
    seconds = {
        "imports": imported - extra["started"],
        "load": loaded - imported,
        "first_encode": first - loaded,
        "first_embedding": first - extra["started"],
    }
    found = {"seconds": seconds, "weights": weights, "embedding": [float(x) for x in embedding], "ran": None}
    found["bytes"] = _encode_memory(model, extra["sample"]) if extra["sample"] else {}
    if sentfast is not None:
        found["ran"] = sentfast.report().to_dict()
        _require_encoder(found["ran"], told["backends"])
    return found


def _encode_memory(model: Any, sample: list[str]) -> dict[str, int]:
    """Resident bytes after the first embedding, what encoding the sample adds at most, and the peak of it all."""
    from memory import reset_peak, status_bytes

    loaded, before = status_bytes("VmRSS"), status_bytes("VmHWM")
    reset_peak()
    model.encode(sample, show_progress_bar=False)
    during = max(status_bytes("VmHWM"), loaded)
    return {"loaded": loaded, "encode": during - loaded, "peak": max(before, during)}


def _require_encoder(ran: dict[str, Any], backends: list[str]) -> None:
    used = set(ran["calls"].get("encoder", {}))
    if not used or not used <= set(backends):
        raise SystemExit(f"the encoder ran on {sorted(used)}, wanted {sorted(backends)}: {ran['fallbacks']}")


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
