"""The layers between the matrix products: dropout with residual and layer norm, and activation with bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.random import dropout

# The integer that stands for an activation in an operator's schema is its index here.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
ACTIVATION_FUNCTIONS = (
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    torch.relu,
    torch.nn.functional.silu,
)


def dropout_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = (sum - mean) / sqrt(var + eps) * weight + bias with sum = dropout(x) + residual; y, sum, mean, 1 / sqrt."""
    dtype = x.dtype if residual is None else residual.dtype
    acc = accumulation_dtype(torch.promote_types(x.dtype, dtype))
    total = dropout(x.to(acc), dropout_p, seed, stream)
    if residual is not None:
        total = total + residual.to(acc)
    total = total.to(dtype)
    values = total.to(acc)
    mean, rstd = norm_statistics(total, acc, eps)
    y = (values - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(dtype), total, mean, rstd


def norm_statistics(total: Tensor, acc: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(var + eps) of the rows, in the dtype `acc`."""
    values = total.to(acc)
    mean = values.mean(dim=-1)
    return mean, ((values - mean.unsqueeze(-1)).square().mean(dim=-1) + eps).rsqrt()


def dropout_add_layer_norm_backward(
    grad: Tensor,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    like: Tensor,
    dropout_p: float,
    seed: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, weight and bias; that of x is empty where it is that of the residual.

    like: a tensor in the dtype of x.
    """
    acc = mean.dtype
    g, scale = grad.to(acc), rstd.unsqueeze(-1)
    z = (sum.to(acc) - mean.unsqueeze(-1)) * scale
    along = g * weight.to(acc)
    grad_sum = (along - along.mean(dim=-1, keepdim=True) - z * (along * z).mean(dim=-1, keepdim=True)) * scale
    same = dropout_p == 0.0 and like.dtype == grad.dtype
    grad_x = like.new_empty(0) if same else dropout(grad_sum, dropout_p, seed, stream).to(like.dtype)
    return grad_sum.to(grad.dtype), grad_x, _sum_of_rows(g * z), _sum_of_rows(g)


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a @ b + bias: [N, K], [K, M] and [M] -> [N, M]; half inputs accumulate in float32 and are rounded once."""
    acc = accumulation_dtype(a.dtype)
    result = a.to(acc) @ b.to(acc)
    return (result if bias is None else result + bias.to(acc)).to(a.dtype)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """activation(x weight^T + bias): [T, K], [N, K] and [N] -> [T, N]; half numbers are rounded once, at the end."""
    acc = accumulation_dtype(x.dtype)
    return bias_activation(x.to(acc) @ weight.to(acc).t(), bias, activation).to(x.dtype)


def linear_gated_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """gated_activation(x weight^T, bias): [T, K], [2 N, K] and [2 N] -> [T, N]; half numbers are rounded once."""
    acc = accumulation_dtype(x.dtype)
    return gated_activation(x.to(acc) @ weight.to(acc).t(), bias, activation).to(x.dtype)


def bias_activation(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """activation(x + bias)."""
    return ACTIVATION_FUNCTIONS[activation](_shifted(x, bias)).to(x.dtype).contiguous()


def gated_activation(x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """activation(h) * gate of x + bias, whose last dimension holds h and then gate."""
    h, gate = _shifted(x, bias).chunk(2, dim=-1)
    return (ACTIVATION_FUNCTIONS[activation](h) * gate).to(x.dtype)


def rotate_(qkv: Tensor, position_ids: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turns queries and keys in place by the angles of their token's position (rotary embedding).

    qkv: [T, 3, heads, d], the halves of a head are real and imaginary parts; position_ids: integers [T];
    cosines, sines: [P, d / 2].
    """
    turned = qkv.narrow(1, 0, 2)
    turned.copy_(rotated(turned, position_ids, cosines, sines))


def rotated(x: Tensor, position_ids: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [T, ..., d] turned by the angles of its tokens' positions; the rest as for :func:`rotate_`."""
    acc = accumulation_dtype(x.dtype)
    real, imaginary = x.to(acc).chunk(2, dim=-1)
    shape = (x.shape[0], *[1] * (x.ndim - 2), cosines.shape[1])
    c, s = (angles.index_select(0, position_ids).to(acc).view(shape) for angles in (cosines, sines))
    return torch.cat([real * c - imaginary * s, imaginary * c + real * s], dim=-1).to(x.dtype)


def bias_activation_backward(grad: Tensor, x: Tensor, bias: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias; that of the bias is empty where there is none."""
    z = _shifted(x, bias)
    grad_z = grad.to(z.dtype) * _derivative(z, activation)
    grad_bias = grad_z.new_empty(0) if bias is None else _sum_of_rows(grad_z)
    return grad_z.to(x.dtype).contiguous(), grad_bias


def _sum_of_rows(x: Tensor) -> Tensor:
    return x.sum(dim=tuple(range(x.ndim - 1))) if x.ndim > 1 else x.clone()


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    z = x.to(accumulation_dtype(x.dtype))
    return z if bias is None else z + bias.to(z.dtype)


def _derivative(x: Tensor, activation: int) -> Tensor:
    name = ACTIVATIONS[activation]
    if name == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if name == "gelu_tanh":
        root, cube = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(root * (x + cube * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * cube * x * x)
    if name == "relu":
        return torch.where(x <= 0, 0.0, 1.0)
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))
