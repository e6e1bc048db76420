"""What ``run`` of an encoder is given, checked: each message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sentfast.encoder.tables import Tables
from sentfast.reference import POOLING_MODES


def check(
    tables: Tables,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    modes: Sequence[str],
    padded_length: int,
) -> None:
    _int32("input_ids", input_ids)
    _int32("cu_seqlens", cu_seqlens)
    ends, total = cu_seqlens.numpy(), input_ids.shape[0]
    if len(ends) == 0 or ends[0] != 0 or ends[-1] != total or (ends[1:] < ends[:-1]).any():
        raise ValueError(f"cu_seqlens: expected numbers that rise from 0 to {total}, got {ends.tolist()}")
    longest = int(np.diff(ends).max(initial=0))
    if longest > tables.max_length:
        raise ValueError(f"cu_seqlens: expected sequences of at most {tables.max_length} tokens, got {longest}")
    if padded_length and padded_length < longest:
        raise ValueError(f"padded_length: expected at least {longest}, the longest sequence, got {padded_length}")
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise ValueError(f"modes: expected names of {POOLING_MODES}, got {unknown[0]!r}")
    _in_table("input_ids", input_ids, tables.vocabulary_size)
    limits = {
        "token_type_ids": (token_type_ids, tables.token_types),
        "position_ids": (position_ids, tables.positions),
    }
    for name, (ids, rows) in limits.items():
        if ids is not None:
            _int32(name, ids)
            if ids.shape[0] != total:
                raise ValueError(f"{name}: expected {total} numbers as in input_ids, got {ids.shape[0]}")
            if rows:
                _in_table(name, ids, rows)


def _int32(name: str, x: Tensor) -> None:
    if x.dtype != torch.int32 or x.ndim != 1 or not x.is_cpu or not x.is_contiguous():
        got = f"{x.dtype} of shape {list(x.shape)} on {x.device}"
        raise ValueError(f"{name}: expected contiguous int32 of one dimension on the CPU, got {got}")


def _in_table(name: str, ids: Tensor, rows: int) -> None:
    values = ids.numpy()
    if len(values) and (values.min() < 0 or values.max() >= rows):
        raise IndexError(f"{name}: expected numbers from 0 to {rows - 1}, got {values.min()} to {values.max()}")
