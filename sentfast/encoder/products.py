"""In what an encoder multiplies."""

from __future__ import annotations

import functools

import torch

from sentfast import native, private, registry
from sentfast.encoder.device import composed
from sentfast.encoder.parts import Parts


def compute_dtype(parts: Parts, precision: str) -> torch.dtype:
    """On a GPU the model's dtype, or bfloat16 if that is asked for.

    On the CPU bfloat16 where that is asked for, the CPU has it, and the columns come in pairs, as its panels hold them.
    """
    if composed(parts.device):
        return torch.bfloat16 if precision == "bf16" and parts.dtype == torch.float32 else parts.dtype
    if precision != "bf16" and parts.dtype != torch.bfloat16:
        return torch.float32
    inner = [layer.down for layer in parts.layers] + ([] if parts.projection is None else [parts.projection])
    pairs = all(linear.in_features % 2 == 0 for linear in inner)
    return torch.bfloat16 if pairs and has_bf16() else torch.float32


def has_bf16() -> bool:
    """Whether the CPU kernels in use multiply bfloat16."""
    return native.isa() in ("avx512_bf16", "neon_bf16")


def why_not_bfloat16(parts: Parts) -> str:
    """Where PyTorch multiplies bfloat16 in tiles (AMX), ours is not known to be faster, so it takes what is bfloat16.

    That is a model in bfloat16 and autocast. Matrices of scores were measured there and lose; the encoder was not.
    """
    if parts.device.type != "cpu" or not has_tiles() or registry.RUN_ALL or registry.forced_backend() is not None:
        return ""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return "SF131" if autocast or parts.dtype == torch.bfloat16 else ""


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has AMX and the operating system lets programs use it, as PyTorch sees it."""
    return bool(private.amx_tiles())
