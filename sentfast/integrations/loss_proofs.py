"""Small examples for the losses, with the settings of the loss that is called, but no model: embeddings are given.

Nothing of the loss itself is changed: examples hold copies of it. Other processes are not asked for their embeddings.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from sentfast import weak
from sentfast.integrations import matryoshka
from sentfast.integrations.versions import Version

# Prefixes of the rows of an example, and their weights.
_DIMS, _WEIGHTS = (8, 4, 2), (1.0, 0.5, 0.25)
# So far from a guide's limit that no rounding decides which candidates are left out of the examples.
_MARGIN = 0.0625
_PLAIN = (str, bool, int, float, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
Rows = Callable[[float], Tensor]


def settings(args: tuple) -> tuple[Any, ...]:
    """What tells calls apart that have to be proven by themselves: the settings of a loss and of the losses inside."""
    return _settings(_method_of(args[0]) or args[0])


class _Settings:
    """Those of one loss, and of the loss inside it, read once and compared at each call.

    Nothing is kept that may lead back to the loss, such as its dictionary: a table of weak keys holds this.
    """

    def __init__(self, loss: Any):
        space = vars(loss).copy()
        kept = [name for name, value in space.items() if _leads_nowhere(value)]
        tables = {name for name, value in space.items() if name in _OF_EVERY_MODULE and isinstance(value, dict)}
        others = [name for name in space if name not in kept and name not in tables]
        self._cls, self._size = type(loss), len(space)
        self._values, self._others = _getter(kept), _getter(others)
        self._before, self._kinds = self._values(space), list(map(_kind, self._others(space)))
        self._own = (type(loss), *_settings_of(space))
        self._inner: Any = None
        self._key = self._own

    def same(self, loss: Any) -> bool:
        space = vars(loss)
        if type(loss) is not self._cls or len(space) != self._size:
            return False
        try:
            return self._values(space) == self._before and list(map(_kind, self._others(space))) == self._kinds
        except KeyError:
            return False

    def with_inner(self, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._inner is not inner:
            self._inner, self._key = inner, (*self._own, *inner)
        return self._key


_known: weak.Table[_Settings] = weak.Table()


def _settings(loss: Any) -> tuple[Any, ...]:
    known = _known.get(loss)
    if known is None or not known.same(loss):
        known = _known[loss] = _Settings(loss)
    inner = (vars(loss).get("_modules") or {}).get("loss")
    return known.with_inner(_settings(inner) if isinstance(inner, nn.Module) else ())


def _settings_of(space: dict[str, Any]) -> Iterator[Any]:
    for name, value in space.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value > 0  # larger or smaller takes no other way
        elif _plain(value):
            yield name, value
        elif callable(value):
            yield name, _kind(value)


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(x, _PLAIN) for x in value))


def _leads_nowhere(value: Any) -> bool:
    """A plain value, or a function or class that belongs to nobody."""
    function = isinstance(value, types.FunctionType) and value.__closure__ is None
    return function or _plain(value) or isinstance(value, type)


def _kind(value: Any) -> Any:
    return getattr(value, "__qualname__", type(value)) if callable(value) else type(value)


def _getter(names: list[str]) -> Callable[[dict], tuple]:
    return operator.itemgetter(*names) if len(names) > 1 else lambda space: tuple(space[name] for name in names)


def _method_of(decorator: Any) -> Any:
    """The loss whose step a decorator of Matryoshka runs."""
    return getattr(vars(decorator).get("fn"), "__self__", None)


class _Given(nn.Module):
    """In place of a model: hands out embeddings that the features have."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def forward(self, features: dict, **kwargs: Any) -> dict:
        return {"sentence_embedding": features[self._name]}

    def get_embedding_dimension(self) -> int:
        return _DIMS[0]

    get_sentence_embedding_dimension = get_embedding_dimension


def _copy(loss: Any) -> Any:
    """The loss without its model, to itself: no gathering, no bar, mini-batches that an example has several of."""
    copied = copy.copy(loss)
    space = vars(copied)
    space["_modules"] = dict(space["_modules"])
    for name, value in (("gather_across_devices", False), ("show_progress_bar", False), ("mini_batch_size", 2)):
        if name in space:
            space[name] = value
    if "must_retokenize" in space:
        space.update(must_retokenize=False, margin=_MARGIN)
    given = _Given("embedding"), _Given("guided")
    for name, model in zip(("model", "guide"), given, strict=True):
        # Another callable than a module is a plain attribute.
        for place in (space["_modules"], space):
            if name in place:
                place[name] = model
    inner = space["_modules"].get("loss")
    if isinstance(inner, nn.Module):
        space["_modules"]["loss"] = inner = _copy(inner)
        if "model" in vars(inner)["_modules"] and "model" in space["_modules"]:
            vars(inner)["_modules"]["model"] = space["_modules"]["model"]
    return copied


def ranking(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    """Embeddings of three columns."""
    yield _copy(args[0]), _columns(rows), None


def cached(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    """The same in mini-batches."""
    yield _copy(args[0]), _batches(_columns(rows))


def cached_guided(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    yield _copy(args[0]), _batches(_columns(rows)), _batches(_guided(rows))


def guided(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    yield _copy(args[0]), _features(rows), None


def matryoshka_loss(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    """Only over a loss that runs in one call: no other may be called on the way."""
    if getattr(args[0], "uses_gradient_cache", False) or not matryoshka.takes(version, args[0]):
        return
    copied = _copy(args[0])
    vars(copied).update(matryoshka_dims=_DIMS, matryoshka_weights=_WEIGHTS, n_dims_per_step=-1)
    yield copied, _features(rows), None


def cached_matryoshka_loss(rows: Rows, version: Version, args: tuple) -> Iterator[tuple]:
    step, loss = getattr(args[0].fn, "__func__", None), getattr(args[0].fn, "__self__", None)
    if step is None or not matryoshka.takes_step(version, step, loss):
        return
    copied = copy.copy(args[0])
    copied.fn = types.MethodType(step, _copy(loss))
    vars(copied).update(matryoshka_dims=_DIMS, matryoshka_weights=_WEIGHTS, n_dims_per_step=-1)
    batches = [_batches(_columns(rows))]
    yield copied, *batches, *([_batches(_guided(rows))] if hasattr(copied.fn.__self__, "guide") else [])


def _columns(rows: Rows) -> list[Tensor]:
    return [rows(step) for step in (0.37, 0.11, 0.23)]


def _guided(rows: Rows) -> list[Tensor]:
    return [rows(step) for step in (0.29, 0.41, 0.17)]


def _batches(columns: list[Tensor]) -> list[list[Tensor]]:
    return [list(column.split(2)) for column in columns]


def _features(rows: Rows) -> list[dict[str, Tensor]]:
    pairs = zip(_columns(rows), _guided(rows), strict=True)
    return [{"embedding": x, "guided": y} for x, y in pairs]
