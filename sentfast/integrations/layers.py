"""Layers of PyTorch that treat every row by itself, or every number."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from sentfast.integrations.guards import ours

# Activations of one number at a time, which may see other rows and columns than in the original; first those whose
# vector and scalar code agree to the bit.
EXACT_ACTIVATIONS = (nn.Identity, nn.Tanh, nn.ReLU)
ACTIVATIONS = (
    *EXACT_ACTIVATIONS,
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign),
    *(nn.Tanhshrink, nn.Threshold),
)
ROW_BY_ROW = (nn.Linear, nn.LayerNorm, nn.Dropout, *ACTIVATIONS)


def foreign(method: Any) -> bool:
    """Other code has replaced the method of a class of PyTorch, transformers or sentence-transformers."""
    # Of a call to a cache Dynamo warns the user.
    return _foreign(method) if is_compiling() else _known_foreign(method)


def _foreign(method: Any) -> bool:
    package = getattr(method, "__globals__", {}).get("__name__", "").partition(".")[0]
    return package not in ("torch", "transformers", "sentence_transformers") and not ours(method)


_known_foreign = functools.lru_cache(256)(_foreign)
forget_foreign = _known_foreign.cache_clear


def any_foreign(cls: type, steps: tuple[str, ...]) -> bool:
    """As :func:`foreign`, for those of the methods that the class has."""
    return any(foreign(getattr(cls, step)) for step in steps if hasattr(cls, step))
