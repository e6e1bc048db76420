"""What runs in place of the similarity functions of ``sentence_transformers.util``.

Each function returns the result, or the reason code why the original has to run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.integrations import gain, guards
from sentfast.integrations.versions import Version
from sentfast.ops.similarity import cosines, dots, normalized, pairwise
from sentfast.reference import PAIRWISE_METRICS

_COSINE, _DOT, _EUCLIDEAN, _MANHATTAN = map(PAIRWISE_METRICS.index, ("cosine", "dot", "euclidean", "manhattan"))
_SMALL = {_DOT: gain.pairwise_dot_score, _EUCLIDEAN: gain.pairwise_euclidean_sim}


# On a CPU with AMX PyTorch multiplies bfloat16 in tiles, up to eight times as fast as our products. Only of fewer rows
# do the norms that ours saves a pass for weigh more.
LEAST_TILED_ROWS = 32


def cos_sim(version: Version, a: Any, b: Any) -> Tensor | str:
    reason, a, b = _matrices(version, a, b)
    if reason:
        return reason
    if _has_tiles(a) and min(len(a), len(b)) >= LEAST_TILED_ROWS and _in_bfloat16(version, a):
        return "SF131"
    return gain.TOO_SMALL if gain.cos_sim(a, b) else _scores(version, cosines(a, b), a)


def dot_score(version: Version, a: Any, b: Any) -> Tensor | str:
    reason, a, b = _matrices(version, a, b)
    if reason:
        return reason
    if gain.dot_score(a, b):
        return gain.TOO_SMALL
    if _has_tiles(a) and _in_bfloat16(version, a):
        return "SF131"
    return _scores(version, dots(a, b), a)


def pairwise_cos_sim(version: Version, a: Any, b: Any) -> Tensor | str:
    return _pairwise(version, a, b, _COSINE)


def pairwise_dot_score(version: Version, a: Any, b: Any) -> Tensor | str:
    return _pairwise(version, a, b, _DOT)


def pairwise_euclidean_sim(version: Version, a: Any, b: Any) -> Tensor | str:
    return _pairwise(version, a, b, _EUCLIDEAN)


def pairwise_manhattan_sim(version: Version, a: Any, b: Any) -> Tensor | str:
    return _pairwise(version, a, b, _MANHATTAN)


def pairwise_angle_sim(version: Version, x: Any, y: Any) -> Tensor | str:
    """|cos + sin|, the halves being real and imaginary parts: sqrt(2) |cosine| with x turned by 45 degrees.

    Turned to the same length: one below eps is not divided by.
    """
    if not version.angle_is_cosine_and_sine:
        return "SF109"
    reason, x, y = _operands(version, x, y)
    if reason or x.ndim != 2 or x.shape != y.shape or x.shape[1] % 2:
        return reason or "SF107"
    first, last = x.float().chunk(2, dim=1)
    turned = torch.cat([first + last, last - first], dim=1) * math.sqrt(0.5)
    return pairwise(turned, y.float(), _COSINE).abs() * math.sqrt(2)


def normalize_embeddings(version: Version, x: Any) -> Tensor | str:
    reason = guards.tensor(x) or guards.half_under_autocast(x)
    if reason:
        return reason
    if x.ndim != 2 and (x.ndim == 0 or version.normalizes_dimension_1):
        return "SF107"
    return normalized(x)


def _operands(version: Version, a: Any, b: Any) -> tuple[str, Any, Any]:
    if type(a) is not Tensor and isinstance(a, (list, np.ndarray)):
        a = version.to_tensor(a)
    if type(b) is not Tensor and isinstance(b, (list, np.ndarray)):
        b = version.to_tensor(b)
    reason = guards.tensor(a) or guards.tensor(b)
    if not reason and a.dtype != b.dtype:
        reason = "SF102"
    if not reason and not (a.is_cpu and b.is_cpu) and a.device != b.device:
        reason = "SF103"
    return reason, a, b


def _matrices(version: Version, a: Any, b: Any) -> tuple[str, Any, Any]:
    reason, a, b = _operands(version, a, b)
    reason = reason or guards.products(a.device.type)
    if reason:
        return reason, a, b
    a = a.unsqueeze(0) if a.ndim == 1 else a
    b = b.unsqueeze(0) if b.ndim == 1 else b
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        return "SF107", a, b
    return "", a, b


def _has_tiles(a: Tensor) -> bool:
    return gain.TILES and gain.on and a.is_cpu and not guards.forced()


def _in_bfloat16(version: Version, a: Tensor) -> bool:
    """Whether the original multiplies in bfloat16: under autocast, or its operands as they are, in older versions."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return a.dtype == torch.bfloat16 and not version.scores_float32


def _scores(version: Version, scores: Tensor, a: Tensor) -> Tensor:
    """In the dtype that the original returns: it multiplies in the autocast dtype, older versions in the input's."""
    device = a.device.type
    if torch.is_autocast_enabled(device):
        return scores.to(torch.get_autocast_dtype(device))
    return scores if version.scores_float32 else scores.to(a.dtype)


def _pairwise(version: Version, a: Any, b: Any, metric: int) -> Tensor | str:
    reason, a, b = _operands(version, a, b)
    if reason:
        return reason
    if a.shape != b.shape or a.ndim == 0 or (metric == _COSINE and version.normalizes_dimension_1 and a.ndim != 2):
        return "SF107"
    old_gradient = metric == _EUCLIDEAN and not version.euclidean_zero_gradient
    if old_gradient and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "SF109"
    if metric in _SMALL and _SMALL[metric](a, b):
        return gain.TOO_SMALL
    if version.scores_float32:
        return pairwise(a, b, metric)
    reason = guards.half_under_autocast(a)
    return reason if reason else pairwise(a, b, metric).to(a.dtype)
