"""Packed batches on a GPU: made on the host and sent in one copy, or picked from a padded batch that is there already.

Lengths stay on the host, so that nothing here waits for the GPU, but for the mask of a padded batch: once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentfast.encoder import lengths as remembered
from sentfast.encoder.tables import Tables
from sentfast.integrations import guards

# Of the devices on which the encoder runs as steps of our operators instead of as one kernel.
_COMPOSED = {"cuda"}
_INTEGERS = (torch.int64, torch.int32)
# Each piece of a block starts at 16 bytes, on which Triton's kernels depend for wide loads.
_ALIGNED = 4


def composed(device: torch.device) -> bool:
    """Whether the encoder runs as steps on this device."""
    return device.type in _COMPOSED


def pinned(device: torch.device) -> bool:
    """Whether host memory for a copy to or from the device should be page-locked: only then the copy runs by itself."""
    return device.type == "cuda"


def send(values: np.ndarray, device: torch.device, to: Tensor | None = None) -> Tensor:
    """The int32 values on the device, or in the tensor there; what is launched next finds them, and nobody waits."""
    host = torch.empty(len(values), dtype=torch.int32, device="cpu", pin_memory=pinned(device))
    host.numpy()[:] = values
    return host.to(device, non_blocking=True) if to is None else to.copy_(host, non_blocking=True)


class DeviceBatch(NamedTuple):
    """What the layers are told.

    Attributes:
        input_ids, position_ids: integers [T] on the device; token_type_ids likewise, None: all 0.
        cu_seqlens: int32 [B + 1] on the device.
        longest: length of the longest sequence, or more.
        rows: int64 [T], places of the tokens in the padded batch; None if it has no padding, or there was none.
        shape: (B, L) of the padded batch.
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor
    cu_seqlens: Tensor
    longest: int
    rows: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def pad(self, x: Tensor) -> Tensor:
        """[T, H] -> [B, L, H] with zeros after each sequence; differentiable."""
        batch, length = self.shape
        if self.rows is None:
            return x.view(batch, length, -1)
        padded = x.new_zeros(batch * length, x.shape[1])
        return padded.index_copy_(0, self.rows, x).view(batch, length, -1)


class HostBatch(NamedTuple):
    """Packed sequences on the host, as int32 arrays."""

    ids: np.ndarray
    types: np.ndarray | None
    positions: np.ndarray
    ends: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def sequences(self) -> int:
        return len(self.ends) - 1

    @property
    def longest(self) -> int:
        return int(np.diff(self.ends).max(initial=0))

    def block(self, with_types: bool, tokens: int, sequences: int) -> np.ndarray:
        """All of it in one array, for a batch of up to so many tokens and sequences.

        The tokens too many belong to no sequence, and the sequences too many are empty: their offsets repeat the last.
        """
        step = _aligned(tokens)
        block = np.zeros((3 if with_types else 2) * step + sequences + 1, np.int32)
        block[: self.tokens] = self.ids
        block[step : step + self.tokens] = self.positions
        if with_types and self.types is not None:
            block[2 * step : 2 * step + self.tokens] = self.types
        ends = block[-sequences - 1 :]
        ends[: len(self.ends)] = self.ends
        ends[len(self.ends) :] = self.ends[-1]
        return block


def batch_of(block: Tensor, with_types: bool, tokens: int, sequences: int, longest: int) -> DeviceBatch:
    """The pieces of a block that :meth:`HostBatch.block` has laid out."""
    step = _aligned(tokens)
    ids, positions = block.narrow(0, 0, tokens), block.narrow(0, step, tokens)
    types = block.narrow(0, 2 * step, tokens) if with_types else None
    return DeviceBatch(ids, types, positions, block.narrow(0, block.shape[0] - sequences - 1, sequences + 1), longest)


def _aligned(count: int) -> int:
    # At least one step: a piece of no tokens is still a piece.
    return max(-(-count // _ALIGNED), 1) * _ALIGNED


def pack_on_device(
    tables: Tables,
    device: torch.device,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
) -> DeviceBatch | str:
    """As ``pack_padded``, of tensors on `device`. Ids are not compared with the tables: as in PyTorch, the GPU does."""
    inputs = [input_ids, token_type_ids if tables.token_types else None, position_ids]
    reason = _why_not(input_ids, device) or ("SF107" if input_ids.ndim != 2 or input_ids.numel() == 0 else "")
    for x in inputs[1:]:
        reason = reason or _why_not_beside(x, input_ids)
    if reason:
        return reason
    batch, length = input_ids.shape
    lengths = np.full(batch, length) if attention_mask is None else _lengths(attention_mask, input_ids)
    if isinstance(lengths, str):
        return lengths
    if int(lengths.max()) > tables.max_length:
        return "SF126"
    ids, types, positions = (None if x is None else x.expand(batch, length).reshape(-1) for x in inputs)
    if positions is None and tables.padding_idx is not None:
        positions = _count(input_ids, tables.padding_idx).reshape(-1)
    cu_seqlens, rows, places = _places(lengths, length, device)
    if rows is not None:
        ids, types, positions = (None if x is None else x.index_select(0, rows) for x in (ids, types, positions))
    if positions is None:
        positions = places + tables.position_offset if tables.position_offset else places
    assert ids is not None
    return DeviceBatch(ids, types, positions, cu_seqlens, int(lengths.max()), rows, (batch, length))


def _places(lengths: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """In one copy: offsets of the sequences, place of each token in the padded batch and within its sequence."""
    batch, total = len(lengths), int(lengths.sum())
    ends = np.zeros(batch + 1, np.int64)
    lengths.cumsum(out=ends[1:])
    place = np.arange(total) - np.repeat(ends[:-1], lengths)
    row = place + np.repeat(length * np.arange(batch), lengths)
    step, padded = _aligned(total), total < batch * length
    block = np.zeros((1 + padded) * step + batch + 1, np.int32)
    block[:total], block[-batch - 1 :] = place, ends
    if padded:
        block[step : step + total] = row
    sent = send(block, device)
    rows = sent.narrow(0, step, total).long() if padded else None
    return sent.narrow(0, len(block) - batch - 1, batch + 1), rows, sent.narrow(0, 0, total)


def _count(input_ids: Tensor, padding_idx: int) -> Tensor:
    """Positions that do not count padding tokens, as the models with such a token make them."""
    counts = input_ids.ne(padding_idx).int()
    return counts.cumsum(1).mul(counts) + padding_idx


def _why_not(x: Any, device: torch.device) -> str:
    if type(x) not in guards.PLAIN or x.layout != torch.strided or x.dtype not in _INTEGERS:
        return "SF107"
    return "" if x.device == device else "SF103"


def _why_not_beside(x: Any, input_ids: Tensor) -> str:
    if x is None:
        return ""
    batch, length = input_ids.shape
    return _why_not(x, input_ids.device) or ("" if x.shape in ((batch, length), (1, length)) else "SF107")


def _lengths(mask: Any, input_ids: Tensor) -> np.ndarray | str:
    """Tokens per row; left padding, holes, empty rows and weights other than 0 and 1 are for the original."""
    if type(mask) not in guards.PLAIN or mask.layout != torch.strided or mask.shape != input_ids.shape:
        return "SF104"
    if mask.device != input_ids.device:
        return "SF103"
    if mask.is_complex():
        return "SF104"
    found = remembered.recall(mask)
    if found is None:
        counts = mask.ne(0).sum(1)
        prefix = torch.arange(mask.shape[1], device=mask.device) < counts.unsqueeze(1)
        odd = mask.ne(prefix).any().view(1)
        # The one place where the host waits for the GPU.
        found = torch.cat([counts, odd.long()]).cpu().numpy()
        if found[-1]:
            return "SF104"
        found = found[:-1]
    return found if found.min() > 0 else "SF104"
