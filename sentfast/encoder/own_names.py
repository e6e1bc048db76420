"""Names of PyTorch and NumPy that our own code looks up: a replacement changes our results, and stock may never ask."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import torch

_PACKAGES = ("sentfast.encoder.", "sentfast.ops.", "sentfast.integrations.", "sentfast.search.", "sentfast.functional")
PLACES = (torch, torch.nn.functional, np)
_known: dict[int, frozenset[str]] = {}


def own_names(names_of: Callable[[types.CodeType], frozenset[str]]) -> frozenset[str]:
    """Of the modules that are loaded by now."""
    # A copy, as for every dictionary that others write to: items come as new tuples, and a collection of garbage that
    # one of these sets off runs finalisers, other threads and their imports.
    modules = [module for name, module in sys.modules.copy().items() if f"{name}.".startswith(_PACKAGES)]
    if len(modules) not in _known:
        found = frozenset(name for module in modules for code in _codes(module) for name in names_of(code))
        _known[len(modules)] = frozenset(filter(_is_function, found))
    return _known[len(modules)]


def _is_function(name: str) -> bool:
    spaces = (*map(vars, PLACES), *map(vars, torch.Tensor.__mro__))
    found = [space[name] for space in spaces if name in space]
    return not name.startswith("_") and any(callable(x) or hasattr(type(x), "__get__") for x in found)


def _codes(module: types.ModuleType) -> Iterator[types.CodeType]:
    for value in list(vars(module).values()):
        inside = list(vars(value).values()) if isinstance(value, type) else [value]
        for function in inside:
            function = getattr(function, "__func__", getattr(function, "fget", function))
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType) and f"{function.__module__}.".startswith(_PACKAGES):
                yield code
