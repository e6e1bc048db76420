"""Runs one case: with stock, with stock in float64, and with sentfast, each time from nothing.

A family is a function of a :class:`Draw`: it builds its models, calls them, edits them, and returns by name whatever a
user could see. It is called once per side, and builds the same thing each time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import allowed
import torch
import transformers.utils.logging
from compare import Comparison
from draw import Draw, generator_states, seed_everything

import sentfast
from sentfast import switch
from sentfast.integrations import transformers as adapter

Family = Callable[[Draw], dict[str, Any]]
LOGGERS = ("transformers", "sentence_transformers")


@dataclass
class Run:
    """What a side has left."""

    draw: Draw
    values: dict[str, Any] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    generators: dict[str, Any] = field(default_factory=dict)
    report: Any = None
    broken: str = ""  # the case itself failed


@dataclass
class Outcome:
    """What a case came to."""

    differences: list[str]
    allowed: list[str]
    drawn: dict[str, Any]
    operators: set[str]
    codes: set[str]
    compared: int
    unjudged: str
    attempted: int
    raised: int


class _Listener(logging.Handler):
    def __init__(self, heard: set[str]):
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.add(f"logged: {record.getMessage()}")


@contextlib.contextmanager
def _listening(heard: set[str]) -> Iterator[None]:
    """Warnings and what the libraries log from level WARNING on; what is printed goes nowhere."""
    transformers.utils.logging.warning_once.cache_clear()
    listener = _Listener(heard)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught, _silence():
            warnings.simplefilter("always")
            yield
        heard.update(f"{each.category.__name__}: {each.message}" for each in caught)
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _stock(draw: Draw) -> Iterator[None]:
    """Nothing of ours runs: inside `disabled`, or with every attribute restored."""
    if draw.stream("stock by").random() < 0.5:
        with sentfast.disabled():
            yield
        return
    sentfast.disable()
    try:
        assert not switch.patched(), f"disable() has left {switch.patched()}"
        yield
    finally:
        draw.unpatch()  # what others have patched is left alone, with a warning
        sentfast.enable()


@contextlib.contextmanager
def _ours(draw: Draw) -> Iterator[None]:
    try:
        yield
    finally:
        for model in list(adapter._marked):
            adapter.unmark(model)


def run(family: Family, seed: int, number: int, side: str, simple: frozenset[str]) -> Run:
    draw = Draw(seed, number, side, simple)
    made = Run(draw)
    seed_everything(seed, number)
    torch.set_num_threads(1 + draw.stream("threads").randrange(2))
    sentfast.report(reset=True)
    try:
        with _listening(made.warned), _ours(draw) if draw.ours else _stock(draw):
            made.values = family(draw)
    except Exception:
        made.broken = traceback.format_exc()
    finally:
        made.generators = generator_states()
        draw.close()
        made.report = sentfast.report()
    if not draw.ours:
        kernels = [backend for _, backend in made.report.calls if backend != "reference"]
        assert not kernels, f"an operator ran in the run of stock: {made.report}"
    return made


def check(family: Family, seed: int, number: int, simple: frozenset[str] = frozenset()) -> Outcome:
    """Runs a case on every side and compares."""
    stock, exact, ours = (run(family, seed, number, side, simple) for side in ("stock", "exact", "ours"))
    comparison = Comparison(stock.draw.coarse)
    if stock.broken:
        comparison.differ("the case is broken", stock.broken)
    elif ours.broken:
        comparison.differ("raised where stock does not", ours.broken)
    else:
        comparison(ours.values, stock.values, exact.values)
        for name in (name for name in stock.generators if ours.generators[name] != stock.generators[name]):
            comparison.differ("generator", f"the state of {name} differs from stock's afterwards")
        for text in sorted(ours.warned ^ stock.warned):
            comparison.differ("warning", f"{'only ours' if text in ours.warned else 'only stock'}: {text}")
    excused, remaining = allowed.sort(stock.draw.values, comparison.differences)
    return Outcome(
        remaining,
        excused,
        stock.draw.values,
        {name for name, _ in ours.report.calls},
        {f"{site} {code}" for site, code in ours.report.fallbacks},
        comparison.compared,
        exact.broken.strip().rpartition("\n")[2],
        stock.draw.attempted,
        stock.draw.raised,
    )


def shrink(family: Family, seed: int, number: int, names: list[str], budget: int = 40) -> frozenset[str]:
    """Replaces one draw after another by its simplest value while the case still fails in the same place."""
    simple: frozenset[str] = frozenset()
    place = places(check(family, seed, number).differences)
    for name in names[:budget]:
        fewer = simple | {name}
        found = check(family, seed, number, fewer).differences
        if places(found) & place and not any(text.startswith("the case is broken") for text in found):
            simple = fewer
    return simple


def places(differences: list[str]) -> set[str]:
    return {text.partition(":")[0].partition("[")[0] for text in differences}
