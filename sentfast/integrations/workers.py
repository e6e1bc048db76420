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

from sentfast import switch
from sentfast.integrations.versions import Version

# What accelerate() or restore() has asked for the model whose pool is being started: it is not pickled with the model.
_settings: ContextVar[Any] = ContextVar("sentfast_pool_settings", default=None)


class Worker:
    """In place of the class or static method that a worker process runs."""

    def __init__(self, original: classmethod | staticmethod):
        self.original = original

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if not switch.is_enabled():
            return self.original.__get__(instance, owner)
        name = self.original.__func__.__name__
        return functools.partial(run, owner or type(instance), name, _settings.get())


def run(owner: type, name: str, settings: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the original method `name` of `owner`; in a worker process this module's import has switched sentfast on."""
    switch.enable()
    method = inspect.getattr_static(owner, name)
    return getattr(method, "original", method).__get__(None, owner)(*args, **kwargs)


@contextmanager
def settings_noted(version: Version, model: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around `start_multi_process_pool`."""
    token = _settings.set(None)
    try:
        yield
    finally:
        _settings.reset(token)
