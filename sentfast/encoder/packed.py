"""From a padded batch to packed sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sentfast.encoder.tables import Tables
from sentfast.integrations import guards

_INTEGERS = (torch.int64, torch.int32)


class Packed(NamedTuple):
    """The first arguments of ``Encoder.run``, checked against the tables; `length` of the padded batch."""

    input_ids: Tensor
    cu_seqlens: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    length: int

    @property
    def padded(self) -> bool:
        """Whether the batch has rows that the mask hides."""
        return self.input_ids.shape[0] < (self.cu_seqlens.shape[0] - 1) * self.length

    def pad(self, x: Tensor) -> Tensor:
        """[T, H] -> [B, length, H] with zeros after each sequence; differentiable."""
        batch, total, hidden = self.cu_seqlens.shape[0] - 1, *x.shape
        if not self.padded:
            return x.view(batch, self.length, hidden)
        ends = self.cu_seqlens.numpy()
        skipped = self.length * np.arange(batch) - ends[:-1]
        rows = torch.from_numpy(np.arange(total) + np.repeat(skipped, np.diff(ends)))
        return x.new_zeros(batch * self.length, hidden).index_copy(0, rows, x).view(batch, self.length, hidden)


def pack_padded(
    tables: Tables,
    input_ids: Any,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
) -> Packed | str:
    """The tokens that the mask leaves, or the reason code of a batch for the original code.

    Args:
        input_ids: [B, L] integers on the CPU; an id outside the vocabulary is left to the original code's error.
        attention_mask: [B, L], 1 for the first tokens of each row and 0 for the rest; None: no padding.
        token_type_ids, position_ids: [B, L] as input_ids, positions also [1, L]; None: the model's default.
    """
    reason = _why_not(input_ids) or ("SF107" if input_ids.ndim != 2 or input_ids.numel() == 0 else "")
    if reason:
        return reason
    ids = input_ids.numpy()
    batch, length = ids.shape
    lengths = np.full(batch, length) if attention_mask is None else _lengths(attention_mask, input_ids)
    if isinstance(lengths, str):
        return lengths
    longest = int(lengths.max())
    if longest > tables.max_length:
        return "SF126"
    used = None if longest == int(lengths.min()) == length else np.arange(length) < lengths[:, None]
    inputs = (
        (input_ids, tables.vocabulary_size),
        (token_type_ids if tables.token_types else None, tables.token_types),
        (position_ids, tables.positions),
    )
    packed = []
    for tensor, rows in inputs:
        values = None if tensor is None else _values(tensor, rows, ids.shape, used)
        if isinstance(values, str):
            return values
        packed.append(values)
    if packed[1] is not None and not packed[1].any():
        packed[1] = None
    cu_seqlens = np.zeros(batch + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    first, types, positions = (None if values is None else torch.from_numpy(values) for values in packed)
    assert first is not None
    return Packed(first, torch.from_numpy(cu_seqlens), types, positions, length)


def _why_not(x: Any) -> str:
    if type(x) not in guards.PLAIN or x.layout != torch.strided or x.dtype not in _INTEGERS:
        return "SF107"
    return "" if x.is_cpu else "SF103"


def _lengths(mask: Any, input_ids: Tensor) -> np.ndarray | str:
    """Tokens per row; left padding, holes, empty rows and weights other than 0 and 1 are for the original."""
    if type(mask) not in guards.PLAIN or mask.layout != torch.strided or mask.shape != input_ids.shape:
        return "SF104"
    if not mask.is_cpu:
        return "SF103"
    if mask.dtype == torch.bfloat16 or mask.is_complex():
        return "SF104"
    values = mask.detach().numpy()
    if (values == 1).all():
        return np.full(values.shape[0], values.shape[1])
    lengths = np.count_nonzero(values, axis=1)
    prefix = np.arange(values.shape[1]) < lengths[:, None]
    return lengths if lengths.min() > 0 and (values == prefix).all() else "SF104"


def _values(x: Any, rows: int, shape: tuple[int, ...], used: np.ndarray | None) -> np.ndarray | str:
    """The numbers in use as int32, which have to lie in a table of `rows` rows."""
    reason = _why_not(x)
    if reason:
        return reason
    values = x.numpy()
    if values.shape != shape:
        if values.shape != (1, shape[1]):
            return "SF107"
        values = np.broadcast_to(values, shape)
    # In the padded positions too: the original code looks them up.
    if values.min() < 0 or values.max() >= rows:
        return "SF126"
    return (values.ravel() if used is None else values[used]).astype(np.int32)
