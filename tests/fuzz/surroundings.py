"""Contexts around a call of a program: modes of PyTorch and of the user's, which the call has to respect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import process_settings
import torch
from draw import Draw
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sentfast


class Doubling(TorchFunctionMode):
    """Doubles what `F.linear` gives, as a mode of the user's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.linear else out


class DoublingProducts(TorchDispatchMode):
    """Doubles what the products of matrices give, below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) else out


def halved_on_the_way() -> Any:
    """What backward needs is kept as half as much, and doubled when it is asked for."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda x: x / 2 if x.is_floating_point() else x, lambda x: 2 * x if x.is_floating_point() else x
    )


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "default float64": lambda: process_settings.default_dtype(torch.float64),
    "device": lambda: torch.device("cpu"),
    "function mode": Doubling,
    "dispatch mode": DoublingProducts,
    "kept elsewhere": halved_on_the_way,
    "math attention": lambda: nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "disabled": contextlib.nullcontext,
}


@contextlib.contextmanager
def context(draw: Draw) -> Iterator[None]:
    name = draw.one_of("context", tuple(CONTEXTS), p=0.3)
    with sentfast.disabled() if name == "disabled" and draw.ours else CONTEXTS[name]():
        yield
