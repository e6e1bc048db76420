"""Linear layers: of training, and with an activation in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
from sentfast.ops.layers import Normed, _bias_activation, _bias_activation_backward, bias_activation, norm_again, own
from sentfast.reference import ACTIVATIONS, accumulation_dtype
from sentfast.registry import define

# In float32 our product is faster than the library's on the CPU; in bfloat16 the library's reaches the same rate.
_product = define(
    "product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    reference=reference.product,
    fake=lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]),
)


def _linear_activation_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    product = _product(x, weight.t(), None) if x.dtype == torch.float32 else _plain_product(x, weight.t())
    return _bias_activation(product, bias, activation)


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's, in the dtype of a also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


_linear_activation = define(
    "linear_activation(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
    reference=reference.linear_activation,
    fake=lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0]),
    on_cpu=_linear_activation_on_cpu,
)


# Without a gradient, for the encoder on a GPU.
_linear_gated_activation = define(
    "linear_gated_activation(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor",
    reference=reference.linear_gated_activation,
    fake=lambda x, weight, bias, activation: x.new_empty(x.shape[0], weight.shape[0] // 2),
)


class _SideBySide(torch.autograd.Function):
    """``torch.cat`` whose gradients lie in memory of their own: a part of one tensor keeps, and saves, all of it."""

    @staticmethod
    def forward(ctx: Any, *parts):
        ctx.sizes = [len(x) for x in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad):
        found = zip(grad.split(ctx.sizes), ctx.needs_input_grad, strict=True)
        return tuple(x.clone() if needed else None for x, needed in found)


def side_by_side(*parts: Tensor) -> Tensor:
    """[N1, K], [N2, K], ... -> [N1 + N2 + ..., K], or vectors."""
    return _SideBySide.apply(*parts)


def _held(weight: Tensor) -> Tensor:
    """The memory that the forward pass reads, for the backward pass, also where somebody gives the parameter another
    (``p.data = ...``) before; PyTorch's own layer keeps a view too."""
    return weight.view_as(weight) if torch.is_grad_enabled() else weight


# What a gradient is not asked for is not kept: it may change, and its memory be used again.
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        product = twice.differentiable(_product)
        return (
            product(grad, weight, None) if needs_x else None,
            product(grad.t(), x, None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, total, norm_weight, norm_bias, eps, weight, bias):
        needs_x, *_, needs_weight, _ = ctx.needs_input_grad
        source = (total, norm_weight, norm_bias) if needs_weight else (None, None, None)
        ctx.save_for_backward(*source, weight if needs_x else None)
        ctx.eps = eps
        return _product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad):
        total, norm_weight, norm_bias, weight = ctx.saved_tensors
        needs_x, *_, needs_weight, needs_bias = ctx.needs_input_grad
        product = twice.differentiable(_product)
        return (
            product(grad, weight, None) if needs_x else None,
            *(None for _ in range(4)),
            product(grad.t(), norm_again(total, norm_weight, norm_bias, ctx.eps), None) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, x_bias, activation, weight, bias):
        needs_x, needs_x_bias, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x, x_bias, weight if needs_x or needs_x_bias else None)
        ctx.activation = activation
        return _product(_bias_activation(x, x_bias, activation), weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad):
        x, x_bias, weight = ctx.saved_tensors
        grad_x = grad_x_bias = grad_weight = None
        needs_x, needs_x_bias, _, needs_weight, needs_bias = ctx.needs_input_grad
        product = twice.differentiable(_product)
        if needs_weight:
            again = twice.differentiable(_bias_activation)
            grad_weight = product(grad.t(), again(x, x_bias, ctx.activation), None)
        if needs_x or needs_x_bias:
            through = twice.differentiable(_bias_activation_backward)
            grad_x, grad_x_bias = through(product(grad, weight, None), x, x_bias, ctx.activation)
        return (
            grad_x,
            grad_x_bias if needs_x_bias else None,
            None,
            grad_weight,
            grad.sum(dim=0) if needs_bias else None,
        )


class _LinearActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, activation):
        ctx.save_for_backward(x, weight, bias)
        ctx.activation = activation
        return _linear_activation(x, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad):
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        product = _plain_product(x, weight.t())
        through = twice.differentiable(_bias_activation_backward)
        grad_product, grad_bias = through(grad, product, bias, ctx.activation)
        return (
            _plain_product(grad_product, weight) if needs_x else None,
            _plain_product(grad_product.t(), x) if needs_weight else None,
            grad_bias if needs_bias else None,
            None,
        )


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """``activation(x weight^T + bias)`` in one pass on a GPU; the gradient makes the product again.

    Args:
        x: [T, K] float32, bfloat16 or float16.
        weight: [N, K] in the dtype of x.
        bias: [N], or None.
        activation: "gelu" (by the error function), "gelu_tanh", "relu" or "silu".

    Returns:
        [T, N] in the dtype of x. Sums, bias and activation are float32, float64 for float64, and rounded once; on the
        CPU half numbers are also rounded between product and activation. On a GPU a row's bits depend neither on the
        other rows nor on their number, and float32 products are tf32 where PyTorch's setting for matmul allows it.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or the activation is not known.
    """
    checks.floats("x", x, "[T, K]", (2,))
    checks.floats("weight", weight, "[N, K]", (2,))
    checks.same_device("weight", weight, "x", x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected the dtype of x ({x.dtype}), got {weight.dtype}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected {x.shape[1]} columns, got {checks.describe(weight)}")
    if bias is not None:
        checks.floats("bias", bias, "[N]", (1,))
        checks.same_device("bias", bias, "x", x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape {list(weight.shape[:1])}, got {list(bias.shape)}")
        bias = bias.to(accumulation_dtype(x.dtype))
    number = checks.one_of("activation", activation, ACTIVATIONS)
    if checks.needs_function(x, weight) or (bias is not None and checks.needs_function(bias)):
        return _LinearActivation.apply(x, _held(weight), own(bias), number)
    return _linear_activation(x, weight, bias, number)


def activation_linear(
    x: Tensor, x_bias: Tensor | None, activation: str, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """:func:`linear` of :func:`bias_activation`, whose output is made again for the gradient instead of kept.

    Args:
        x: [T, K], with x_bias [K], or None, and activation as in :func:`bias_activation`.
        weight, bias: [N, K] and [N], or None, as in :func:`linear`.
    """
    if _fits(x, weight, bias) and (x_bias is None or x_bias.dtype == torch.float32):
        return _ActivationLinear.apply(x, own(x_bias), ACTIVATIONS.index(activation), _held(weight), bias)
    return linear(bias_activation(x, x_bias, activation), weight, bias)


def norm_linear(x: Normed, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` of a layer norm's output, which is made again for the gradient instead of kept."""
    if x.source is not None and _fits(x.output, weight, bias):
        return _NormLinear.apply(x.output, *x.source, _held(weight), bias)
    return linear(x.output, weight, bias)


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
        TypeError: an argument is no tensor.
        RuntimeError: what PyTorch raises for shapes and dtypes that do not fit.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise TypeError(f"{name}: expected a tensor, got {checks.describe(tensor)}")
    if _fits(x, weight, bias):
        return _Linear.apply(x, _held(weight), bias)
    return torch.nn.functional.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.is_autocast_enabled("cpu") or not all(y.is_cpu and y.dtype == torch.float32 for y in (x, weight)):
        return False
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        return False
    return bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1])
