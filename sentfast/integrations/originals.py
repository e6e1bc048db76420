"""Whether sentence-transformers' own code still does what ours does in its place.

What it looks up while it runs is read from it at its first use and compared at each call. Code of somebody else behind
one of these names, or a small example on which the two differ, leaves the original in its place.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from sentfast import locks, weak
from sentfast.encoder import watch
from sentfast.encoder.lookups import Lookups
from sentfast.encoder.structure import unmarked

_PACKAGES = (
    *("sentence_transformers.", "torch.nn.functional.", "torch.functional."),
    *("torch.nn.modules.loss.", "torch.nn.modules.distance."),
)
_OF_EVERY_CLASS = frozenset(vars(type("", (), {})))
_lock = locks.new()


class Original:
    """Some functions of sentence-transformers, methods of `classes` among them.

    prove: from the arguments of a call, the reason code why ours may not stand for them, "" if examples say nothing.
    key: from the same, what tells calls apart that are proven by themselves; None: the first call proves for all.
    """

    def __init__(
        self,
        functions: Iterable[Any],
        classes: Iterable[type] = (),
        prove: Callable[[tuple], str] = lambda args: "",
        key: Callable[[tuple], Hashable] | None = None,
    ):
        self._functions, self._classes, self._prove, self._key = list(functions), list(classes), prove, key
        self._names: Any = None
        self._reason = ""
        self.epoch = 0  # how often the names were read
        self._proven: dict[Hashable, str] = {}
        self._looked_up: frozenset[str] = frozenset()
        self._overridden: dict[tuple[type, type], bool] = {}
        self._methods: dict[type, frozenset[str]] = {}

    def why_not(self, args: tuple = ()) -> str:
        """The reason code why the original has to run now."""
        if self._names is None or not self._names.same():
            with _lock:
                self._read(args)
        return self._reason if self._key is None else self._reason or self._by_key(self._key(args), args)

    def _by_key(self, key: Hashable, args: tuple) -> str:
        found = self._proven.get(key)
        if found is None:
            with _lock:
                found = self._proven[key] = self._prove(args)
        return found

    def overridden(self, cls: type, base: type) -> bool:
        """Whether a subclass has something of its own under a name that the code looks up."""
        if (cls, base) not in self._overridden:
            # One of a module that was loaded anew only looks like its subclass.
            related = base in cls.__mro__
            between = cls.__mro__[: cls.__mro__.index(base)] if related else ()
            differs = any(not self._looked_up.isdisjoint(vars(kind)) for kind in between)
            self._overridden[cls, base] = differs or not related
        return self._overridden[cls, base]

    def replaced(self, part: Any) -> bool:
        """Whether an object has a method of its own in place of one of its class that the code looks up."""
        cls = type(part)
        if cls not in self._methods:
            # In one step: others may add to a class meanwhile.
            spaces = [vars(kind).copy() for kind in cls.__mro__]
            found = self._looked_up & {name for space in spaces for name, x in space.items() if _is_method(x)}
            self._methods[cls] = found - _OF_EVERY_CLASS
        return not vars(part).keys().isdisjoint(self._methods[cls])

    def _read(self, args: tuple) -> None:
        found = Lookups(_PACKAGES, self._functions, self._classes)
        self._looked_up = frozenset(found.names) - _OF_EVERY_CLASS
        self._overridden, self._methods, self._proven = {}, {}, {}
        self.epoch += 1
        self._reason = "SF110" if found.foreign else "" if self._key else self._prove(args)
        self._names = watch.names(found)


def _is_method(x: Any) -> bool:
    return isinstance(x, (types.FunctionType, classmethod, staticmethod))


_by_function: weak.Table[Original] = weak.Table()


def note(function: Any, original: Original) -> None:
    """Whoever calls what stands for the function by another way asks by :func:`why_not`."""
    _by_function[function] = original


def noted(function: Any) -> bool:
    """Whether it was: what somebody else has put in place of a method may have its names, and never was."""
    return function in _by_function


def why_not(function: Any, args: tuple) -> str:
    """The reason code why the function has to run itself, if what stands for it was noted."""
    found = _by_function.get(function)
    return "" if found is None else found.why_not(args)


def intact(function: Any) -> bool:
    """A function of sentence-transformers, which may run code of ours, and nobody has changed what it gives."""
    return not _of(function).why_not()


def why_not_class(cls: Any, module: Any) -> str:
    """The reason code why the class's `forward`, and the methods that it calls, are not what they were."""
    return _of(unmarked(cls.forward), cls).why_not((module,))


def _of(function: Any, *classes: type) -> Original:
    """What was noted of a function; if nothing, it is noted now, with the classes that it is a method of."""
    found = _by_function.get(function)
    return _by_function.setdefault(function, Original([function], classes)) if found is None else found


def as_long_as_same(original: Original, attempt: Callable, leading: int = 0) -> Callable:
    """The attempt, as long as nothing speaks against it; a compiled graph cannot ask.

    leading: so many arguments come before those of the original.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return attempt(*args, **kwargs)
        return original.why_not(args[leading:]) or attempt(*args, **kwargs)

    return checked
