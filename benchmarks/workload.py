"""A row of the table of workloads, and what the rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Variant
from torch import Tensor

Inputs = dict[str, Any]
OURS, STOCK = "sentfast", "stock"


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name, table, title: its key, the table of the report that it stands in, and its words there.
        make: (device, shrink, seed) -> inputs; `shrink` divides the number of rows.
        variants: name -> variant, :data:`OURS` and :data:`STOCK` among them; built when the workload runs.
        exact: inputs -> the output in float64.
        work: inputs -> {limit: bytes or operations that cannot be avoided}; see ``limits.py``.
        targets: what the product promises. A variant's name: at least that many times faster than it; "limit": at
            least that fraction of the machine's limit; "microseconds": at most; "extra_memory": at most that many
            times the size of the output.
        cold: sweep the caches before each call.
        memory: measure the peak extra memory too.
        tiny: the `shrink` of the test suite.
        gpu: for a GPU; on the CPU it runs at the sizes of --quick alone.
    """

    name: str
    table: str
    title: str
    make: Callable[[torch.device, int, int], Inputs]
    variants: Callable[[], dict[str, Variant]]
    exact: Callable[[Inputs], Tensor | tuple[Tensor, ...]]
    work: Callable[[Inputs], dict[str, float]] = lambda inputs: {}
    targets: dict[str, float] = field(default_factory=dict)
    cold: bool = True
    memory: bool = False
    tiny: int = 128
    gpu: bool = False


def random(device: torch.device, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device)


def rows_of(rows: int, shrink: int) -> int:
    return max(2, rows // shrink)


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def in_slices(exact: Callable[[Inputs], Any], *names: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The same oracle on a few rows at a time: float64 copies of the whole input need too much memory."""

    def whole(inputs: Inputs) -> tuple[Tensor, ...]:
        first = inputs[names[0]]
        step = max(1, (1 << 22) // first[0].numel())
        parts = []
        for start in range(0, first.shape[0], step):
            part = exact({name: inputs[name][start : start + step] for name in names})
            parts.append((part,) if isinstance(part, Tensor) else part)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    return whole
