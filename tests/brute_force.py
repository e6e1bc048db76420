"""All scores of a search, without what is under test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact(a: Any, b: Any, metric: str = "cos") -> Tensor:
    """[rows of a, rows of b] in float64, rounded once to float32."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if metric == "euclidean":
        return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").float()
    if metric == "cos":
        a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    return (a @ b.mT).float()
