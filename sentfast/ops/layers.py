"""The layers between the matrix products: layer norm with dropout and residual, activation with bias, dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
from sentfast.ops.seeds import check_dropout, seed_of
from sentfast.reference import ACTIVATIONS, accumulation_dtype
from sentfast.registry import define, result_of


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_fake(x, dropout_p, seed, stream):
    return _like(x)


def _norm_fake(x, residual, weight, bias, eps, dropout_p, seed, stream):
    total = _like(x if residual is None else residual)
    statistic = total.new_empty(x.shape[:-1], dtype=accumulation_dtype(torch.promote_types(x.dtype, total.dtype)))
    return total, torch.empty_like(total), statistic, torch.empty_like(statistic)


def _norm_backward_fake(grad, sum, mean, rstd, weight, like, dropout_p, seed, stream):
    same = dropout_p == 0.0 and like.dtype == grad.dtype
    grad_x = like.new_empty(0) if same else like.new_empty(grad.shape)
    grad_weight = mean.new_empty(grad.shape[-1])
    return _like(grad), grad_x, grad_weight, torch.empty_like(grad_weight)


def _activation_fake(x, bias, activation):
    return _like(x)


def _gated_fake(x, bias, activation):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _rotate_fake(qkv, position_ids, cosines, sines):
    return None


def _activation_backward_fake(grad, x, bias, activation):
    return _like(x), x.new_empty(0 if bias is None else x.shape[-1], dtype=accumulation_dtype(x.dtype))


_dropout = define(
    "dropout(Tensor x, float dropout_p, int seed, int stream) -> Tensor",
    reference=reference.dropout,
    fake=_dropout_fake,
)
_dropout_add_layer_norm_forward = define(
    "dropout_add_layer_norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps,"
    " float dropout_p, int seed, int stream) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_layer_norm_forward,
    fake=_norm_fake,
)
_dropout_add_layer_norm = result_of(_dropout_add_layer_norm_forward, compiled=False)
_dropout_add_layer_norm_backward = define(
    "dropout_add_layer_norm_backward(Tensor grad, Tensor sum, Tensor mean, Tensor rstd, Tensor weight, Tensor like,"
    " float dropout_p, int seed, int stream) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.dropout_add_layer_norm_backward,
    fake=_norm_backward_fake,
)
_bias_activation = define(
    "bias_activation(Tensor x, Tensor? bias, int activation) -> Tensor",
    reference=reference.bias_activation,
    fake=_activation_fake,
)
_bias_activation_backward = define(
    "bias_activation_backward(Tensor grad, Tensor x, Tensor? bias, int activation) -> (Tensor, Tensor)",
    reference=reference.bias_activation_backward,
    fake=_activation_backward_fake,
)


# Without a gradient, for the encoder on a GPU.
_gated_activation = define(
    "gated_activation(Tensor x, Tensor? bias, int activation) -> Tensor",
    reference=reference.gated_activation,
    fake=_gated_fake,
)
_rotate_ = define(
    "rotate_(Tensor(a!) qkv, Tensor position_ids, Tensor cosines, Tensor sines) -> ()",
    reference=reference.rotate_,
    fake=_rotate_fake,
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, options):
        ctx.options = options
        return _dropout(x, *options)

    @staticmethod
    def backward(ctx: Any, grad):
        return twice.differentiable(_dropout)(grad, *ctx.options), None


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, eps, options):
        y, total, mean, rstd = _dropout_add_layer_norm_forward(x, residual, weight, bias, eps, *options)
        ctx.save_for_backward(total, mean, rstd, weight, x.new_empty(0))
        ctx.eps, ctx.options = eps, options
        # The sum is a result so that gradients of gradients find their way through it. In all other backward passes it
        # gets none, and none is made of zeros for it.
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad, grad_total):
        total, mean, rstd, weight, like = ctx.saved_tensors
        _, needs_residual, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        from_total = None
        if grad_total is not None:
            from_total = twice.differentiable(_dropout)(grad_total, *ctx.options).to(like.dtype)
        if grad is None:  # weight and bias have no part in the sum
            return from_total, grad_total if needs_residual else None, None, None, None, None
        if twice.wanted():
            mean, rstd = reference.norm_statistics(total, mean.dtype, ctx.eps)
        grad_sum, grad_x, grad_weight, grad_bias = twice.differentiable(_dropout_add_layer_norm_backward)(
            grad, total, mean, rstd, weight, like, *ctx.options
        )
        if grad_x.shape != grad_sum.shape:
            grad_x = grad_sum
        if grad_total is not None:
            grad_sum = grad_sum + grad_total
            grad_x = grad_x + from_total
        grads = [grad_x, grad_sum if needs_residual else None]
        return *grads, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None


class Normed(NamedTuple):
    """The output of a layer norm and, with a gradient, what makes it again: the sum that is kept anyway, weight, bias,
    eps."""

    output: Tensor
    source: tuple[Tensor, Tensor, Tensor | None, float] | None = None


def norm_again(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The output of a :class:`Normed` from its source, to the bit."""
    return twice.differentiable(_dropout_add_layer_norm)(total, None, weight, bias, eps, 0.0, 0, 0)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, activation):
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return _bias_activation(x, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad):
        x, bias = ctx.saved_tensors
        through = twice.differentiable(_bias_activation_backward)
        grad_x, grad_bias = through(grad, x, bias, ctx.activation)
        return grad_x, None if bias is None else grad_bias, None


def dropout(x: Tensor, p: float = 0.5, *, seed: int | None = None, stream: int = 0) -> Tensor:
    """Sets elements to 0 with probability p and multiplies the others by 1 / (1 - p).

    The mask is a function of seed, stream and place (Philox 4x32, seven rounds), so backward makes it again and nothing
    is stored; the distribution is that of ``torch.nn.functional.dropout``, the mask is not.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        p: from 0 to 1.
        seed: the same seed gives the same mask; None: drawn from PyTorch's default generator.
        stream: tells apart the calls that share a seed.

    Raises:
        TypeError, ValueError: x is no floating-point tensor, or p is out of range.
    """
    checks.floats("x", x, "[..., D]")
    check_dropout(p, seed, stream, "p")
    if p == 0.0 or x.numel() == 0:
        return x
    return _Dropout.apply(x, (float(p), seed_of(p, seed), stream))


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    stream: int = 0,
) -> Tensor:
    """Layer norm of a sum: ``LayerNorm(dropout(x) + residual) * weight + bias`` in one pass.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        residual: in the shape of x and its dtype or float32, which is then the dtype of the result; None: no residual.
        weight, bias: [D]; read and accumulated in float32.
        eps: added to the variance, which is the biased one.
        dropout_p, seed, stream: as in :func:`dropout`; of x alone.

    Returns:
        [..., D] in the dtype of the residual. Mean, variance and the sums of the gradients are made in float32, float64
        for float64; the sums over rows in a fixed order.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or range; the message names it.
    """
    checks.floats("x", x, "[..., D]")
    check_dropout(dropout_p, seed, stream)
    checks.finite("eps", eps, 0.0)
    if residual is not None:
        checks.floats("residual", residual, "[..., D]")
        checks.same_device("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual: expected the shape of x {list(x.shape)}, got {list(residual.shape)}")
        if residual.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"residual: expected the dtype of x ({x.dtype}) or float32, got {residual.dtype}")
    return normed(x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed, stream=stream).output


def normed(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    stream: int = 0,
) -> Normed:
    """:func:`dropout_add_layer_norm` of arguments that fit, and what makes its output again."""
    acc = accumulation_dtype(x.dtype)
    weight = _vector("weight", weight, x).to(acc)
    bias = None if bias is None else _vector("bias", bias, x).to(acc)
    options = (float(dropout_p), seed_of(dropout_p, seed, x), stream)
    if checks.needs_function(x, residual) or checks.needs_function(weight, bias):
        y, total = _DropoutAddLayerNorm.apply(x, residual, weight, bias, float(eps), options)
        return Normed(y, (total, own(weight), own(bias), float(eps)))
    return Normed(_dropout_add_layer_norm(x, residual, weight, bias, float(eps), *options))


def bias_activation(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """``activation(x + bias)`` in one pass; the gradient computes it from x again.

    Args:
        x: [..., D] float32, bfloat16 or float16.
        bias: [D], or None.
        activation: "gelu" (by the error function), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., D] in the dtype of x, computed in float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or the activation is not known.
    """
    checks.floats("x", x, "[..., D]")
    number = checks.one_of("activation", activation, ACTIVATIONS)
    bias = None if bias is None else own(_vector("bias", bias, x).to(accumulation_dtype(x.dtype)))
    return _BiasActivation.apply(x, bias, number)


def own(vector: Tensor | None) -> Any:
    """A copy of what is kept to make something again: PyTorch's layers keep none of it, and let it change meanwhile."""
    return vector.clone() if vector is not None and torch.is_grad_enabled() else vector


def _vector(name: str, vector: Tensor, x: Tensor) -> Tensor:
    checks.floats(name, vector, "[D]")
    checks.same_device(name, vector, "x", x)
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape {list(x.shape[-1:])}, got {list(vector.shape)}")
    return vector
