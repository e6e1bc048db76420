"""The linear kernel alone against torch's: MKL in fp32, oneDNN in bf16, on the shapes of MiniLM and MPNet."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import limits
import torch
from study import Settings

TABLE = "encoder_gemm"
# (columns of the input, columns of the output) of the two feed-forward layers of MiniLM and of MPNet.
SHAPES = ((384, 1536), (1536, 384), (768, 3072), (3072, 768))
ROWS = (128, 1024)
SECONDS, QUICK_SECONDS = 0.08, 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _ours(dtype: str, rows: int, columns: int, depth: int, threads: int, seconds: float) -> float:
    """FLOP/s of the packed kernel with its bias, the rows shared among the threads."""
    from sentfast import _C

    share = -(-rows // threads)

    def work(number: int, rates: list[float]) -> None:
        rates[number] = _C.linear_gflops(dtype, min(share, rows - number * share), columns, depth, seconds) * 1e9

    rates = [0.0] * threads
    workers = [threading.Thread(target=work, args=(number, rates)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def _torch(dtype: str, rows: int, columns: int, depth: int, seconds: float) -> Callable[[], float]:
    """A call that measures FLOP/s of torch's linear on torch's threads."""
    kind = DTYPES[dtype]
    x, weight = torch.randn(rows, depth).to(kind), torch.randn(columns, depth).to(kind)
    bias = torch.randn(columns).to(kind)

    def rate() -> float:
        calls, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not calls:
            torch.nn.functional.linear(x, weight, bias)
            calls += 1
        return 2.0 * rows * columns * depth * calls / spent

    return rate


def why_missing() -> str:
    """Why there is no kernel to measure; empty if there is."""
    from sentfast import native

    if not native.cpu_loaded():
        return native.why_no_cpu()
    from sentfast import _C

    return "" if hasattr(_C, "linear_gflops") else "the compiled library has no linear_gflops"


def _has_bf16() -> bool:
    from sentfast import native

    return native.cpu_isa() == "avx512_bf16"


def run(settings: Settings) -> dict[str, Any]:
    """One row for each dtype, number of rows and of threads; its shapes are the cells. Empty without the kernel."""
    if why_missing():
        return {}
    seconds = QUICK_SECONDS if settings.quick else SECONDS
    shapes = SHAPES[:2] if settings.quick else SHAPES
    before = torch.get_num_threads()
    found = {}
    try:
        for dtype in DTYPES:
            if dtype == "bfloat16" and not _has_bf16():
                continue
            for threads in sorted({1, settings.threads}):
                torch.set_num_threads(threads)
                peak = limits.peak(dtype, threads, 4 * seconds)
                for rows in ROWS:
                    row = _measure(dtype, rows, threads, shapes, seconds, settings.rounds)
                    row.update(table=TABLE, peak=peak, ran={}, title=_title(dtype, rows, threads))
                    found[f"encoder_gemm_{dtype}_{rows}_{threads}"] = row
    finally:
        torch.set_num_threads(before)
    return found


def _title(dtype: str, rows: int, threads: int) -> str:
    return f"{dtype}, {rows} rows, {threads} {'thread' if threads == 1 else 'threads'}"


def _measure(
    dtype: str, rows: int, threads: int, shapes: tuple[tuple[int, int], ...], seconds: float, rounds: int
) -> dict[str, Any]:
    """Medians over the rounds, ours and torch's by turns. torch's threads are set by the caller."""
    cells = {}
    with torch.inference_mode():
        for depth, columns in shapes:
            library = _torch(dtype, rows, columns, depth, seconds)
            # The first call of the library compiles or chooses its kernel.
            library()
            samples: dict[str, list[float]] = {"sentfast": [], "torch": []}
            for _ in range(rounds):
                samples["sentfast"].append(_ours(dtype, rows, columns, depth, threads, seconds))
                samples["torch"].append(library())
            cells[f"{depth} × {columns}"] = {name: statistics.median(taken) for name, taken in samples.items()}
    return {"dtype": dtype, "rows": rows, "threads": threads, "rates": cells}


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Fractions of the peak that as many threads reached in the same run."""
    row["targets"] = {}
    if row["peak"]:
        row["fractions"] = {
            shape: {name: rate / row["peak"] for name, rate in rates.items()} for shape, rates in row["rates"].items()
        }
