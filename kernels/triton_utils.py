"""What the Triton kernels share: rows of tensors with any strides, tile sizes, the device to launch on."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BATCH_DIMS = 3
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 2048
_BLOCKS_PER_SM = 4
_MULTIPROCESSORS = 132  # where there is no GPU to ask


if INTERPRETED:
    # Triton's interpreter hands `range` arrays of one element, which NumPy 2.4 no longer takes for numbers.
    def loop_bound(value: Any) -> int:
        return value.handle.data.item() if isinstance(value, tl.tensor) else int(value)
else:

    @triton.jit
    def loop_bound(value):
        return value


@triton.jit
def batch_offset(index, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of element `index` (int64) of a three-dimensional batch."""
    return index // (size_1 * size_2) * stride_0 + index // size_2 % size_1 * stride_1 + index % size_2 * stride_2


@triton.jit
def grouped_tile(index, tiles_n, tiles_m, GROUP: tl.constexpr):
    """Row and column of tile `index`: neighbours share a few blocks of rows and columns, which stay in the L2 cache."""
    first_n = index // (GROUP * tiles_m) * GROUP
    height = tl.minimum(tiles_n - first_n, GROUP)
    return first_n + index % (GROUP * tiles_m) % height, index % (GROUP * tiles_m) // height


def _merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Joins neighbouring dimensions that every tensor steps through evenly, and drops those of size 1."""
    kept_sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        if kept_sizes and all(last[-1] == stride[dim] * size for last, stride in zip(kept, strides, strict=True)):
            kept_sizes[-1] *= size
            for last, stride in zip(kept, strides, strict=True):
                last[-1] = stride[dim]
        else:
            kept_sizes.append(size)
            for last, stride in zip(kept, strides, strict=True):
                last.append(stride[dim])
    return kept_sizes, kept


def merge_batch(tensors: Sequence[Tensor], dims: int) -> tuple[list[Tensor], list[int], list[list[int]]]:
    """Describes the first `dims` dimensions, which the tensors share, as BATCH_DIMS of them.

    Returns the tensors, the sizes of the inner batch dimensions (BATCH_DIMS - 1) and per tensor BATCH_DIMS strides.
    The tensors are the same ones, not copies, unless more than BATCH_DIMS dimensions cannot be joined.
    """
    sizes, strides = _merged(tensors[0].shape[:dims], [x.stride()[:dims] for x in tensors])
    if len(sizes) > BATCH_DIMS:
        tensors = [x.contiguous() for x in tensors]
        sizes, strides = _merged(tensors[0].shape[:dims], [x.stride()[:dims] for x in tensors])
    missing = BATCH_DIMS - len(sizes)
    # Sizes of 1 come last: Triton compiles them away, so one dimension costs no division.
    inner = (sizes + [1] * missing)[1:] if sizes else [1] * (BATCH_DIMS - 1)
    return list(tensors), inner, [stride + [0] * missing for stride in strides]


def row_tile(columns: int) -> dict[str, int]:
    """Rows and columns that one program of a row-wise kernel holds at a time."""
    block = min(max(triton.next_power_of_2(columns), 16), 1024)
    return {"ROWS": _TILE // block, "BLOCK_D": block, "num_warps": 4}


def elementwise_tile(columns: int) -> dict[str, int]:
    """Rows and columns that one program of an elementwise kernel holds, at most 512 columns: few of them are past 384,
    768, 1536 or 3072."""
    block = min(max(triton.next_power_of_2(columns), 64), 512)
    return {"ROWS": _TILE // block, "BLOCK_D": block, "num_warps": 4}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_of_rows(x: Tensor, blocks: int, across: int = 1) -> int:
    """How many programs share `blocks` blocks of rows where each keeps sums of its own: as many as run at a time.

    across: programs side by side.
    """
    multiprocessors = _multiprocessors(x.device) if x.is_cuda else _MULTIPROCESSORS
    return min(blocks, max(1, multiprocessors * _BLOCKS_PER_SM // across))


def tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if setting is None else setting == "tf32"


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
