"""Gradients of gradients: what a backward pass does that is to be differentiated itself (``create_graph=True``).

PyTorch then enables gradients inside ``backward``. Our kernels have no derivative, so such a pass runs the definitions
in plain PyTorch instead, on the saved tensors, which lead on to where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from sentfast.registry import Op


def wanted() -> bool:
    """Asked inside ``backward``: whether its results must be differentiable. A compiled graph never wants that."""
    return torch.is_grad_enabled() and not is_compiling()


def differentiable(op: Op) -> Callable[..., Any]:
    """The operator itself or, where it must be differentiable, its definition."""
    if not wanted():
        return op
    op.calls["reference"] += 1
    return op.reference


def gradients(
    op: Op, inputs: Sequence[Tensor | None], rest: Sequence[Any], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of ``op(*inputs, *rest)`` to the inputs, by its definition; None where not `needed`."""
    op.calls["reference"] += 1
    with torch.autocast(grad.device.type, enabled=False):
        # Under names of their own: one tensor may be two of the inputs, or one of them be made of another.
        own = [x.view_as(x) if x is not None and need else x for x, need in zip(inputs, needed, strict=True)]
        asked = [x for x, need in zip(own, needed, strict=True) if x is not None and need]
        found = iter(
            torch.autograd.grad(op.reference(*own, *rest), asked, grad, create_graph=True, materialize_grads=True)
        )
    return tuple(next(found) if x is not None and need else None for x, need in zip(inputs, needed, strict=True))
