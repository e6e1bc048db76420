"""Checks of the arguments that the search functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.ops import search as ops
from sentfast.search import inputs


def metric(value: Any) -> str:
    if value not in ops.METRICS:
        raise ValueError(f"metric: expected one of {tuple(ops.METRICS)}, got {value!r}")
    return value


def precision(value: Any) -> str:
    if value not in ops.PRECISIONS:
        raise ValueError(f"precision: expected one of {ops.PRECISIONS}, got {value!r}")
    return value


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


def wants_numpy(x: Any) -> bool:
    """Arrays in, arrays out."""
    return isinstance(x, np.ndarray) or (isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], np.ndarray))


def names(ids: Any, count: int, others: Sequence[Any] | None = None) -> list[Any]:
    """One name for each row, all whole numbers or all texts, as those of the other rows are."""
    found = ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else list(ids)
    if len(found) != count:
        raise ValueError(f"ids: expected {count} (one for each row), got {len(found)}")
    kind = type(others[0]) if others else type(found[0])
    if kind not in (int, str) or any(type(name) is not kind for name in found):
        wanted = kind.__name__ if kind in (int, str) else "int or all str"
        raise TypeError(f"ids: expected all {wanted}, got {', '.join(sorted({type(x).__name__ for x in found}))}")
    return found


def ceiling(value: Any, count: int, device: torch.device) -> Tensor | None:
    """The highest score that is let in: a number or one for each query."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return torch.full((count,), inputs.number("ceiling", value), device=device)
    found = torch.as_tensor(value, dtype=torch.float32, device=device)
    if found.shape != (count,):
        raise ValueError(f"ceiling: expected a number or shape [{count}], got shape {list(found.shape)}")
    return found


def excluded(
    exclude: Any, exclude_self: bool, count: int, corpus: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Rows that are left out per query, as offsets [Q + 1] and rising ids."""
    if exclude is None and not exclude_self:
        return None
    lists = [[] for _ in range(count)] if exclude is None else _lists(exclude, count)
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
        raise ValueError(f"exclude: expected rows 0 to {corpus - 1}, got {int(ids.min())} to {int(ids.max())}")
    return lengths.cumsum(0), ids


def _lists(exclude: Any, count: int) -> list[list[int]]:
    if isinstance(exclude, (Tensor, np.ndarray)):
        exclude = exclude.tolist()
    if len(exclude) != count:
        raise ValueError(f"exclude: expected one entry for each of the {count} queries, got {len(exclude)}")
    return [[int(x)] if isinstance(x, (int, np.integer)) else [int(i) for i in x] for x in exclude]
