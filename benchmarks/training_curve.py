"""Whether training goes the same way: the losses of 200 steps, from the same weights over the same batches.

Without dropout the losses of both must be the same but for rounding. With dropout they cannot be, because the random
numbers differ; then the mean over seeds must lie as near to stock's as stock's own seeds lie to each other.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import gate
import study
import torch
from encode_models import MODELS
from study import OURS, STOCK, Settings, judged, switched
from training_step import Batch, Learner, Task, batches_of, without_dropout

TABLE = "training_curve"
STEPS, QUICK_STEPS = 200, 4
WINDOWS = 4
SEEDS = 3
SHOWN = 20  # losses of each curve that the row keeps
TASK = Task("short", 16, 32)
LEARNING_RATE = 2e-4
APART, WITHIN = 1e-4, 1.0
ANOTHER = 1e-2  # a relative difference of the first loss above this is another computation


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model."""
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        model.max_seq_length = TASK.max_seq_length
        steps = QUICK_STEPS if settings.quick else STEPS
        row = compare(model, batches_of(model, TASK, steps, settings.seed), settings.seed)
        row.update(table=TABLE, title=MODELS[name].title, model=name, weights=weights, seed=settings.seed)
        rows[f"training_curve_{name}"] = row
    return rows


def compare(model: Any, batches: Sequence[Batch], seed: int) -> dict[str, Any]:
    """Both curves without dropout, and one for each seed with it."""
    from sentfast.report import report

    exact = {STOCK: curve(model, batches, ours=False, dropout=False, seed=seed)}
    report(reset=True)
    exact[OURS] = curve(model, batches, ours=True, dropout=False, seed=seed)
    ran = {OURS: report(reset=True).to_dict()}
    apart = [abs(a - b) / abs(a) if a else float("inf") for a, b in zip(exact[STOCK], exact[OURS], strict=True)]
    if not apart[0] <= ANOTHER:
        raise gate.Refused(f"{OURS}: the first loss is {exact[OURS][0]:.6g}, stock's {exact[STOCK][0]:.6g}")
    dropped = {
        name: [curve(model, batches, ours=name == OURS, dropout=True, seed=seed + k) for k in range(SEEDS)]
        for name in (STOCK, OURS)
    }
    every = max(1, len(batches) // SHOWN)
    return {
        "steps": len(batches),
        "seeds": SEEDS,
        "ran": ran,
        "apart": max(apart),
        "within": within(dropped[STOCK], dropped[OURS]),
        "last": {name: last_window(found) for name, found in exact.items()},
        "last_dropout": {name: [last_window(one) for one in found] for name, found in dropped.items()},
        "curve": {name: found[::every] for name, found in exact.items()},
    }


def curve(model: Any, batches: Sequence[Batch], *, ours: bool, dropout: bool, seed: int) -> list[float]:
    """The loss of every step; the learning rate falls to nothing, as the trainer's does."""
    learner = Learner(copy.deepcopy(model), learning_rate=LEARNING_RATE)
    fall = torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 1 - step / len(batches))
    losses = []
    with (
        switched(ours),
        torch.random.fork_rng(devices=[]),
        nullcontext() if dropout else without_dropout(learner.model),
    ):
        torch.manual_seed(seed)
        for batch in batches:
            losses.append(learner.step(batch))
            fall.step()
    return losses


def windows(losses: Sequence[float]) -> list[float]:
    """Mean loss of each quarter of the steps."""
    size = max(1, len(losses) // WINDOWS)
    return [statistics.mean(losses[start : start + size]) for start in range(0, min(len(losses), size * WINDOWS), size)]


def last_window(losses: Sequence[float]) -> float:
    return windows(losses)[-1]


def within(stock: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float | None:
    """Distance of the mean losses over the range of stock's seeds, summed over the windows; None without a range."""
    theirs, found = [windows(one) for one in stock], [windows(one) for one in ours]
    between = [
        abs(statistics.mean(a) - statistics.mean(b))
        for a, b in zip(zip(*theirs, strict=True), zip(*found, strict=True), strict=True)
    ]
    spreads = [max(a) - min(a) for a in zip(*theirs, strict=True)]
    return sum(between) / sum(spreads) if sum(spreads) else None


def run(settings: Settings, timeout: float = 290.0) -> dict[str, Any]:
    return study.in_child("training_curve", settings, timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets."""
    same = f"dropout 0: every loss of {row['steps']} steps within 1e-4 of sentence-transformers', relative"
    near = f"dropout 0.1: mean loss over {row['seeds']} seeds, distance to stock's over the range of stock's seeds"
    row["targets"] = {
        "dropout 0": judged(same, APART, row["apart"], "relative", at_most=True),
        "dropout": judged(f"{near} (at most 1)", WITHIN, row["within"], "×", at_most=True),
    }


if __name__ == "__main__":
    study.serve(measure)
