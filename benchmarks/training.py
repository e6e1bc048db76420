"""Training steps per second: sentence-transformers and sentfast from the same weights, step by step in turn.

A step is forward, backward, clipping and AdamW with the dropout that the model ships; the pairs are tokenised before.
First, with dropout at 0, the losses and gradients of the first step must agree.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import Any

import gate
import study
from encode_models import MODELS, base_of, flops
from study import OURS, OURS_BF16, STOCK, STOCK_BF16, Settings, judged, switched
from timing import ratio, spread, turns
from training_report import ENCODER, original_code
from training_step import Batch, Learner, Task, batches_of, distance, lengths_of, tasks_of, without_dropout

TABLE = "training"
BATCHES = 4
KINDS = {"short": "words and glosses", "long": "paragraphs"}
BASELINES = {OURS: STOCK, OURS_BF16: STOCK_BF16}
# The first step, relative to stock in float32: its loss, and the distance of the gradients.
LOSS_AGREES, GRADIENTS_AGREE = 1e-4, 1e-3
BF16_AGREES = 1e-2  # on top of twice the difference of stock's own autocast
BACKWARD = 2  # times the forward's products
# (model, kind) -> times faster than stock of the same precision that fp32 and bf16 promise.
SPEEDUP = {
    ("minilm", "short"): (3.5, 3.0),
    ("minilm", "long"): (4.5, None),
    ("mpnet", "short"): (3.0, None),
}


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row for each model and its tasks."""
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        for task in tasks_of(name, settings.quick):
            model.max_seq_length = task.max_seq_length
            row = measure_task(model, task, settings)
            row.update(model=name, weights=weights, seed=settings.seed)
            row["title"] = f"{MODELS[name].title}, {KINDS[task.kind]}, {task.batch} pairs"
            rows[f"training_{name}_{task.kind}"] = row
    return rows


def learners_of(model: Any, bf16: bool) -> dict[str, Learner]:
    """A copy of the model for each variant."""
    kinds = {STOCK: (False, False), OURS: (True, False)}
    if bf16:
        kinds.update({STOCK_BF16: (False, True), OURS_BF16: (True, True)})
    return {name: Learner(copy.deepcopy(model), ours=ours, bf16=half) for name, (ours, half) in kinds.items()}


def measure_task(model: Any, task: Task, settings: Settings) -> dict[str, Any]:
    """Checks the first step of every variant, then times steps."""
    batches = batches_of(model, task, BATCHES, settings.seed)
    learners = learners_of(model, task.bf16)
    first = first_steps(learners, batches[0])
    agree(first)
    ran = {name: warm_up(name, learner, batches[0], settings) for name, learner in learners.items()}
    samples = _time(learners, batches, task.rounds)
    lengths = [lengths_of(batches[number % len(batches)]) for number in range(task.rounds)]
    config = base_of(model).config
    return {
        "table": TABLE,
        "kind": task.kind,
        "batch": task.batch,
        "rounds": task.rounds,
        "texts": 2 * task.batch,
        "tokens": statistics.mean(map(sum, lengths)),
        "longest": max(max(found) for found in lengths),
        "flops": (1 + BACKWARD) * statistics.mean(flops(config, found) for found in lengths),
        "first": first,
        "ran": {name: found for name, found in ran.items() if found},
        "dtypes": {name: "bfloat16" if one.bf16 else "float32" for name, one in learners.items()},
        "seconds": {name: spread(taken) for name, taken in samples.items()},
        "ratios": {name: ratio(samples[stock], samples[name]) for name, stock in BASELINES.items() if name in samples},
    }


# ---- checks ------------------------------------------------------------------------------------------------------


def first_steps(learners: dict[str, Learner], batch: Batch) -> dict[str, dict[str, float]]:
    """variant -> loss, norm of the gradients, and their distance to stock's in float32; dropout is 0."""
    found: dict[str, dict[str, float]] = {}
    for name, learner in learners.items():
        with switched(learner.ours), without_dropout(learner.model):
            loss, norm = learner.gradients(batch)
        gradients = learner.take_gradients()
        if name == STOCK:
            stock = gradients
        found[name] = {"loss": loss, "norm": norm, "distance": distance(gradients, stock)}
    return found


def agree(first: dict[str, dict[str, float]]) -> None:
    """Refuses a variant called sentfast whose first step is another one than stock's."""
    stock = first[STOCK]

    def off(name: str) -> tuple[float, float]:
        one = first[name]
        return _apart(one["loss"], stock["loss"]), max(_apart(one["norm"], stock["norm"]), one["distance"])

    for name, baseline in BASELINES.items():
        if name not in first:
            continue
        allowed = LOSS_AGREES, GRADIENTS_AGREE
        if baseline != STOCK:
            # Half precision is nobody's truth: no farther from float32 than stock's own half precision is.
            allowed = tuple(2 * difference + BF16_AGREES for difference in off(baseline))
        for what, got, most in zip(("loss", "gradients"), off(name), allowed, strict=True):
            if not got <= most:
                raise gate.Refused(f"{name}: the first step's {what} differ by {got:.3g}, allowed is {most:.3g}")


def _apart(x: float, stock: float) -> float:
    """Relative difference; any from nothing is infinite."""
    return abs(x - stock) / abs(stock) if stock else 0.0 if x == stock else math.inf


def warm_up(name: str, learner: Learner, batch: Batch, settings: Settings) -> dict[str, Any]:
    """Takes one step. What ran in it, calls that were handed to the original code too; nothing for stock."""
    from sentfast.report import report

    with switched(learner.ours):
        report(reset=True)
        learner.step(batch)
        ran = report(reset=True).to_dict()
    if not learner.ours:
        return {}
    used = {backend for op, calls in ran["calls"].items() for backend in calls if op == ENCODER}
    if not used <= set(settings.backends):
        raise gate.Refused(f"{name}: the encoder ran on {sorted(used)}, wanted {sorted(settings.backends)}")
    return ran


# ---- timing ------------------------------------------------------------------------------------------------------


def _time(learners: dict[str, Learner], batches: list[Batch], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, one for each variant and round."""
    taken: dict[str, list[float]] = {name: [] for name in learners}
    for number, name in turns(list(learners), rounds):
        with switched(learners[name].ours):
            start = time.perf_counter()
            learners[name].step(batches[number % len(batches)])
            taken[name].append(time.perf_counter() - start)
    return taken


def run(settings: Settings, timeout: float = 580.0) -> dict[str, Any]:
    """Measures each model in a process of its own."""
    rows: dict[str, Any] = {}
    for name in settings.models:
        rows.update(study.in_child("training", Settings(**{**vars(settings), "models": (name,)}), timeout))
    return rows


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds what follows from the machine's limits, and the targets."""
    row["rates"] = {name: row["tokens"] / taken["median"] for name, taken in row["seconds"].items()}
    row["fractions"] = {}
    for name, taken in row["seconds"].items():
        peak = limits[f"peak_{row['dtypes'][name]}"]
        row["fractions"][name] = row["flops"] / taken["median"] / peak if peak else None
    row["note"] = ", ".join(f"{name} {found['median']:.2f}x" for name, found in row["ratios"].items())
    original = {name: original_code(ran) for name, ran in row["ran"].items()}
    row["note"] += "".join(f"; {name}: the encoder did not run ({why})" for name, why in original.items() if why)
    row["targets"] = {}
    wanted = SPEEDUP.get((row["model"], row["kind"]), (None, None))
    for name, dtype, least in zip((OURS, OURS_BF16), ("fp32", "bf16 autocast"), wanted, strict=True):
        if least:
            words = f"a step, {dtype}: at least {least:g} × faster than sentence-transformers"
            row["targets"][f"{dtype} speed"] = judged(words, least, row["ratios"][name]["median"], "×")


if __name__ == "__main__":
    study.serve(measure)
