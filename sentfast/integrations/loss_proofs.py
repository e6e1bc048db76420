"""Small examples for the losses, with the settings of the loss that is called, but no model: embeddings are given.

Nothing of the loss itself is changed: examples hold copies of it. Other processes are not asked for their embeddings.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from sentfast.integrations import matryoshka
from sentfast.integrations.versions import Version

# Prefixes of the rows of an example, and their weights.
_DIMS, _WEIGHTS = (8, 4, 2), (1.0, 0.5, 0.25)
# So far from a guide's limit that no rounding decides which candidates are left out of the examples.
_MARGIN = 0.0625
_PLAIN = (str, bool, int, float, type(None))
Rows = Callable[[float], Tensor]


def settings(args: tuple) -> tuple[Any, ...]:
    """What tells calls apart that have to be proven by themselves: the settings of a loss and of the losses inside."""
    return tuple(_settings(args[0]))


def _settings(loss: Any) -> Iterator[Any]:
    loss = _method_of(loss) or loss
    yield type(loss)
    for name, value in vars(loss).copy().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value > 0  # larger or smaller takes no other way
        elif isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(x, _PLAIN) for x in value)):
            yield name, value
        elif callable(value):
            yield name, getattr(value, "__qualname__", type(value))
    inner = (getattr(loss, "_modules", None) or {}).get("loss")
    if isinstance(inner, nn.Module):
        yield from _settings(inner)


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
