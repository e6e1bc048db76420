"""Tables of objects that are kept alive by nobody here, and are told apart as objects, whatever their classes say."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class Table(Generic[V]):
    """As ``WeakKeyDictionary``, but never calls ``__eq__`` or ``__hash__`` of a key."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[weakref.ref, V]] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        found = self._items.get(id(key))
        return found[1] if found is not None and found[0]() is key else default

    def __setitem__(self, key: Any, value: V) -> None:
        number, items = id(key), self._items

        def ended(reference: weakref.ref) -> None:
            if number in items and items[number][0] is reference:
                del items[number]

        items[number] = weakref.ref(key, ended), value

    def setdefault(self, key: Any, value: V) -> V:
        found = self._items.get(id(key))
        if found is None or found[0]() is not key:
            self[key] = value
        return self._items[id(key)][1]

    def pop(self, key: Any, default: Any = None) -> Any:
        found = self.get(key, default)
        if key in self:
            del self._items[id(key)]
        return found

    def __contains__(self, key: Any) -> bool:
        found = self._items.get(id(key))
        return found is not None and found[0]() is key

    def __iter__(self) -> Iterator[Any]:
        return iter([key for key in (reference() for reference, _ in list(self._items.values())) if key is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))


class Set(Table[bool]):
    """As ``WeakSet``."""

    def add(self, key: Any) -> None:
        self[key] = True

    def discard(self, key: Any) -> None:
        self.pop(key)
