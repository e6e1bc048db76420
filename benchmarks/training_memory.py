"""Peak memory of training, stock and sentfast each in a fresh process that takes two steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import study
from study import OURS, STOCK, Settings, judged

TABLE = "training_memory"
SHARE = 1 / 3
LOSS_AGREES = 1e-4


def run(settings: Settings, timeout: float = 290.0) -> dict[str, Any]:
    """A row for each model: its longest texts."""
    from encode_models import MODELS
    from training_step import tasks_of

    rows: dict[str, Any] = {}
    for name in settings.models:
        task = tasks_of(name, settings.quick)[-1]
        found = {}
        for variant in (STOCK, OURS):
            extra = {**settings.extra, "model": name, "variant": variant}
            found[variant] = study.in_child("training_memory", Settings(**{**vars(settings), "extra": extra}), timeout)
        title = f"{MODELS[name].title}, {task.kind}, {task.batch} pairs"
        rows[f"training_memory_{name}"] = _row(name, title, found)
    return rows


def _row(model: str, title: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from gate import Refused

    stock, ours = found[STOCK], found[OURS]
    if not abs(ours["loss"] - stock["loss"]) <= LOSS_AGREES * abs(stock["loss"]):
        raise Refused(f"{title}: the first loss is {ours['loss']:.6g}, sentence-transformers' {stock['loss']:.6g}")
    return {
        "table": TABLE,
        "title": title,
        "model": model,
        "weights": stock["weights"],
        "tokens": stock["tokens"],
        "bytes": {name: one["bytes"] for name, one in found.items()},
        "ratios": {OURS: {"peak": ours["bytes"]["peak"] / stock["bytes"]["peak"]}},
        "ran": {OURS: ours["ran"]},
    }


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the target."""
    words = "training: peak memory of the process at most a third of sentence-transformers'"
    row["targets"] = {"peak": judged(words, SHARE, row["ratios"][OURS]["peak"], "×", at_most=True)}


# ---- in the fresh process ------------------------------------------------------------------------------------------


def measure(told: dict[str, Any]) -> dict[str, Any]:
    """Takes one step without dropout, whose loss is compared, and one as a user would; bytes of this process."""
    extra = told["extra"]
    sentfast: Any = None
    if extra["variant"] == OURS:
        import sentfast
    import torch
    from encode_models import MODELS
    from memory import status_bytes
    from training_step import Learner, batches_of, lengths_of, tasks_of, without_dropout

    torch.set_num_threads(told["threads"])
    task = tasks_of(extra["model"], told["quick"])[-1]
    model, weights = MODELS[extra["model"]].build()
    model.max_seq_length = task.max_seq_length
    (batch,) = batches_of(model, task, 1, told["seed"])
    loaded = status_bytes("VmRSS")
    learner = Learner(model)
    with without_dropout(learner.model):
        loss = learner.step(batch)
    learner.step(batch)
    return {
        "bytes": {"loaded": loaded, "peak": max(loaded, status_bytes("VmHWM"))},
        "loss": loss,
        "tokens": sum(lengths_of(batch)),
        "weights": weights,
        "ran": sentfast.report().to_dict() if sentfast is not None else None,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
