"""The processes of a multi-process pool: they import sentfast and run accelerated too.

Such a process is told what to run by name, so the name has to be one of sentfast. What it runs is
sentence-transformers' own function, with sentfast switched on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from sentfast import accelerate, restore, switch
from sentfast.accelerate import base_models
from sentfast.encoder import choice
from sentfast.integrations.versions import Version

# Of the model whose pool is being started: path of a base model -> precision, "" for one that is turned off. What
# accelerate() and restore() have noted is not pickled with a model.
_choices: ContextVar[dict[str, str] | None] = ContextVar("sentfast_pool_choices", default=None)


class Worker:
    """In place of the class or static method that a worker process runs."""

    def __init__(self, original: classmethod | staticmethod):
        self.original = original

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if not switch.is_enabled():
            return self.original.__get__(instance, owner)
        return functools.partial(run, owner or type(instance), self.original.__func__.__name__, _choices.get() or {})


def run(owner: type, name: str, choices: dict[str, str], *args: Any, **kwargs: Any) -> Any:
    """Runs the original method `name` of `owner`. In a worker process, importing this module has imported sentfast."""
    switch.enable()
    for model in args:
        if isinstance(model, nn.Module):
            _repeat(choices, model)
    method = inspect.getattr_static(owner, name)
    return getattr(method, "original", method).__get__(None, owner)(*args, **kwargs)


def _repeat(choices: dict[str, str], model: nn.Module) -> None:
    for path, precision in choices.items():
        base = model.get_submodule(path)
        if precision:
            accelerate(base, precision)
        else:
            restore(base)


@contextmanager
def choices_noted(version: Version, model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around ``start_multi_process_pool``."""
    found = {path: "" if choice.is_off(base) else choice.chosen(base) for path, base in base_models(model).items()}
    before = _choices.get()
    try:
        _choices.set({path: precision for path, precision in found.items() if precision is not None})
        yield
    finally:
        _choices.set(before)
