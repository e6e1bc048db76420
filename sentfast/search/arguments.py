"""Checks of the arguments that the search functions share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.ops import checks
from sentfast.ops import search as ops
from sentfast.search import inputs


def metric(value: Any) -> str:
    return tuple(ops.METRICS)[checks.one_of("metric", value, tuple(ops.METRICS))]


def precision(value: Any) -> str:
    return ops.PRECISIONS[checks.one_of("precision", value, ops.PRECISIONS)]


def rows(name: str, x: Any) -> Tensor:
    """Rows of a corpus: at least one."""
    found = inputs.matrix(name, x)
    if len(found) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    return found


def queries(x: Any, columns: int, device: torch.device) -> Tensor:
    found = inputs.matrix("queries", x)
    inputs.same_columns("queries", found, "the corpus", columns)
    return inputs.on_device("queries", found, x, device)


def path(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {checks.describe(value)}")
    return Path(value)


def wants_numpy(x: Any) -> bool:
    """Arrays in, arrays out."""
    return isinstance(x, np.ndarray) or (isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], np.ndarray))


def names(ids: Any, count: int, others: Sequence[Any] | None = None) -> list[Any]:
    """One name for each row, all whole numbers or all texts, as those of the other rows are."""
    found = listed("ids", ids)
    if len(found) != count:
        raise ValueError(f"ids: expected {count} (one for each row), got {len(found)}")
    kind = type(others[0]) if others else type(found[0])
    if kind not in (int, str) or any(type(name) is not kind for name in found):
        wanted = kind.__name__ if kind in (int, str) else "int or all str"
        raise TypeError(f"ids: expected all {wanted}, got {', '.join(sorted({type(x).__name__ for x in found}))}")
    return [checks.whole("ids", name, -(2**63)) for name in found] if kind is int else found


def listed(name: str, x: Any) -> list[Any]:
    """The elements of a list, a tuple, an array or a tensor that says its values."""
    if isinstance(x, Tensor):
        checks.dense(name, x)
        if x.device.type == "meta" or x.is_quantized:
            raise TypeError(f"{name}: expected a tensor with plain values, got {checks.describe(x)}")
    if isinstance(x, (Tensor, np.ndarray)) and x.ndim > 0:
        return x.tolist()
    if isinstance(x, (str, bytes, dict, type)) or not hasattr(x, "__len__") or not hasattr(x, "__iter__"):
        raise TypeError(f"{name}: expected a sequence, got {checks.describe(x)}")
    if isinstance(x, (Tensor, np.ndarray)):
        raise ValueError(f"{name}: expected a sequence, got a single value")
    return list(x)


def ceiling(value: Any, count: int, device: torch.device) -> Tensor | None:
    """The highest score that is let in: a number or one for each query."""
    if value is None:
        return None
    if isinstance(value, (int, float, str)):
        return torch.full((count,), checks.number("ceiling", value), dtype=torch.float32, device=device)
    values = [checks.number("ceiling", x) for x in listed("ceiling", value)]
    if len(values) != count:
        raise ValueError(f"ceiling: expected a number or {count} of them, got {len(values)}")
    return torch.tensor(values, dtype=torch.float32, device=device)


def excluded(
    exclude: Any, exclude_self: bool, count: int, corpus: int, device: torch.device, name: str = "exclude"
) -> tuple[Tensor, Tensor] | None:
    """Rows that are left out per query, as offsets [Q + 1] and rising ids."""
    checks.flag("exclude_self", exclude_self)
    if exclude is None and not exclude_self:
        return None
    lists = [[] for _ in range(count)] if exclude is None else _lists(name, exclude, count)
    if exclude_self:
        if count > corpus:
            raise ValueError(f"exclude_self: expected at most the {corpus} rows of the corpus as queries, got {count}")
        if exclude is None:
            return torch.arange(count + 1, device=device), torch.arange(count, device=device)
        lists = [[*row, number] for number, row in enumerate(lists)]
    lists = [sorted(set(row)) for row in lists]
    lengths = torch.tensor([0, *map(len, lists)], device=device)
    ids = torch.tensor([index for row in lists for index in row], dtype=torch.int64, device=device)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= corpus):
        raise ValueError(f"{name}: expected rows 0 to {corpus - 1}, got {int(ids.min())} to {int(ids.max())}")
    return lengths.cumsum(0), ids


def _lists(name: str, rows: Any, count: int) -> list[list[int]]:
    found = listed(name, rows)
    if len(found) != count:
        raise ValueError(f"{name}: expected one entry for each of the {count} queries, got {len(found)}")
    return [
        [checks.whole(name, i, -(2**63)) for i in ([x] if isinstance(x, (int, float, np.number)) else listed(name, x))]
        for x in found
    ]
