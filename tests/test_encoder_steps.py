"""Operators without a gradient, of the encoder on a GPU: gated activation and rotary embedding, apart and fused."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend

from sentfast import reference
from sentfast.ops.attention import _rotary_attention
from sentfast.ops.layers import _gated_activation, _rotate_
from sentfast.ops.linear import _linear_gated_activation
from sentfast.reference import ACTIVATIONS

# Neither csrc/cpu nor csrc/cuda has a kernel for them.
every_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name in ("reference", "triton")], ids=str)
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (7, 34), (3, 2304), (2, 3, 20)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")
    number = ACTIVATIONS.index(name)
    x = torch.randn(*shape, device=backend.device).to(dtype)
    for bias in (None, torch.randn(shape[-1], device=backend.device)):
        with backend.forced("gated_activation"):
            y = _gated_activation(x, bias, number)
        assert y.shape == (*shape[:-1], shape[-1] // 2) and y.dtype == dtype
        exact = reference.gated_activation(x.double(), bias, number)
        size = max([*x.abs().flatten().tolist(), 0.0]) ** 2 + 1
        assert_accurate(y, reference.gated_activation(x, bias, number), exact, size=size)


@every_backend
@every_dtype
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(0, 2, 8), (1, 1, 2), (37, 3, 10), (5, 12, 64)])
def test_rotate(backend: Backend, dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")
    qkv = torch.randn(tokens, 3, heads, dim, device=backend.device).to(dtype)
    positions = torch.randint(50, (tokens,), device=backend.device, dtype=torch.int32)
    angles = torch.rand(50, dim // 2, device=backend.device) * 50
    # Of the definition in complex numbers; the value is left alone.
    halves = qkv.double().unflatten(-1, (2, dim // 2))
    turn = torch.polar(torch.ones_like(angles), angles).cdouble()[positions][:, None, None]
    turned = torch.complex(halves[..., 0, :], halves[..., 1, :])[:, :2] * turn
    exact = torch.cat([turned.real, turned.imag], dim=-1)
    for x in (qkv.clone(), qkv.new_empty(tokens, 4, heads, dim)[:, :3].copy_(qkv)):
        eager = qkv.clone()
        reference.rotate_(eager, positions, angles.cos(), angles.sin())
        with backend.forced("rotate_"):
            _rotate_(x, positions, angles.cos(), angles.sin())
        assert torch.equal(x[:, 2], qkv[:, 2])
        assert_accurate(x[:, :2], eager[:, :2], exact, size=max([*qkv.abs().flatten().tolist(), 0.0]))


@every_backend
@every_dtype
@pytest.mark.parametrize(
    ("rows", "columns", "features"), [(0, 4, 3), (3, 0, 2), (1, 1, 1), (3, 70, 33), (130, 17, 5), (5, 64, 96)]
)
def test_linear_gated_activation(backend: Backend, dtype: torch.dtype, rows: int, columns: int, features: int) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")
    x = torch.randn(rows, columns, device=backend.device).to(dtype)
    weight = torch.randn(2 * features, columns, device=backend.device).to(dtype)
    for name in ACTIVATIONS:
        bias = torch.randn(2 * features, device=backend.device) if torch.rand(()) < 0.5 else None
        number = ACTIVATIONS.index(name)
        for weights in (weight, weight.t().contiguous().t()):
            with backend.forced("linear_gated_activation"):
                y = _linear_gated_activation(x, weights, bias, number)
            assert y.shape == (rows, features) and y.dtype == dtype
            exact = reference.linear_gated_activation(x.double(), weight.double(), bias, number)
            eager = reference.linear_gated_activation(x, weight, bias, number)
            # Of a product of two sums, each of `columns` products of such numbers.
            size = (max([*(x.double() @ weight.double().t()).abs().flatten().tolist(), 0.0]) + 4) ** 2
            assert_accurate(y, eager, exact, size=size, what=name)


@every_backend
@every_dtype
@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize(("heads", "dim"), [(2, 10), (1, 32), (1, 64)])
def test_rotary_attention(backend: Backend, dtype: torch.dtype, heads: int, dim: int, window: int) -> None:
    """In several blocks of queries and keys; positions need not count from 0."""
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")
    lengths = [70, 0, 5, 130, 1]
    ends, total = torch.tensor([0, *lengths]).cumsum(0).int().to(backend.device), sum(lengths)
    qkv = torch.randn(total, 3, heads, dim, device=backend.device).to(dtype)
    positions = torch.randint(300, (total,), device=backend.device, dtype=torch.int32)
    angles = torch.rand(300, dim // 2, device=backend.device) * 50
    rest = positions, angles.cos(), angles.sin(), ends, max(lengths), dim**-0.5, window, window
    with backend.forced("rotary_attention"):
        y = _rotary_attention(*qkv.unbind(1), *rest)
    eager = reference.rotary_attention(*qkv.unbind(1), *rest)
    exact = reference.rotary_attention(*qkv.double().unbind(1), *rest)
    assert_accurate(y, eager, exact, size=qkv.abs().max().item())
    # As the two steps one after the other.
    reference.rotate_(qkv, *rest[:3])
    apart = reference.varlen_attention_forward(*qkv.unbind(1), ends, 130, None, dim**-0.5, window, window, 0.0, 0, 0)
    assert torch.equal(eager, apart[0])
