"""Endurance: threads of mixed work for many minutes. `make soak MINUTES=30 SEED=n`.

Other threads switch sentfast off and on meanwhile, also in the middle of a call, each of whose parts then runs as it
finds the switch. So before the threads start, every call is made alone with every choice of parts that are off
(:class:`Parts`), and every result in a thread has the bits of one of these: of an encoding each row by itself, since
each batch may have another choice. A result that has none of them is saved with those that were expected. Nothing is
raised, no thread stands still for two minutes, and after the first tenth of the time the resident memory grows by no
more than 64 MiB.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from sentence_transformers import util
from tiny_models import build, save_base, texts

import sentfast
from sentfast import switch

THREADS = 8
STILL = 120  # seconds
INNER = max(1, (os.cpu_count() or 1) // 2)  # threads of each thread's products, on which PyTorch's roundings depend
GROWTH = 64 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def pieces(name: str, found) -> list:
    """What has to be equal as a whole: each row of an encoding, with its place."""
    return list(enumerate(found)) if name.startswith("encode") else [found]


def bits(x) -> tuple:
    """A result as something that is equal only to the same bits."""
    if isinstance(x, (list, tuple)):
        return tuple(map(bits, x))
    if isinstance(x, dict):
        return tuple((key, bits(value)) for key, value in sorted(x.items()))
    if isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    return x.tobytes() if hasattr(x, "tobytes") else x


class Parts:
    """Stands in for the variable that says whether sentfast is off here, and for parts of a call says that it is."""

    def __init__(self, variable: ContextVar[bool], each: bool):
        self.variable, self.each, self.off = variable, each, frozenset[str]()
        self.asked: set[str] = set()
        self.times: Counter[str] = Counter()

    def get(self) -> bool:
        asker = sys._getframe(2)  # whoever has called `is_enabled`
        original = asker.f_locals.get("original")
        name = getattr(original, "__qualname__", asker.f_code.co_name)
        self.times[name] += 1
        name = f"{name} {self.times[name]}" if self.each else name
        self.asked.add(name)
        return name in self.off or self.variable.get()

    def set(self, value: bool) -> None:
        self.variable.set(value)

    def choices(self, call: Callable[[], object]) -> Iterator[object]:
        """The results of a call with each choice of its parts."""
        yield call()
        # A part that is on may take others in, which are asked only where it is off.
        tried = {frozenset[str]()}
        while left := [frozenset(x) for x in subsets(self.asked) if frozenset(x) not in tried]:
            for self.off in left:
                tried.add(self.off)
                self.times.clear()
                yield call()
            self.off = frozenset()


def subsets(names: set[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(sorted(names), n) for n in range(len(names) + 1))


@contextmanager
def parts(each: bool) -> Iterator[Parts]:
    """each: a part that is asked for several times in a call may be off in some of them."""
    before = switch._disabled_here
    made = Parts(before, each)
    switch._disabled_here = made  # type: ignore[assignment]
    try:
        yield made
    finally:
        switch._disabled_here = before


class Work:
    """Calls whose results are known, on models that the threads share."""

    def __init__(self, seed: int, folder: Path):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        path = {
            kind: save_base(folder, kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            for kind in ("bert", "mpnet")
        }
        self.models = [build(path[kind]) for kind in path]
        self.trained = [build(path["bert"]) for _ in range(THREADS)]
        self.batches = [texts(draw.choice([1, 3, 40, 200]), draw.randrange(10**6)) for _ in range(4)]
        self.x, self.y = torch.randn(700, 48), torch.randn(90, 48)
        self.calls: dict[str, Callable[[int], object]] = {
            **{f"encode {m} {b}": self._encode(m, b) for m in range(2) for b in range(len(self.batches))},
            "cos_sim": lambda thread: util.cos_sim(self.x, self.y),
            "pairwise": lambda thread: util.pairwise_cos_sim(self.x, self.x.flip(0)),
            "search": lambda thread: util.semantic_search(self.y, self.x, top_k=5),
            "mining": lambda thread: util.paraphrase_mining_embeddings(self.x[:200], top_k=3),
            "communities": lambda thread: util.community_detection(self.x[:200], threshold=0.3, min_community_size=2),
            "train": self._train,
        }
        self.expected: dict[str, dict[object, object]] = {name: {} for name in self.calls}
        for change in (sentfast.restore, sentfast.accelerate):
            for model in self.models:
                change(model)
            for name, call in self.calls.items():
                self._expect(name, lambda call=call: call(0))

    def _expect(self, name: str, call: Callable[[], object]) -> None:
        call()  # the first one tries what it runs, and asks more
        with parts(each=not name.startswith("encode")) as made:
            for found in made.choices(call):
                for piece in pieces(name, found):
                    self.expected[name].setdefault(bits(piece), piece)

    def _encode(self, model: int, batch: int) -> Callable[[int], object]:
        return lambda thread: self.models[model].encode(self.batches[batch])

    def _train(self, thread: int) -> object:
        """One step of a model that no other thread has, and back."""
        model = self.trained[thread].train()
        features = model.preprocess([*self.batches[0][:4], "a b c", "d"])
        output = model(features)["sentence_embedding"]
        output.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [output, *found]


def switches(work: Work, draw: random.Random) -> None:
    """What changes how others run, but not what they get."""
    kind = draw.randrange(5)
    if kind == 0:
        sentfast.disable()
        sentfast.enable()
    elif kind == 1:
        sentfast.restore(draw.choice(work.models))
    elif kind == 2:
        sentfast.accelerate(draw.choice(work.models))
    elif kind == 3:
        str(sentfast.report(reset=draw.random() < 0.1))
    else:
        str(sentfast.explain(draw.choice(work.models)))


class Soak:
    def __init__(self, seconds: float, seed: int, folder: Path):
        self.seed, self.end = seed, time.monotonic() + seconds
        self.work = Work(seed, folder)
        self.done: Counter[str] = Counter()
        self.last = [time.monotonic()] * THREADS
        self.errors: list[str] = []

    def run(self, thread: int) -> None:
        draw = random.Random(f"{self.seed} {thread}")
        torch.set_num_threads(INNER)
        while time.monotonic() < self.end and not self.errors:
            name = draw.choice([*self.work.calls, "switch"])
            try:
                if name == "switch":
                    switches(self.work, draw)
                elif draw.random() < 0.1:
                    with sentfast.disabled():
                        self.check(name, thread)
                else:
                    self.check(name, thread)
            except BaseException:
                self.errors.append(f"{name} in thread {thread}: {traceback.format_exc()}")
            self.done[name] += 1
            self.last[thread] = time.monotonic()

    def check(self, name: str, thread: int) -> None:
        expected = self.work.expected[name]
        found = self.work.calls[name](thread)
        unknown = [piece for piece in pieces(name, found) if bits(piece) not in expected]
        if unknown:
            path = Path(tempfile.gettempdir()) / f"soak-{self.seed}-{thread}.pt"
            torch.save({"call": name, "found": unknown, "expected": list(expected.values())}, path)
            raise AssertionError(f"{len(unknown)} results that no choice of parts gives alone: {path}")

    def watch(self, seconds: float) -> int:
        """The growth of the resident memory."""
        start, first = time.monotonic(), 0
        while time.monotonic() < self.end and not self.errors:
            time.sleep(0.5)
            if not first and time.monotonic() - start > seconds / 10:
                first = resident()
            if time.monotonic() - min(self.last) > STILL:
                faulthandler.dump_traceback()
                print("a thread stands still", flush=True)
                os._exit(3)
        return resident() - first if first else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes, {THREADS} threads", flush=True)
    torch.set_num_threads(INNER)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.minutes * 60, options.seed, Path(folder))
        threads = [threading.Thread(target=soak.run, args=(i,), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        growth = soak.watch(options.minutes * 60)
        for thread in threads:
            thread.join(STILL)
    print(
        f"{sum(soak.done.values()):,} calls: {dict(sorted(soak.done.items()))}; memory grew by {growth / 2**20:.1f} MiB"
    )
    for error in soak.errors:
        print(error)
    alive = any(thread.is_alive() for thread in threads)
    return 1 if soak.errors or alive or growth > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
