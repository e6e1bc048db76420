"""The one tolerance rule: a kernel may err twice as much as plain PyTorch in the same dtype, plus a few roundings.

    err(result) <= 2 * err(eager) + ROUNDINGS * eps(dtype) * size

Errors are the largest absolute difference from the float64 result, over the finite elements; the others must agree
exactly (inf by sign, NaN as NaN). `size` is the largest magnitude of the exact result, or what the caller says the
result was made of where it cancels. See docs/numerics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 16


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute error over the elements that are finite in the exact result."""
    finite = torch.isfinite(exact)
    difference = (result.double().cpu() - exact.cpu())[finite.cpu()].abs()
    return difference.max().item() if difference.numel() else 0.0


def assert_accurate(result: Tensor, eager: Tensor, exact: Tensor, *, size: float = 0.0, what: str = "") -> None:
    """Asserts the tolerance rule for `result`, given plain PyTorch's result and the exact one in float64."""
    assert exact.dtype == torch.float64, "the exact result must be float64"
    assert result.shape == exact.shape, f"{what}: shape {list(result.shape)}, expected {list(exact.shape)}"
    result, exact = result.detach(), exact.detach()
    odd = ~torch.isfinite(exact)
    if odd.any():
        got, want = result.double()[odd], exact[odd]
        same = (got == want) | (got.isnan() & want.isnan())
        assert same.all(), f"{what}: {(~same).sum().item()} elements differ from the expected inf or NaN"
    finite = exact[~odd]
    size = max(size, finite.abs().max().item() if finite.numel() else 0.0)
    limit = 2 * error(eager.detach(), exact) + ROUNDINGS * torch.finfo(result.dtype).eps * size
    got = error(result, exact)
    assert got <= limit, (
        f"{what}: error {got:.3g} exceeds {limit:.3g} (eager's error {error(eager.detach(), exact):.3g})"
    )
