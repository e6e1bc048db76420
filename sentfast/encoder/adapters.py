"""Linear layers with LoRA adapters of PEFT: which are known, what they add, and one matrix with all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Read = Callable[[Tensor], Tensor]
# What :func:`switches` compares, as it may change from call to call.
SWITCHES = frozenset({"_disable_adapters", "_active_adapter", "merged_adapters", "scaling"})


def adapted(module: nn.Module) -> bool:
    """A linear layer with LoRA adapters, none of a variant, under PEFT's own code: it treats every row by itself."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None or type(module) is not lora.Linear or getattr(module, "lora_variant", None) != {}:
        return False
    if module.fan_in_fan_out:
        return False
    return "forward" not in vars(module) and lora.Linear.forward.__module__ == lora.__name__


def inside(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, whose ``forward`` the wrapper calls; else `model`."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model  # type: ignore[operator]


class Term(NamedTuple):
    """What an adapter adds to its layer's output y: scaling * B A dropout(x)."""

    dropout: nn.Module
    a: Tensor
    b: Tensor
    scaling: float


def terms(module: Any) -> list[Term] | None:
    """Of the active adapters of a layer; None where PEFT's own code has to run."""
    if module.disable_adapters or module.merged:
        # PEFT takes adapters that are both out of the weight when the layer is called next.
        return None if module.disable_adapters and module.merged else []
    found = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b, dropout, scaling = (table[name] for table in _tables(module))
        if not all(_plain(x, nn.Linear) and x.bias is None and type(x.weight) is nn.Parameter for x in (a, b)):
            return None
        if not _plain(dropout, nn.Dropout, nn.Identity) or not isinstance(scaling, (int, float)):
            return None
        found.append(Term(dropout, a.weight, b.weight, float(scaling)))
    return found


def _tables(module: Any) -> tuple[Any, ...]:
    return module.lora_A, module.lora_B, module.lora_dropout, module.scaling


def _plain(module: nn.Module, *classes: type) -> bool:
    return type(module) in classes and "forward" not in vars(module)


def switches(modules: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """What else than parameters decides what the layers compute."""
    return [
        (module.disable_adapters, tuple(module.merged_adapters), tuple(module.active_adapters), dict(module.scaling))
        for module in modules
    ]


def weight(module: Any, matrix: Read, small: Read) -> Tensor:
    """The matrix of a linear layer for evaluation: W plus scaling * B A of each active adapter, [out, in].

    matrix, small: how W is read, and how A and B are.
    """
    found = matrix(module.weight)
    if type(module) is nn.Linear:
        return found
    with torch.no_grad():
        for term in terms(module) or ():
            found = torch.addmm(found, small(term.b), small(term.a), alpha=term.scaling)
    return found
