"""The studies of the encoder and of training: which modules measure which rows, of which models, for which tables."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import encode
import gemm
import latency
import loss
import quality
import search
import search_drop_in
import share
import startup
import training
import training_curve
import training_memory
import trust
from study import Settings


@dataclass(frozen=True)
class Study:
    """A family of rows that is measured together.

    Attributes:
        name: what --only calls it.
        module: has `run(settings) -> rows` and `finish(row, limits)`.
        tables: of the report that its rows stand in.
        models: names in encode_models.MODELS.
        quick: the models of a quick run; without any the study is left out of it.
    """

    name: str
    module: ModuleType
    tables: tuple[str, ...]
    models: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


STUDIES = (
    Study("encoder_minilm", encode, (encode.TABLE,), ("minilm",), ("minilm",)),
    Study("encoder_mpnet", encode, (encode.TABLE,), ("mpnet",)),
    Study("encoder_xtremedistil", encode, (encode.TABLE,), ("xtremedistil",)),
    Study("encoder_tiny", encode, (encode.TABLE,), ("tiny",)),
    Study("encoder_tiny_plain", encode, (encode.TABLE,), ("tiny_plain",)),
    Study("encoder_latency", latency, (latency.TABLE,), ("minilm", "tiny", "xtremedistil", "mpnet"), ("tiny",)),
    Study("encoder_trust", trust, (trust.TABLE,), ("minilm", "mpnet"), ("tiny",)),
    Study("encoder_gemm", gemm, (gemm.TABLE,), quick=("any",)),
    Study("encoder_startup", startup, (startup.MEMORY, startup.START), ("minilm", "mpnet"), ("minilm",)),
    Study("encoder_quality_minilm", quality, (quality.TABLE,), ("minilm",), ("minilm",)),
    Study("encoder_quality_mpnet", quality, (quality.TABLE,), ("mpnet",)),
    Study("encoder_share", share, (share.TABLE,), ("minilm", "mpnet"), ("minilm",)),
    Study("training_minilm", training, (training.TABLE,), ("minilm",), ("tiny",)),
    Study("training_mpnet", training, (training.TABLE,), ("mpnet",)),
    Study("training_memory", training_memory, (training_memory.TABLE,), ("minilm",), ("tiny",)),
    Study("training_curve", training_curve, (training_curve.TABLE,), ("tiny",), ("tiny",)),
    Study("loss", loss, (loss.TABLE,), quick=("any",)),
    Study("search", search, (search.TABLE,), quick=("any",)),
    Study("search_drop_in", search_drop_in, (search_drop_in.TABLE,), quick=("any",)),
)
TABLES = tuple(dict.fromkeys(table for study in STUDIES for table in study.tables))


def select(patterns: Sequence[str], quick: bool) -> list[Study]:
    """The studies whose name or one of whose tables fits a pattern; all without patterns."""
    fitting = [
        study
        for study in STUDIES
        if not patterns or any(fnmatch.fnmatch(x, p) for p in patterns for x in (study.name, *study.tables))
    ]
    return [study for study in fitting if study.quick or not quick]


def measure(study: Study, settings: Settings) -> dict[str, Any]:
    """name -> row, less what needs the limits."""
    models = study.quick if settings.quick else study.models
    rows = study.module.run(dataclasses.replace(settings, models=models))
    return {name: {**row, "study": study.name} for name, row in rows.items()}


def finish(study: Study, row: dict[str, Any], limits: dict[str, float | None]) -> None:
    study.module.finish(row, limits)


def in_order(rows: dict[str, Any]) -> dict[str, Any]:
    """The rows as the tables list them: by study, then as they were measured."""
    names = [study.name for study in STUDIES]
    return dict(sorted(rows.items(), key=lambda item: names.index(item[1]["study"])))


def describe(name: str, row: dict[str, Any]) -> str:
    """One line for the terminal."""
    parts = [f"{name:34}"]
    for target, judged in row["targets"].items():
        if judged["got"] is not None:
            parts.append(f"{target} {judged['got']:.4g}")
    parts += [row["note"]] if row.get("note") else []
    missed = [target for target, judged in row["targets"].items() if judged["met"] is False]
    return "  ".join(parts) + (f"  MISSED: {', '.join(missed)}" if missed else "")
