"""Arrays, tensors and lists become float32 matrices, exactly or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.ops import checks

HALF = (torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda")


def matrix(name: str, x: Any) -> Tensor:
    """x as float32 [N, D]; a view where it is one already. One vector counts as a matrix of one row."""
    rows = _tensor(name, x)
    checks.dense(name, rows)
    if rows.device.type not in DEVICES:
        raise ValueError(f"{name}: expected rows on a device of {DEVICES}, got a tensor on {rows.device}")
    if rows.dtype in HALF:
        rows = rows.float()
    if rows.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {rows.dtype}; convert it to float32 first")
    if rows.ndim == 1:
        rows = rows.unsqueeze(0)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, columns], got {list(rows.shape)}")
    return rows.detach()


def _tensor(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray):
        return _view(name, x)
    if isinstance(x, (list, tuple)):
        try:
            if len(x) and all(isinstance(row, Tensor) for row in x):
                return torch.stack(list(x))
            if len(x) and all(isinstance(row, np.ndarray) for row in x):
                return _view(name, np.stack(x))
            return torch.tensor(x, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected rows of one length made of numbers; {error}") from error
    raise TypeError(f"{name}: expected a tensor, an array or a list of rows, got {type(x).__name__}")


def _view(name: str, x: np.ndarray) -> Tensor:
    """Without a copy, except where PyTorch cannot look at the array as it lies."""
    if x.dtype.byteorder not in ("=", "|") or any(stride < 0 for stride in x.strides):
        x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    try:
        # The rows are only read, but PyTorch has no tensor that cannot be written and warns of it.
        return torch.from_numpy(x if x.flags.writeable else np.asarray(_Writable(x)))
    except TypeError as error:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}") from error


class _Writable:
    """A read-only array's memory, as numpy sees a writable one. It keeps the array alive."""

    def __init__(self, x: np.ndarray):
        self.array = x
        self.__array_interface__ = {**x.__array_interface__, "data": (x.__array_interface__["data"][0], False)}


def on_device(name: str, rows: Tensor, given: Any, device: torch.device) -> Tensor:
    """The rows made of `given`, on the device of the corpus: arrays and lists go there, tensors have to be there."""
    if isinstance(given, Tensor) and rows.device != device:
        raise ValueError(f"{name}: expected the device of the corpus ({device}), got a tensor on {rows.device}")
    return rows.to(device)


def same_columns(name: str, x: Tensor, other_name: str, columns: int) -> None:
    if x.shape[1] != columns:
        raise ValueError(f"{name}: expected the {columns} columns of {other_name}, got {x.shape[1]}")
