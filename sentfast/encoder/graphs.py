"""CUDA graphs of small batches, whose launches take longer than their work.

A graph repeats launches with the arguments that they had: pointers, sizes and the longest sequence are fixed. So there
is one for each bucket of tokens and of lengths, it reads its batch from a block that stays where it is, and the whole
block is written before each replay: an offset left over from another batch would give wrong results without a word.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sentfast import locks, private
from sentfast.encoder.device import HostBatch, batch_of, send
from sentfast.report import warn

# A batch of more tokens keeps the GPU busy for longer than its launches take (BERT-base, 100 launches of about 5 us).
MOST_TOKENS = 2048
LEAST_TOKENS = 16
# Room for sequences in a bucket. A batch of many that are shorter runs without a graph; empty ones cost a little too.
TOKENS_PER_SEQUENCE = 8
# Each holds the hidden states of its bucket.
MOST_GRAPHS = 16
# A shape is captured when it comes again: that takes as long as hundreds of replays.
_AFTER = 2


def captures(device: torch.device) -> bool:
    """Whether graphs are used: on CUDA, unless ``SENTFAST_CUDA_GRAPHS=0``."""
    return device.type == "cuda" and os.environ.get("SENTFAST_CUDA_GRAPHS") != "0"


class Capture(Protocol):
    """How launches are recorded; a test can put something in place of CUDA."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """A function that does again what `run` does, and the tensor that it then fills."""

    def turn(self) -> AbstractContextManager[None]:
        """Around writing a block, replaying and reading the output: after the turn before it, on whatever stream."""


class Shape(NamedTuple):
    """Room for tokens and sequences, and the longest sequence that the launches reckon with."""

    tokens: int
    sequences: int
    longest: int


class _Graph(NamedTuple):
    block: Tensor
    replay: Callable[[], Any]
    output: Tensor


def shape_of(tokens: int, sequences: int, longest: int) -> Shape | None:
    """The bucket of a batch, None for one that is too large."""
    if not 0 < tokens <= MOST_TOKENS:
        return None
    bucket = max(_power_of_two(tokens), LEAST_TOKENS)
    room = bucket // TOKENS_PER_SEQUENCE
    if sequences > room:
        return None
    return Shape(bucket, room, min(max(_power_of_two(longest), LEAST_TOKENS), bucket))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class Graphs:
    """The graphs of one encoder; they end with it, as its weights do."""

    def __init__(self, capture: Capture, device: torch.device, most: int = MOST_GRAPHS):
        self._capture: Capture | None = capture
        self._device, self._most = device, most
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._seen: OrderedDict[Any, int] = OrderedDict()
        self._lock = locks.new()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, forward: Callable[..., Tensor], host: HostBatch, with_types: bool, *options: Any) -> Tensor | None:
        """``forward(batch, *options)`` for each sequence of the batch, or None: it has to run without a graph."""
        shape = shape_of(host.tokens, host.sequences, host.longest)
        if shape is None or self._capture is None:
            return None
        key = (shape, with_types, *options)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._new(key, forward, with_types, shape, options)
                if graph is None:
                    return None
            self._graphs.move_to_end(key)
            with self._capture.turn():
                send(host.block(with_types, shape.tokens, shape.sequences), self._device, graph.block)
                graph.replay()
                return graph.output.narrow(0, 0, host.sequences).clone()

    def _new(
        self, key: Any, forward: Callable[..., Tensor], with_types: bool, shape: Shape, options: tuple[Any, ...]
    ) -> _Graph | None:
        if self._capture is None or not self._often(key):
            return None
        try:
            # Outside inference mode, so that the block can be written to from everywhere.
            with private.InferenceMode(False), torch.no_grad():
                block = torch.zeros(_size(with_types, shape), dtype=torch.int32, device=self._device)
                batch = batch_of(block, with_types, shape.tokens, shape.sequences, shape.longest)
                replay, output = self._capture.record(lambda: forward(batch, *options))
        except RuntimeError as error:
            warn(f"CUDA graphs are not used for this model: {error}")
            self._capture = None
            self._graphs.clear()
            return None
        graph = self._graphs[key] = _Graph(block, replay, output)
        while len(self._graphs) > self._most:
            self._graphs.popitem(last=False)
        return graph

    def _often(self, key: Any) -> bool:
        """Whether this batch is not the first of its shape; only so many shapes are counted."""
        count = self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > 4 * self._most:
            self._seen.popitem(last=False)
        return count >= _AFTER


def _size(with_types: bool, shape: Shape) -> int:
    return (3 if with_types else 2) * shape.tokens + shape.sequences + 1


class CudaCapture:
    """Records on a stream of its own; all graphs share one pool of memory, as they run one after the other."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()  # compiles kernels and makes workspaces, which a capture must not do
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those of a DataLoader, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = run()
        return graph.replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            else:
                stream.wait_event(self._done)
            yield
            self._done.record(stream)
