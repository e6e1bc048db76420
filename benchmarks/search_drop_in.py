"""Mining, clustering and evaluation of retrieval as sentence-transformers offers them, stock and sentfast.

Each variant is called once in a process of its own, on given embeddings: seconds, and the memory that the call adds,
with and without its result. Synthetic unit rows as in search.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gate
import search
import study
import torch
from memory import held, peak_extra
from study import OURS, STOCK, Settings, judged, switched
from torch import Tensor, nn
from words import duration, markdown, times

TABLE = "search_drop_in"
QUICK_SHRINK = 100
AGREES = 1e-4
CPU = torch.device("cpu")
CLUSTERS = search.Case("clusters", 0, 0)
PACKED_ROW = search.DIM + 24  # bytes
EXTRA_BYTES = 64e6  # beyond inputs, packed rows and the result
BATCH = 2048  # queries at a time in mine_hard_negatives; its default would take 13 GB here


@dataclass(frozen=True)
class Case:
    """A call and its size.

    Attributes:
        call: calls what it is given when it holds its result and nothing else.
        packed: rows that are packed at a time.
        queries: 0: the rows are compared with themselves.
        faster: times faster than stock that is aimed at.
        memory_share: of stock's extra memory that a call may add.
    """

    title: str
    call: Callable[[Tensor, Tensor, Callable[[], None]], list[float]]
    rows: int
    packed: int
    queries: int = 0
    faster: float | None = None
    memory_share: float | None = None


def _paraphrases(queries: Tensor, rows: Tensor, holds_result: Callable[[], None]) -> list[float]:
    from sentence_transformers import util

    pairs = util.paraphrase_mining_embeddings(rows)
    holds_result()
    return [len(pairs), sum(pair[0] for pair in pairs)]


def _communities(queries: Tensor, rows: Tensor, holds_result: Callable[[], None]) -> list[float]:
    from sentence_transformers import util

    found = util.community_detection(rows, threshold=0.45, min_community_size=5)
    holds_result()
    return [len(found), sum(map(len, found))]


def _negatives(queries: Tensor, rows: Tensor, holds_result: Callable[[], None]) -> list[float]:
    """What mine_hard_negatives does between embedding and sampling."""
    from sentence_transformers import SentenceTransformer

    from sentfast import is_enabled
    from sentfast.integrations import evaluation, sentence_transformers

    model: Any = SentenceTransformer(modules=[nn.Identity()], device="cpu")
    if is_enabled():
        version = sentence_transformers.resolve(sentence_transformers.installed())
        assert version is not None
        _, model = evaluation.search_through(version, None, model)
    total = 0.0
    for start in range(0, len(queries), BATCH):
        scores = model.similarity(queries[start : start + BATCH].numpy(), rows).to("cpu")
        total += torch.topk(scores, k=14, dim=1)[0].double().sum().item()
    return [total]


def _retrieval(queries: Tensor, rows: Tensor, holds_result: Callable[[], None]) -> list[float]:
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    class Given(InformationRetrievalEvaluator):
        def embed_inputs(self, model: Any, texts: Any, *args: Any, **kwargs: Any) -> Tensor:
            return queries

        def compute_metrics(self, hits: Any) -> Any:
            holds_result()
            return super().compute_metrics(hits)

    questions = {f"q{i}": "" for i in range(len(queries))}
    documents = {f"d{i}": "" for i in range(len(rows))}
    relevant = {f"q{i}": {f"d{i * 7 % len(rows)}"} for i in range(len(queries))}
    evaluator = Given(questions, documents, relevant, score_functions={"cosine": util.cos_sim})
    found = evaluator.compute_all_metrics(None, corpus_embeddings=rows)["cosine"]
    return [value for kind in found.values() for value in kind.values()]


CASES = {
    "paraphrases": Case("paraphrase_mining_embeddings", _paraphrases, 100_000, 100_000, faster=5.0, memory_share=0.1),
    "communities": Case("community_detection", _communities, 50_000, 50_000, faster=5.0),
    "negatives": Case("scores of mine_hard_negatives", _negatives, 200_000, 200_000, 20_000, faster=4.0),
    "retrieval": Case("InformationRetrievalEvaluator", _retrieval, 200_000, 50_000, 10_000, faster=4.0),
}


# ---- in its own process --------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict[str, Any]:
    """The seconds, bytes and results of one call, after a small one for what libraries and threads take."""
    from sentfast.report import report

    case, shrink = CASES[settings.extra["case"]], QUICK_SHRINK if settings.quick else 1
    ours = settings.extra["variant"] == OURS
    report(reset=True)
    with switched(ours):
        case.call(*search.make(CLUSTERS, 20, 300, settings.seed), lambda: None)
        queries, rows = search.make(CLUSTERS, case.queries // shrink, case.rows // shrink, settings.seed)
        results: list[float] = []
        before, sizes = held(), [0]
        start = time.perf_counter()
        extra = peak_extra(lambda: results.extend(case.call(queries, rows, lambda: sizes.append(held() - before))), CPU)
        seconds = time.perf_counter() - start
    ran = report(reset=True).to_dict()
    if ours:
        search.check_backend(settings.extra["case"], ran, settings.backends)
    return {"bytes": extra, "result_bytes": sizes[-1], "seconds": seconds, "results": results, "ran": ran}


# ---- in the process of bench.py ------------------------------------------------------------------------------------


def run(settings: Settings, timeout: float = 600.0) -> dict[str, Any]:
    """name -> row; each variant in a process of its own."""
    rows: dict[str, Any] = {}
    for name, case in CASES.items():
        found = {variant: _child(name, variant, settings, timeout) for variant in (STOCK, OURS)}
        for mine, theirs in zip(found[OURS]["results"], found[STOCK]["results"], strict=True):
            if not abs(mine - theirs) <= AGREES * max(1, abs(theirs)):
                raise gate.Refused(f"{name}: results {found[OURS]['results']}, stock's {found[STOCK]['results']}")
        shrink = QUICK_SHRINK if settings.quick else 1
        size = f"{case.queries // shrink:,} × {case.rows // shrink:,}" if case.queries else f"{case.rows // shrink:,}"
        rows[f"search_{name}"] = {
            "table": TABLE,
            "case": name,
            "title": f"{case.title}, {size}",
            "seed": settings.seed,
            "rounds": 1,
            "ran": {OURS: found[OURS]["ran"]},
            "seconds": {v: dict.fromkeys(("median", "q1", "q3", "min", "max"), x["seconds"]) for v, x in found.items()},
            "ratios": {OURS: _ratio(found)},
            "extra_memory": {variant: one["bytes"] for variant, one in found.items()},
            "result_memory": {variant: one["result_bytes"] for variant, one in found.items()},
            "packed_memory": case.packed // shrink * PACKED_ROW,
        }
    return rows


def _ratio(found: dict[str, Any]) -> dict[str, float]:
    faster = found[STOCK]["seconds"] / found[OURS]["seconds"]
    return dict.fromkeys(("median", "q1", "q3", "min", "max"), faster)


def _child(case: str, variant: str, settings: Settings, timeout: float) -> dict[str, Any]:
    extra = {**settings.extra, "case": case, "variant": variant}
    return study.in_child("search_drop_in", Settings(**{**vars(settings), "extra": extra}), timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets."""
    case, extra = CASES[row["case"]], row["extra_memory"]
    got = row["ratios"][OURS]["median"]
    targets = {"speed": judged(f"at least {case.faster:g} × faster than sentence-transformers", case.faster, got, "×")}
    if case.memory_share:
        words = f"extra memory at most {case.memory_share:.0%} of sentence-transformers'"
        share = extra[OURS] / extra[STOCK] if extra[STOCK] > 0 else None
        targets["memory"] = judged(words, case.memory_share, share, "%", at_most=True)
    beyond = extra[OURS] - row["result_memory"][OURS] - row["packed_memory"]
    words = f"memory beyond inputs, packed rows and result at most {EXTRA_BYTES / 1e6:g} MB"
    targets["beyond"] = judged(words, EXTRA_BYTES / 1e6, beyond / 1e6, "MB", at_most=True)
    row["targets"] = targets
    row["note"] = ""


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the report."""
    header = ["", STOCK, OURS, "faster", f"memory, {STOCK}", f"memory, {OURS}", "its result", "its packed rows"]
    body = []
    for row in rows:
        taken = [duration(row["seconds"][name]["median"]) for name in (STOCK, OURS)]
        sizes = [*(row["extra_memory"][name] for name in (STOCK, OURS)), row["result_memory"][OURS]]
        memory = [f"{size / 1e6:,.0f} MB" for size in (*sizes, row["packed_memory"])]
        body.append([row["title"], *taken, times(row["ratios"][OURS]), *memory])
    return markdown(header, body)


if __name__ == "__main__":
    study.serve(measure)
