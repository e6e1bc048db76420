"""Where the embeddings of one call of `encode` go: one tensor in the order of the texts, on the CPU or on the GPU.

Batches come in another order, window by window. On a GPU nothing waits for a batch: a result that is wanted on the CPU
is fetched by windows, each while the next one is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentfast.encoder import device as devices


class Output:
    """On the CPU: batches are written to their rows."""

    def __init__(self, count: int):
        self._count, self._start = count, 0
        self._out: Tensor | None = None

    def open(self, start: int, count: int) -> None:
        """What is put from now on belongs to the `count` texts from number `start` on."""
        self._start = start

    def put(self, rows: np.ndarray, x: Tensor) -> None:
        """x: the embeddings of the window's texts with the numbers `rows`."""
        self._all(x)[torch.from_numpy(rows + self._start)] = x

    def result(self) -> Tensor:
        assert self._out is not None
        return self._out

    def _all(self, like: Tensor) -> Tensor:
        if self._out is None:
            self._out = like.new_empty(self._count, like.shape[1])
        return self._out


class OnDevice(Output):
    """On the GPU; the numbers of the rows are sent there without waiting."""

    def put(self, rows: np.ndarray, x: Tensor) -> None:
        self._all(x).index_copy_(0, _sent(rows + self._start, x), x)


class _Window(NamedTuple):
    """A window on its way to the CPU."""

    start: int
    staged: Tensor
    arrived: torch.cuda.Event | None


class Fetched(Output):
    """From the GPU to the CPU."""

    def __init__(self, count: int):
        super().__init__(count)
        self._size = 0
        self._part: Tensor | None = None
        self._under_way: _Window | None = None

    def open(self, start: int, count: int) -> None:
        self._fetch()
        self._start, self._size = start, count

    def put(self, rows: np.ndarray, x: Tensor) -> None:
        if self._part is None:
            self._part = x.new_empty(self._size, x.shape[1])
        self._part.index_copy_(0, _sent(rows, x), x)

    def result(self) -> Tensor:
        self._fetch()
        self._arrive()
        return super().result()

    def _fetch(self) -> None:
        """Starts the copy of the window that is complete, then takes in the one before it."""
        if self._part is None:
            return
        part, self._part = self._part, None
        staged = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=devices.pinned(part.device))
        staged.copy_(part, non_blocking=True)
        arrived = None
        if part.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(part.device))
        window = _Window(self._start, staged, arrived)
        self._arrive()
        self._under_way = window

    def _arrive(self) -> None:
        if self._under_way is None:
            return
        start, staged, arrived = self._under_way
        if arrived is not None:
            arrived.synchronize()
        self._all(staged)[start : start + staged.shape[0]] = staged
        self._under_way = None


def _sent(rows: np.ndarray, x: Tensor) -> Tensor:
    return devices.send(rows, x.device).long()


def output_of(device: torch.device, on_cpu: bool, count: int) -> Output:
    """on_cpu: the result is wanted there, wherever the model is."""
    if not devices.composed(device):
        return Output(count)
    return Fetched(count) if on_cpu else OnDevice(count)
