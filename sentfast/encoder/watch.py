"""What decides a model's result outside its call, compared with what it was: names, places of tensors, bytes.

The compiled library does it in its own loops (``csrc/watch.cpp``); without it the same is done here.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sentfast import native

_MISSING = object()


def dictionary(space: Any) -> dict:
    """That of a class itself, which only shows a view of it."""
    return gc.get_referents(space)[0] if isinstance(space, types.MappingProxyType) else space


def names(lookups: Any) -> Any:
    """Compares everything that :class:`~sentfast.encoder.lookups.Lookups` has found."""
    made = getattr(native.state.cpu, "Names", _Names)
    return made(lookups.tables, lookups.lists, lookups.sets, lookups.functions, lookups.cells)


def modes(tables: Sequence[tuple[dict, Any, tuple[str, ...], Any]]) -> Any:
    """Compares some keys of dictionaries; see ``Names``."""
    return getattr(native.state.cpu, "Names", _Names)(tables, [], [], [], [])


class Places:
    """Of tensors: address, sizes, strides and dtype."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = tensors
        made = getattr(native.state.cpu, "Places", None)
        self._compiled = None if made is None else made(list(tensors))
        self._places = self._now() if made is None else []

    def same(self) -> bool:
        return self._now() == self._places if self._compiled is None else self._compiled.same()

    def _now(self) -> list[tuple[Any, ...]]:
        return [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in self._tensors]


def bytes_of(tensors: Sequence[Tensor]) -> Any:
    """Compares every byte of contiguous tensors on the CPU; who asks keeps them alive."""
    made = getattr(native.state.cpu, "Bytes", _Bytes)
    return made([x.data_ptr() for x in tensors], [x.numel() * x.element_size() for x in tensors])


class _Names:
    """As the compiled class: a method counts as its function and its object, numbers and texts as equal by value."""

    def __init__(self, tables: Any, lists: Any, sets: Any, functions: Any, cells: Any):
        self._tables, self._lists, self._sets, self._functions, self._cells = tables, lists, sets, functions, cells
        self.renew()

    def renew(self) -> None:
        self._before = self._now()

    def same(self) -> bool:
        return all(_alike(now, before) for now, before in zip(self._now(), self._before, strict=True))

    def _now(self) -> list[Any]:
        found: list[Any] = []
        for space, owner, keys, barred in self._tables:
            values = [space.get(key, _MISSING) for key in keys]
            found += [x for value in values for x in _parts(value)]
            found += [len(space) if barred is True else len(barred.intersection(space))] if barred is not None else []
            found += [type(owner), vars(owner) is space] if owner is not None else []
        found += [x for f in self._functions for x in (f.__code__, f.__defaults__, f.__kwdefaults__)]
        found += [cell.cell_contents for cell in self._cells]
        return found + [hash(frozenset(found)) for found in self._sets] + list(map(tuple, self._lists))


def _parts(value: Any) -> tuple[Any, ...]:
    return (value.__func__, value.__self__) if isinstance(value, types.MethodType) else (value,)


def _alike(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if type(now) is tuple:
        return len(now) == len(before) and all(map(_alike, now, before))
    return type(now) in (int, float, str) and now == before


class _Bytes:
    def __init__(self, pointers: list[int], sizes: list[int]):
        self._pieces: list[tuple[int, int]] = []
        self._before: list[bytes] = []
        for pointer, size in zip(pointers, sizes, strict=True):
            self.add(pointer, size, pointer)

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, pointer: int, size: int, snapshot: int) -> None:
        """Memory that has to hold what `snapshot` holds now."""
        self._pieces.append((pointer, size))
        self._before.append(self._hash((snapshot, size)))

    def same(self, share: float) -> bool:
        return list(map(self._hash, self._pieces)) == self._before

    @staticmethod
    def _hash(piece: tuple[int, int]) -> bytes:
        return hashlib.blake2b(ctypes.string_at(*piece)).digest()
