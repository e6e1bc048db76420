"""Times the variants of a workload against each other: interleaved call by call, in one process, from cold caches."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sentfast

MIN_ROUNDS = 7
MAX_ROUNDS = 201
HOT_SAMPLE_SECONDS = 2e-3  # a call shorter than this is repeated within one sample
SWEEP_BYTES = 256 << 20  # larger than the last-level cache of any CPU or GPU in use


@dataclass(frozen=True)
class Variant:
    """One way to compute the output of a workload.

    Attributes:
        call: from the inputs (or from what `prepare` returned) to the output, a tensor or a tuple of tensors.
        prepare: untimed work before each call, as the forward pass of a timed backward pass.
        switched: the call is sentence-transformers' own and is timed with sentfast switched on.
        bound: moves the bytes that the workload must move and computes nothing else; its output is not checked.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[Any], Any] | None = None
    switched: bool = False
    bound: bool = False


def switch(on: bool) -> None:
    """Turns sentfast on or off in this process."""
    (sentfast.enable if on else sentfast.disable)()


def run_once(variant: Variant, inputs: Any) -> Any:
    """The output of a variant, untimed."""
    switch(variant.switched)
    return variant.call(variant.prepare(inputs) if variant.prepare else inputs)


class Clock:
    """Seconds of one or several calls: CUDA events on a GPU, the monotonic clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(self, call: Callable[[Any], Any], argument: Any, repeats: int = 1) -> float:
        """Seconds per call. The output of the last call is freed outside the measurement."""
        return self._cuda(call, argument, repeats) if self.cuda else self._cpu(call, argument, repeats)

    @staticmethod
    def _cpu(call: Callable[[Any], Any], argument: Any, repeats: int) -> float:
        output = None
        start = time.perf_counter_ns()
        for _ in range(repeats):
            output = call(argument)
        end = time.perf_counter_ns()
        del output
        return (end - start) / repeats * 1e-9

    def _cuda(self, call: Callable[[Any], Any], argument: Any, repeats: int) -> float:
        start, end = self.events
        output = None
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            output = call(argument)
        end.record()
        torch.cuda.synchronize()
        del output
        return start.elapsed_time(end) / repeats * 1e-3


class Sweep:
    """Reads a buffer larger than the caches, so that the next call finds its inputs in memory."""

    def __init__(self, device: torch.device):
        self.buffer = torch.ones(SWEEP_BYTES // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.buffer.sum().item()


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and name, every name once a round, with the garbage collector off until the last.

    In a new order each round: none of them always follows the same neighbour's traces, as pages that it has freed.
    """
    names, order = list(names), random.Random(rounds)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in order.sample(names, len(names)):
                yield number, name
    finally:
        gc.enable()


def interleave(
    variants: dict[str, Variant],
    inputs: Sequence[Any],
    device: torch.device,
    *,
    cold: bool = True,
    budget: float = 5.0,
    rounds: int | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of every variant, one sample a round; sample i of all variants shares round i.

    inputs: sets of inputs, taken in turn. cold: sweep the caches before each call and time single calls; else short
    calls are repeated within a sample. budget: seconds of timed work, from which the number of rounds follows.
    """
    clock, sweep = Clock(device), Sweep(device) if cold else None
    repeats, spent = _warm_up(variants, inputs, clock, cold)
    if rounds is None:
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(spent, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    try:
        for number, name in turns(list(variants), rounds):
            variant, data = variants[name], inputs[number % len(inputs)]
            switch(variant.switched)
            argument = variant.prepare(data) if variant.prepare else data
            if sweep:
                sweep()
            samples[name].append(clock.seconds(variant.call, argument, repeats[name]))
            del argument
    finally:
        switch(False)
    return samples


def _warm_up(
    variants: dict[str, Variant], inputs: Sequence[Any], clock: Clock, cold: bool
) -> tuple[dict[str, int], float]:
    """Calls every variant on every set of inputs; returns the repeats per sample and the seconds of one round."""
    repeats, spent = {}, 0.0
    for name, variant in variants.items():
        for data in [*inputs, inputs[0]]:
            switch(variant.switched)
            once = clock.seconds(variant.call, variant.prepare(data) if variant.prepare else data)
        single = cold or variant.prepare is not None
        repeats[name] = 1 if single else max(1, min(1000, int(HOT_SAMPLE_SECONDS / max(once, 1e-9))))
        spent += once * repeats[name]
    return repeats, spent


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": first, "q3": third, "min": min(samples), "max": max(samples)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Spread of slow / fast, round by round: what disturbs the machine for a while disturbs both."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
