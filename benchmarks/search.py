"""Exact search: sentfast's top k over packed rows, sentence-transformers' semantic_search, FAISS's flat index.

By turns in one process; packing and FAISS's adding of rows are timed apart. Synthetic unit rows: clusters, and noise
whose spectrum falls as that of sentence embeddings does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gate
import study
import torch
from study import OURS, STOCK, Settings, judged
from timing import Variant, interleave, ratio, spread
from torch import Tensor
from words import duration, markdown, times

TABLE = "search"
FAISS = "FAISS flat"
READ = "read"  # PyTorch's sum of as many bytes as the packed rows have
DIM, K = 384, 10
QUICK_SHRINK = 100
BUDGET = 20.0
CHECKED_QUERIES = 4
CLUSTERS, SPREAD, DECAY = 2000, 0.7, 0.45  # of the rows; variance within a cluster; exponent of the spectrum
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Rows and queries.

    Attributes:
        near: distance of all rows from one vector, for data that codes hardly tell apart; None: clusters.
        faiss, stock: times faster that is aimed at.
        bandwidth: share of the rate of reading that the packed rows are to be read at.
    """

    title: str
    queries: int
    rows: int
    near: float | None = None
    faiss: float | None = None
    stock: float | None = None
    bandwidth: float | None = None


CASES = {
    "many": Case("clusters", 2000, 200_000, faiss=4.5, stock=7.0),
    "one": Case("clusters", 1, 1_000_000, faiss=2.5, bandwidth=0.7),
    "near": Case("near-duplicates, 0.01 apart", 1000, 100_000, near=1e-2, faiss=0.8),
    "nearer": Case("near-duplicates, 0.0001 apart: nearly all scores equal", 500, 50_000, near=1e-4, faiss=0.8),
}


def make(case: Case, queries: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit queries and rows of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(queries + rows, DIM)
    spectrum = torch.arange(1, DIM + 1) ** -DECAY
    centres = torch.randn(CLUSTERS, DIM, generator=generator) * spectrum
    for begin in range(0, len(x), 1 << 16):
        part = x[begin : begin + (1 << 16)]
        noise = torch.randn(part.shape, generator=generator)
        if case.near is not None:
            part.copy_(centres[0] / centres[0].norm() + case.near * noise / DIM**0.5)
        else:
            cluster = centres[torch.randint(CLUSTERS, (len(part),), generator=generator)]
            part.copy_((1 - SPREAD) ** 0.5 * cluster + SPREAD**0.5 * spectrum * noise)
        part /= part.norm(dim=1, keepdim=True)
    return x[:queries], x[queries:]


def flat_index(rows: Tensor, threads: int) -> tuple[Any, float]:
    """FAISS's index with the rows in it, and the seconds of adding them; None without FAISS."""
    try:
        import faiss
    except ImportError:
        print("search: FAISS is not there (pip install faiss-cpu), so nothing is compared with it", flush=True)
        return None, 0.0
    faiss.omp_set_num_threads(threads)
    start = time.perf_counter()
    index = faiss.IndexFlatIP(DIM)
    index.add(rows.numpy())
    return index, time.perf_counter() - start


def check(name: str, queries: Tensor, rows: Tensor, scores: Tensor, ids: Tensor) -> None:
    """Refuses anything but the exact answer, for some of the queries."""
    for i in range(min(CHECKED_QUERIES, len(queries))):
        unit = rows.double() @ queries[i].double() / rows.double().norm(dim=1) / queries[i].double().norm()
        exact = unit.float()
        order = (-exact).argsort(stable=True)[:K]
        if not torch.equal(order, ids[i]) or not torch.allclose(exact[order], scores[i], rtol=2**-23, atol=0):
            raise gate.Refused(f"{name}: query {i} has {ids[i].tolist()}, exact is {order.tolist()}")


def check_backend(name: str, ran: dict[str, Any], backends: tuple[str, ...]) -> None:
    """Refuses a search that ran elsewhere than on `backends`."""
    used = {backend for op, calls in ran["calls"].items() for backend in calls if op.startswith("search_")}
    if not used or not used <= set(backends):
        raise gate.Refused(f"{name}: ran on {sorted(used)}, wanted {sorted(backends)}")


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row."""
    rows = {}
    for name, case in CASES.items():
        if settings.extra.get("cases", name) != name:
            continue
        shrink = QUICK_SHRINK if settings.quick else 1
        rows[f"search_{name}"] = _row(name, case, max(1, case.queries // shrink), case.rows // shrink, settings)
    return rows


def _row(name: str, case: Case, count: int, size: int, settings: Settings) -> dict[str, Any]:
    from sentence_transformers import util

    from sentfast.ops import search
    from sentfast.report import report

    queries, rows = make(case, count, size, settings.seed)
    report(reset=True)
    start = time.perf_counter()
    packed = search.pack(rows)
    packing = time.perf_counter() - start
    index, adding = flat_index(rows, settings.threads)
    found = search.topk(queries, rows, packed, k=K)
    ran = report(reset=True).to_dict()
    check_backend(name, ran, settings.backends)
    check(name, queries, rows, found.scores, found.ids)
    variants = {OURS: Variant(lambda _: search.topk(queries, rows, packed, k=K)[:2])}
    if case.stock:
        variants[STOCK] = Variant(lambda _: util.semantic_search(queries, rows, top_k=K))
    if index is not None:
        variants[FAISS] = Variant(lambda _: index.search(queries.numpy(), K))
    if case.bandwidth:
        assert packed is not None
        as_large = torch.ones(sum(part.numel() * part.element_size() for part in packed) // 4)
        variants[READ] = Variant(lambda _: as_large.sum(), bound=True)
    samples = interleave(variants, [None], CPU, budget=BUDGET, rounds=settings.rounds if settings.quick else None)
    row: dict[str, Any] = {
        "table": TABLE,
        "case": name,
        "title": f"{count:,} × {size:,} × {DIM}, {case.title}",
        "seed": settings.seed,
        "rounds": len(samples[OURS]),
        "ran": {OURS: ran},
        "statistics": found.statistics._asdict(),
        "seconds": {variant: spread(taken) for variant, taken in samples.items()},
        "ratios": {variant: ratio(samples[variant], samples[OURS]) for variant in samples if variant != OURS},
        "once": {"pack": packing, "FAISS add": adding if index is not None else None},
    }
    if case.bandwidth:
        row["read_share"] = row["ratios"][READ]["median"]
    return row


# ---- in the process of bench.py ------------------------------------------------------------------------------------


def run(settings: Settings, timeout: float = 290.0) -> dict[str, Any]:
    """Each case in a process of its own."""
    rows: dict[str, Any] = {}
    for name in CASES:
        extra = {**settings.extra, "cases": name}
        rows.update(study.in_child("search", Settings(**{**vars(settings), "extra": extra}), timeout))
    return rows


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds the targets."""
    case, targets = CASES[row["case"]], {}
    for target, name, wanted in (("faiss", FAISS, case.faiss), ("stock", STOCK, case.stock)):
        if wanted:
            got = row["ratios"][name]["median"] if name in row["ratios"] else None
            other = "sentence-transformers" if name == STOCK else "FAISS IndexFlatIP"
            targets[target] = judged(f"at least {wanted:g} × as fast as {other}", wanted, got, "×")
    if case.bandwidth:
        words = f"packed rows read at {case.bandwidth:.0%} of the rate of reading, or more"
        targets["bandwidth"] = judged(words, case.bandwidth, row["read_share"], "%")
    row["targets"] = targets
    row["note"] = "" if FAISS in row["ratios"] else "FAISS is not installed"


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the report."""
    header = ["top 10", STOCK, FAISS, OURS, f"faster than {STOCK}", f"than {FAISS}", "scored exactly", "packing"]
    body = []
    for row in rows:
        taken = [row["seconds"].get(name) for name in (STOCK, FAISS, OURS)]
        faster = [row["ratios"].get(name) for name in (STOCK, FAISS)]
        share = row["statistics"]["scored"] / row["statistics"]["pairs"]
        body.append(
            [
                row["title"],
                *(duration(one["median"]) if one else "" for one in taken),
                *(times(one) if one else "" for one in faster),
                f"{share:.2%}",
                duration(row["once"]["pack"]),
            ]
        )
    return markdown(header, body)


if __name__ == "__main__":
    study.serve(measure)
