"""Linear layers with LoRA adapters of PEFT: which are known, and the one matrix that stands for them in evaluation."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def adapted(module: nn.Module) -> bool:
    """A linear layer with LoRA adapters, none of a variant, under PEFT's own code: it treats every row by itself."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(module) is not lora.Linear or getattr(module, "lora_variant", None) != {}:
        return False
    return "forward" not in vars(module) and lora.Linear.forward.__module__ == lora.__name__


def inside(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, whose ``forward`` the wrapper calls; else `model`."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model  # type: ignore[operator]


def foldable(module: Any) -> bool:
    """Whether the layer does what a plain one with :func:`weight` and its bias does, while nothing drops out."""
    if module.disable_adapters and module.merged:
        return False  # PEFT takes the adapters out of the weight when it is called next
    pairs = [pair for name in _active(module) for pair in (module.lora_A[name], module.lora_B[name])]
    return all(type(part) is nn.Linear and part.bias is None and "forward" not in vars(part) for part in pairs)


def switches(modules: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What else than parameters decides what the layers compute."""
    return [
        (module.disable_adapters, tuple(module.merged_adapters), tuple(module.active_adapters), dict(module.scaling))
        for module in modules
    ]


def weight(module: Any) -> Tensor:
    """The matrix of a linear layer, with what its active adapters add.

    W + sum over the adapters of scaling * B A, [out, in] in the dtype of W, as PEFT's own merge makes it.
    """
    found: Tensor = module.weight
    if type(module) is nn.Linear:
        return found
    with torch.no_grad():
        for name in _active(module):
            found = found + module.get_delta_weight(name)
    return found


def _active(module: Any) -> list[str]:
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]
