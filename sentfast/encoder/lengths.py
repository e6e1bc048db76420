"""Lengths of the texts of a padded batch, noted while its attention mask is still on the host.

On the GPU they could only be read by waiting for it. A weak table: it holds no tensor and ends with the mask.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# From a mask on the GPU to the tokens per row, and its version when it was noted.
_noted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def of_mask(mask: Tensor) -> np.ndarray | None:
    """int64 [B] of a mask on the CPU that is 1 for the first tokens of each row and 0 for the rest; else None."""
    if mask.ndim != 2 or mask.dtype not in (torch.int64, torch.int32, torch.bool) or not mask.is_cpu:
        return None
    values = mask.numpy()
    lengths = np.count_nonzero(values, axis=1)
    return lengths if (values == (np.arange(values.shape[1]) < lengths[:, None])).all() else None


def note(mask: Tensor, lengths: np.ndarray) -> None:
    """Remembers the lengths of a mask; tensors of inference mode count no versions and are left out."""
    if not mask.is_inference():
        _noted[mask] = lengths, mask._version


def recall(mask: Tensor) -> np.ndarray | None:
    """What was noted, if the mask has not been written to since."""
    found = _noted.get(mask)
    return None if found is None or mask.is_inference() or found[1] != mask._version else found[0]
