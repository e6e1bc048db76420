"""The sizes of a model's embedding tables, which bound what it can be given, and how it counts positions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tables(NamedTuple):
    """Rows of each table; token_types is 0 if the architecture has none.

    position_offset: position of a sequence's first token. padding_idx: the token id that does not count as a position,
    None if all do.
    """

    vocabulary_size: int
    token_types: int
    positions: int
    position_offset: int
    padding_idx: int | None

    @property
    def max_length(self) -> int:
        """Of the longest sequence that the position table allows."""
        return self.positions - self.position_offset

    def has_padding(self, input_ids: Tensor) -> bool:
        """A padding token stands inside a text: the tokens after it count on as if it were not there."""
        return self.padding_idx is not None and bool((input_ids.numpy() == self.padding_idx).any())

    def count_positions(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """int32 [T], the positions that the model gives to the tokens of packed sequences."""
        ids, ends = input_ids.numpy(), cu_seqlens.numpy()
        counts = np.ones(len(ids), dtype=bool) if self.padding_idx is None else ids != self.padding_idx
        counted = np.concatenate([[0], np.cumsum(counts)])
        before = np.repeat(counted[ends[:-1]], np.diff(ends))
        return torch.from_numpy(((counted[1:] - before) * counts + self.position_offset - 1).astype(np.int32))
