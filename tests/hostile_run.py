"""Draws hostile edits by hand: every call and every architecture, as many as wanted, and goes on after a failure.

python tests/hostile_run.py --kinds mpnet electra --cases 300 --seed 7
python tests/hostile_run.py --visible 4          # edits that show in no result of stock
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
import warnings
from pathlib import Path

os.environ["SENTFAST_TEST_FILL"] = os.environ["SENTFAST_TEST_ALL"] = (
    "1"  # as in conftest.py, before sentfast is imported
)

import hostile
import hostile_cases
import torch

from sentfast.integrations import gain


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="*", default=hostile.KINDS)
    parser.add_argument("--edits", nargs="*", default=list(hostile.EDITS))
    parser.add_argument("--calls", nargs="*", default=list(hostile_cases.CALLS))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--visible", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gain.on = False
    with tempfile.TemporaryDirectory() as folder:
        models = {kind: hostile.made(kind, Path(folder)) for kind in given.kinds}
        visible(models, given) if given.visible else drawn(models, given)


def drawn(models, given) -> None:
    count = collections.Counter()
    for number in range(given.cases):
        for kind, plain in models.items():
            case = hostile_cases.Case.drawn(kind, given.edits, given.calls, given.seed * 1000003 + number)
            try:
                count[hostile_cases.attempt(case, plain)] += 1
            except Exception as error:
                count["failed"] += 1
                print("FAILED", case, "|", type(error).__name__, str(error).splitlines()[0][:300], flush=True)
    print(dict(count))


def visible(models, given) -> None:
    for name in given.edits:
        found = collections.Counter()
        for seed in range(given.visible):
            for kind, plain in models.items():
                for call in hostile.SHOWN_BY.get(name, given.calls):
                    case = hostile_cases.Case(kind, name, call, False, seed)
                    found[call] += hostile_cases.shows(case, plain)
        print(f"{sum(found.values()):5d} {name:40s}", dict(found), flush=True)


if __name__ == "__main__":
    main()
