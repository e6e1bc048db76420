"""A hostile test: draws models, pipelines, calls and edits at random and compares sentfast with stock.

    make fuzz SECONDS=60 SEED=7     # as many cases as fit
    make fuzz CASES=500 SEED=7      # so many cases
    make fuzz CASE=7:123            # one case again, by its number
    make fuzz FAMILY=losses         # of one family alone

Each case has a family, chosen by its number, and is run by worker processes: one that crashes or hangs is a finding
too, and the others go on. A failure is run again in a new process, shrunk, and printed with the command that repeats
it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# In turn, by the number of the case; those that take a hundredth of the time come twice.
TURNS = (
    *("models", "modules", "pipelines", "similarity", "encode", "operators", "encoders"),
    *("search", "losses", "modules", "edits", "similarity", "edits", "operators", "programs"),
)
FAMILIES = tuple(sorted(set(TURNS)))
LIMIT = 150  # seconds without a word from a worker
SHRINKING = 60  # seconds; what is left is shown as it was drawn
# Of the cases that call something of ours at all, at least this share must have run an operator.
MUST_RUN = 0.5


def family_name(number: int, only: str = "") -> str:
    return only or TURNS[number % len(TURNS)]


def worker(arguments: argparse.Namespace) -> None:
    """Reads numbers of cases from stdin and answers each with one line of JSON."""
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import faulthandler
    import importlib

    faulthandler.enable()
    import allowed
    import sides
    import transformers

    allowed.ignore(arguments.ignore)

    transformers.utils.logging.disable_progress_bar()
    out = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        module = importlib.import_module(f"{family_name(asked['number'], arguments.family)}_family")
        simple = frozenset(asked.get("simple", ()))
        outcome = sides.check(module.case, arguments.seed, asked["number"], simple)
        answer: dict[str, Any] = {**vars(outcome), "number": asked["number"]}
        if asked.get("shrink") and outcome.differences:
            names = list(outcome.drawn)
            answer["simple"] = sorted(sides.shrink(module.case, arguments.seed, asked["number"], names))
            smaller = sides.check(module.case, arguments.seed, asked["number"], frozenset(answer["simple"]))
            answer |= vars(smaller)
        answer["drawn"] = {name: repr(value)[:200] for name, value in answer["drawn"].items()}
        print(json.dumps(answer, default=sorted), file=out, flush=True)


class Worker:
    """A process that runs cases, started anew when it has died."""

    def __init__(self, arguments: argparse.Namespace):
        self.command = [sys.executable, __file__, "--worker", "--seed", str(arguments.seed)]
        self.command += ["--family", arguments.family] if arguments.family else []
        self.command += ["--ignore", arguments.ignore] if arguments.ignore else []
        self.process: subprocess.Popen | None = None

    def ask(self, **asked: Any) -> dict[str, Any]:
        """The outcome of one case; {"died": why} where there is none."""
        if self.process is None:
            # What malloc gives out and takes back is overwritten, and the kernels' new tensors hold NaN.
            environment = {**os.environ, "SENTFAST_TEST_FILL": "1", "MALLOC_PERTURB_": "165", "TQDM_DISABLE": "1"}
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            self.errors: list[str] = []
            threading.Thread(target=lambda p, e: e.extend(p.stderr), args=(self.process, self.errors)).start()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        if line:
            return json.loads(line)
        code = process.wait()
        self.process = None
        return {"number": asked["number"], "died": f"exit code {code}\n{''.join(self.errors)[-3000:]}"}

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def run_all(arguments: argparse.Namespace, numbers: range | list[int]) -> list[dict[str, Any]]:
    """Runs the cases in two processes, until they are through or the time is."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for number in numbers:
        waiting.put(number)
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None

    def work() -> None:
        mine = Worker(arguments)
        while deadline is None or time.monotonic() < deadline:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            answer = mine.ask(number=number)
            answers.append(answer)
            if answer.get("differences") or "died" in answer:
                print(
                    f"  {arguments.seed}:{number} {family_name(number, arguments.family)}: {first(answer)}", flush=True
                )
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(arguments.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def first(answer: dict[str, Any]) -> str:
    return answer.get("died", "").strip().splitlines()[0] if "died" in answer else answer["differences"][0][:400]


def repeat(arguments: argparse.Namespace, alone: Worker, number: int, simple: list[str], show: bool = True) -> bool:
    """Runs one case again, shrinks it, and prints all that is known; whether it failed."""
    answer = alone.ask(number=number, simple=simple, shrink=not simple)
    failed = "died" in answer or bool(answer["differences"])
    if not (failed or show):
        return False
    name = family_name(number, arguments.family)
    command = f"make fuzz CASE={arguments.seed}:{number}" + (f" FAMILY={name}" if arguments.family else "")
    print(f"\n{arguments.seed}:{number}  family {name}\n    {command}")
    describe(answer)
    return failed


def describe(answer: dict[str, Any]) -> None:
    if "died" in answer:
        print(f"  the process died: {answer['died']}")
        return
    print("    " + ", ".join(f"{what} = {value}" for what, value in answer["drawn"].items()))
    for text in answer["differences"] or ["the same as stock"]:
        print("  " + text.replace("\n", "\n  "))
    print(f"  operators: {answer['operators']}; original code: {answer['codes']}; allowed: {answer['allowed']}")


def summary(arguments: argparse.Namespace, answers: list[dict[str, Any]], failed: list[int], seconds: float) -> str:
    by_family = Counter(family_name(answer["number"], arguments.family) for answer in answers)
    ran = [answer for answer in answers if answer.get("operators")]
    operators = Counter(name for answer in ran for name in answer["operators"])
    codes = Counter(code.split()[-1] for answer in answers for code in answer.get("codes", ()))
    excused = Counter(name for answer in answers for name in answer.get("allowed", ()))
    numbers = sum(answer.get("compared", 0) for answer in answers)
    raised = sum(answer.get("raised", 0) for answer in answers)
    lines = [
        f"SEED={arguments.seed}: {len(answers)} cases in {seconds:.0f} s, {len(failed)} failed; "
        f"{numbers:,} numbers compared, {len(ran)} cases ran our operators, {raised} errors alike",
        f"families: {dict(by_family)}",
        f"operators: {dict(operators.most_common())}",
        f"original code: {dict(codes.most_common())}",
        f"allowed: {dict(excused)}",
        f"without an exact result: {dict(Counter(a['unjudged'][:100] for a in answers if a.get('unjudged')))}",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--cases", type=int, default=0)
    parser.add_argument("--case", default="", help="SEED:NUMBER, or several with commas between")
    parser.add_argument("--simple", default="", help="names of draws that take their simplest value, with commas")
    parser.add_argument("--family", default="", choices=("", *FAMILIES))
    parser.add_argument("--ignore", default="", help="regular expression of differences that do not count")
    parser.add_argument("--show", type=int, default=12, help="how many failures are shrunk and shown")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return 0
    if arguments.case:
        seed, _, numbers = arguments.case.partition(":")
        arguments.seed = int(seed)
        simple = [name for name in arguments.simple.split(",") if name]
        alone = Worker(arguments)
        failed = [repeat(arguments, alone, int(number), simple) for number in numbers.split(",")]
        alone.close()
        return int(any(failed))
    if not (arguments.cases or arguments.seconds):
        arguments.seconds = 60.0
    start = time.monotonic()
    print(f"SEED={arguments.seed}", flush=True)
    answers = run_all(arguments, range(arguments.cases or 10**6))
    failed = sorted(answer["number"] for answer in answers if answer.get("differences") or "died" in answer)
    seconds = time.monotonic() - start
    alone = Worker(arguments)
    shown = 0
    while shown < min(len(failed), arguments.show) and time.monotonic() - start < seconds + SHRINKING:
        number = failed[shown]
        shown += 1
        if not repeat(arguments, alone, number, [], show=False):
            print(f"\n{arguments.seed}:{number} failed, and does not alone: only after the cases before it")
    alone.close()
    for number in failed[shown:]:
        print(f"\n{arguments.seed}:{number}  as it was drawn")
        describe(next(answer for answer in answers if answer["number"] == number))
    print("\n" + summary(arguments, answers, failed, seconds))
    idle = not arguments.family and sum(bool(a.get("operators")) for a in answers) < MUST_RUN * len(answers)
    if idle:
        print("too few cases ran our operators: the test tests nothing")
    return int(bool(failed) or idle)


if __name__ == "__main__":
    sys.exit(main())
