"""Losses by themselves, forward and backward: sentence-transformers' classes on given embeddings, stock and sentfast.

Time by turns in one process; the memory that a call adds, gradients included, in fresh processes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gate
import study
import torch
from encode_models import minilm_folder
from memory import peak_extra
from study import OURS, STOCK, Settings, judged, switched
from timing import Variant, interleave, ratio, run_once, spread
from torch import Tensor, nn

TABLE = "loss"
QUICK_SHRINK, QUICK_MEMORY = 32, "mnrl_8192"
CHECKED_ROWS = 512  # so many are checked against float64
BUDGET = 12.0
# Of a positive beside its anchor: so much that the loss is far from 0.
NOISE = {"mnrl": 3.0, "matryoshka": 3.0, "gist": 8.0}
ALLOWED_EPS = 16  # err(sentfast) <= 2 * err(stock) + ALLOWED_EPS * eps
AGREES = 1e-4  # the loss of all rows, where float64 would take too long
BLOCK = 1024

Inputs = dict[str, Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A loss and its size.

    Attributes:
        loss: a name in LOSSES.
        faster: times faster than stock that is aimed at.
        megabytes: that a call may add.
        memory_share: of stock's extra memory that a call may add.
        ours_only: too large for stock; measured once, not in quick runs.
    """

    loss: str
    rows: int
    columns: int
    faster: float | None = None
    megabytes: float | None = None
    memory_share: float | None = None
    ours_only: bool = False


CASES = {
    "mnrl_1024": Case("mnrl", 1024, 384, faster=1.0),
    "mnrl_8192": Case("mnrl", 8192, 384, faster=2.5, megabytes=80),
    "mnrl_65536": Case("mnrl", 65536, 384, megabytes=1000, ours_only=True),
    "gist_256": Case("gist", 256, 768, faster=10.0, memory_share=0.05),
    "matryoshka_2048": Case("matryoshka", 2048, 1024, faster=1.0),
}
PREFIXES = (1024, 768, 512, 256, 128, 64, 32)
TITLES = {
    "mnrl": "MultipleNegativesRankingLoss",
    "gist": "GISTEmbedLoss",
    "matryoshka": f"MatryoshkaLoss over MultipleNegativesRankingLoss, {len(PREFIXES)} lengths",
}


class Given(nn.Module):
    """Stands for a model: hands back embeddings that are in the features already."""

    def __init__(self, key: str, tokenizer: Any = None):
        super().__init__()
        self.key, self.tokenizer, self.max_seq_length = key, tokenizer, 128

    def forward(self, features: dict[str, Tensor], **ignored: Any) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features[self.key]}

    def get_embedding_dimension(self) -> None:
        """Unknown: MatryoshkaLoss asks."""


def _mnrl() -> nn.Module:
    from sentence_transformers.sentence_transformer import losses

    return losses.MultipleNegativesRankingLoss(Given("own"))


def _matryoshka() -> nn.Module:
    from sentence_transformers.sentence_transformer import losses

    inner = _mnrl()
    return losses.MatryoshkaLoss(inner.model, inner, PREFIXES)


def _gist() -> nn.Module:
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    return losses.GISTEmbedLoss(Given("own", tokenizer), Given("guide", tokenizer))


LOSSES = {"mnrl": _mnrl, "gist": _gist, "matryoshka": _matryoshka}


def make(case: Case, rows: int, seed: int) -> Inputs:
    """Embeddings of anchors and of positives near them, by the model and, for GIST, by the guide."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(rows, case.columns, generator=generator)

    made: Inputs = {}
    for key in ("own", "guide") if case.loss == "gist" else ("own",):
        anchors = draw()
        made[f"{key} anchors"], made[f"{key} positives"] = anchors, anchors + NOISE[case.loss] * draw()
    for side in ("anchors", "positives"):
        made[f"own {side}"].requires_grad_()
    return made


def call(loss: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients."""
    features = [
        {key: inputs[f"{key} {side}"] for key in ("own", "guide") if f"{key} {side}" in inputs}
        for side in ("anchors", "positives")
    ]
    value = loss(features, None)
    return value.detach(), *torch.autograd.grad(value, [inputs["own anchors"], inputs["own positives"]])


def rows_of(case: Case, quick: bool) -> int:
    return max(8, case.rows // QUICK_SHRINK) if quick else case.rows


# ---- checks ------------------------------------------------------------------------------------------------------


def operator_ran(ran: dict[str, Any]) -> set[str]:
    """The backends on which an operator of losses ran; none if the original code did."""
    return {backend for op, calls in ran["calls"].items() for backend in calls if "loss" in op}


def check(name: str, case: Case, rows: int, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors of the loss and its gradients against float64, on some of the rows, and what ran."""
    from sentfast.report import report

    loss, inputs = LOSSES[case.loss](), make(case, min(rows, CHECKED_ROWS), settings.seed)
    double = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in inputs.items()}
    with switched(False):
        exact = call(loss, double)
    errors: dict[str, Any] = {}
    for variant in (STOCK, OURS):
        with switched(variant == OURS):
            report(reset=True)
            found = call(loss, inputs)
            ran = report(reset=True).to_dict()
        errors[variant] = [gate.error(x, e) for x, e in zip(found, exact, strict=True)]
    for mine, theirs in zip(errors[OURS], errors[STOCK], strict=True):
        allowed = 2 * theirs + ALLOWED_EPS * torch.finfo(torch.float32).eps
        if not mine <= allowed:
            raise gate.Refused(f"{name}: error {mine:.3g} against float64, allowed is {allowed:.3g}")
    if not operator_ran(ran) <= set(settings.backends):
        raise gate.Refused(f"{name}: ran on {sorted(operator_ran(ran))}, wanted {sorted(settings.backends)}")
    return errors, ran


def mnrl_by_blocks(inputs: Inputs, scale: float = 20.0) -> float:
    """The loss of many rows in plain PyTorch, a block of the matrix at a time."""
    with torch.no_grad():
        anchors, positives = (nn.functional.normalize(inputs[f"own {side}"]) for side in ("anchors", "positives"))
        total = 0.0
        for start in range(0, len(anchors), BLOCK):
            scores = scale * (anchors[start : start + BLOCK] @ positives.T)
            own = scores.diagonal(start)
            total += (scores.logsumexp(1) - own).double().sum().item()
    return total / len(anchors)


# ---- in its own process ------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row; or, told of a case and a variant, the bytes and the seconds of one call."""
    if "case" in settings.extra:
        return _once(CASES[settings.extra["case"]], settings)
    rows = {}
    for name, case in CASES.items():
        if case.ours_only and settings.quick:
            continue
        count = rows_of(case, settings.quick)
        errors, ran = check(name, case, count, settings)
        row: dict[str, Any] = {
            "table": TABLE,
            "case": name,
            "title": f"{TITLES[case.loss]}, {count:,} × {case.columns}",
            "rows": count,
            "seed": settings.seed,
            "errors": errors,
            "ran": {OURS: ran},
            "operator": sorted(operator_ran(ran)),
        }
        if not case.ours_only:
            row.update(_timed(case, count, settings))
        rows[f"loss_{name}"] = row
    return rows


def _timed(case: Case, rows: int, settings: Settings) -> dict[str, Any]:
    loss, inputs = LOSSES[case.loss](), make(case, rows, settings.seed)
    variants = {name: Variant(lambda given: call(loss, given), switched=name == OURS) for name in (STOCK, OURS)}
    values = {name: run_once(variant, inputs)[0].item() for name, variant in variants.items()}
    _same_loss(values[OURS], values[STOCK])
    rounds = settings.rounds if settings.quick else None
    samples = interleave(variants, [inputs], CPU, budget=BUDGET, rounds=rounds)
    return {
        "rounds": len(samples[OURS]),
        "seconds": {name: spread(taken) for name, taken in samples.items()},
        "ratios": {OURS: ratio(samples[STOCK], samples[OURS])},
    }


def _same_loss(mine: float, theirs: float) -> None:
    if not abs(mine - theirs) <= AGREES * abs(theirs):
        raise gate.Refused(f"the loss is {mine:.6g}, plain PyTorch's {theirs:.6g}")


def _once(case: Case, settings: Settings) -> dict[str, Any]:
    """One call in this process, after a small one for what libraries and threads take."""
    with switched(settings.extra["variant"] == OURS):
        loss = LOSSES[case.loss]()
        call(loss, make(case, 64, settings.seed))
        inputs = make(case, rows_of(case, settings.quick), settings.seed)
        values: list[float] = []
        start = time.perf_counter()
        extra = peak_extra(lambda: _kept(call(loss, inputs), values), CPU)
        seconds = time.perf_counter() - start
    if case.ours_only:
        _same_loss(values[0], mnrl_by_blocks(inputs))
    return {"bytes": extra, "seconds": seconds}


def _kept(found: tuple[Tensor, ...], values: list[float]) -> tuple[Tensor, ...]:
    values.append(found[0].item())
    return found


# ---- in the process of bench.py ------------------------------------------------------------------------------------


def run(settings: Settings, timeout: float = 290.0) -> dict[str, Any]:
    """Times and checks in one process, memory in one for each variant."""
    rows = study.in_child("loss", settings, timeout)
    for row in rows.values():
        case = CASES[row["case"]]
        if case.ours_only and not row["operator"]:
            # The original code would take all the memory there is.
            row.update(seconds={}, ratios={}, extra_memory={}, missing={OURS: "the operator did not run"})
            continue
        measured = () if settings.quick and row["case"] != QUICK_MEMORY else _variants(case)
        found = {name: _child(row["case"], name, settings, timeout) for name in measured}
        row["extra_memory"] = {name: one["bytes"] for name, one in found.items()}
        if case.ours_only:
            once = dict.fromkeys(("median", "q1", "q3", "min", "max"), found[OURS]["seconds"])
            row.update(rounds=1, seconds={OURS: once}, ratios={})
    return rows


def _variants(case: Case) -> tuple[str, ...]:
    return (OURS,) if case.ours_only else (STOCK, OURS)


def _child(case: str, variant: str, settings: Settings, timeout: float) -> dict[str, Any]:
    extra = {**settings.extra, "case": case, "variant": variant}
    return study.in_child("loss", Settings(**{**vars(settings), "extra": extra}), timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets."""
    case, targets, extra = CASES[row["case"]], {}, row["extra_memory"]
    if case.faster:
        words = "at least as fast as" if case.faster == 1 else f"at least {case.faster:g} × faster than"
        got = row["ratios"][OURS]["median"]
        targets["speed"] = judged(f"{words} sentence-transformers", case.faster, got, "×")
    if case.megabytes:
        got = extra[OURS] / 1e6 if extra else None
        words = f"extra memory, gradients included, at most {case.megabytes:g} MB"
        targets["memory"] = judged(words, case.megabytes, got, "MB", at_most=True)
    if case.memory_share:
        got = extra[OURS] / extra[STOCK] if extra.get(STOCK) else None
        words = f"extra memory at most {case.memory_share:.0%} of sentence-transformers'"
        targets["memory"] = judged(words, case.memory_share, got, "%", at_most=True)
    row["targets"] = targets
    row["note"] = "" if row["operator"] else "the operator did not run"


if __name__ == "__main__":
    study.serve(measure)
