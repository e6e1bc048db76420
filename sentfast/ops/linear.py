"""The linear layer of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sentfast import reference
from sentfast.registry import define

# In float32 our product is faster than the library's on the CPU; in bfloat16 the library's reaches the same rate.
_product = define(
    "product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    reference=reference.product,
    fake=lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight, None) if needs_x else None,
            _product(grad.t(), x, None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as :func:`torch.nn.functional.linear`.

    Our own product, forward and backward, for float32 matrices on the CPU outside autocast; PyTorch's for the rest.

    Args:
        x: [T, K]; other shapes are PyTorch's.
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [T, N] in the dtype of x. Sums are float32, made in parts of 256 features or tokens that are added in order.

    Raises:
        RuntimeError: what PyTorch raises for shapes and dtypes that do not fit.
    """
    fits = _covered(x) and _covered(weight) and x.shape[1] == weight.shape[1]
    if fits and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1])):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _covered(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and x.ndim == 2 and not torch.is_autocast_enabled("cpu")
