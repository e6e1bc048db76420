"""Operators without a gradient, of the encoder on a GPU: the gated activation and the rotary embedding."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend

from sentfast import reference
from sentfast.ops.layers import _gated_activation, _rotate_
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
