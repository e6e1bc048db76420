"""Calls every operator forward and backward on small inputs, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py [--backend cuda triton] [--every N]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import CASES, DTYPES, HALF_DTYPES, VALUES, Case

import sentfast
from sentfast.ops import search
from sentfast.registry import BACKENDS, use_backend

SEARCH = ("search_topk", "search_pairs", "search_count")


def cases_of(backend: str) -> list[Case]:
    """The cases whose operators have a kernel on it."""
    return [case for case in (*CASES, *VALUES) if backend in ("cpu", "reference", *case.gpu_backends)]


def searches(backend: str) -> bool:
    return backend != "cuda"  # which has no kernels for it


def call_search(device: str) -> None:
    """Of rows and of codes, for few queries and for many, in each metric."""
    corpus = torch.randn(700, 33, device=device)
    packed = search.pack(corpus)
    for metric, count, codes in itertools.product(search.METRICS, (3, 150), (None, packed)):
        queries = corpus[:count]
        lowest = search.topk(queries, corpus, codes, k=5, metric=metric).scores[:, 2].contiguous()
        search.pairs_above(queries, corpus, codes, threshold=lowest, metric=metric)
        search.count_above(queries, corpus, codes, threshold=lowest, metric=metric)


def call_every_operator(backend: str, device: str, every: int) -> set[str]:
    """Every `every`-th call of each case, in each dtype; the operators that ran."""
    sentfast.report(reset=True)
    with use_backend(backend):
        for case in cases_of(backend):
            for dtype in HALF_DTYPES if case in VALUES else DTYPES:
                for call in list(case.calls(dtype, device, False))[::every]:
                    if case in VALUES:
                        case.run(call)
                        continue
                    for x in call.tensors:
                        x.requires_grad_()
                    case.run(call).sum().backward()
            print(f"{backend}: {case.name}", flush=True)
        if searches(backend):
            call_search(device)
            print(f"{backend}: search", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return {operator for operator, _ in sentfast.report().calls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["cuda", "triton"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--every", type=int, default=1, help="one call in so many")
    options = parser.parse_args()
    torch.manual_seed(0)
    for backend in options.backend:
        wanted = {operator for case in cases_of(backend) for operator in case.operators}
        wanted |= set(SEARCH) if searches(backend) else set()
        ran = call_every_operator(backend, options.device, options.every)
        if wanted - ran:
            print(f"{backend}: {sorted(wanted - ran)} did not run", file=sys.stderr)
            return 1
        print(f"{backend}: {len(ran)} operators ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
