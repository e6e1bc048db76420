"""Edits that leave a result without gradient and dropout as it was: its gradient changes, or what is dropped."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from hostile_common import InapplicableError, base, by_chance, collect, one
from torch import nn


def modes_of_modules(model, patch):
    """Each has its own; one drops everything, if it drops."""
    found = [x for x in base(model).modules() if _rate_of(x)]
    for x in found:
        setattr(x, _rate_of(x), 0.0)
    x = one(found)
    setattr(x, _rate_of(x), 1.0)
    for x in base(model).modules():
        x.training = by_chance()


def _rate_of(module):
    """The attribute with the probability with which a module drops; "" for none."""
    number = isinstance(getattr(module, "attention_dropout", None), float)
    return "p" if isinstance(module, nn.Dropout) else "attention_dropout" if number else ""


def dropout_by_the_forward_of_another_class(model, patch):
    for x in base(model).modules():
        if isinstance(x, nn.Dropout):
            x.p = 1.0
    patch.setattr(nn.Dropout, "forward", nn.Identity.forward)


def _with_parameters(model):
    found = [x for name, x in base(model).named_modules() if x._parameters and "pooler" not in name]
    return [(x, name) for x in found for name, parameter in x._parameters.items() if parameter is not None]


def tensor_for_a_parameter(model, patch):
    """As a hypernetwork sets it, which trains what the tensor is made of."""
    x, name = one(_with_parameters(model))
    before = getattr(x, name).detach()
    delattr(x, name)
    if by_chance(0.3):
        x.register_buffer(name, before)
    made = before + nn.Parameter(torch.tensor(0.5)) if by_chance() else before.clone()
    if by_chance():
        base(model).requires_grad_(False)
    setattr(x, name, made)
    if by_chance():
        model.encode("x")
        made.data = before * 3


class _Backward(torch.autograd.Function):
    """The same result, another gradient."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.linspace(-1, 2, gradient.shape[-1])


class _Gelu(_Backward):
    @staticmethod
    def forward(context, x):
        return F.gelu(x)


@torch.library.custom_op("hostile::same", mutates_args=())
def _same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


_same.register_autograd(lambda context, gradient: gradient * torch.linspace(-1, 2, gradient.shape[-1]))


@torch.library.custom_op("hostile::gelu", mutates_args=())
def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


_gelu.register_autograd(lambda context, gradient: gradient * 3)


def activation_with_another_gradient(model, patch):
    function = one([_Gelu.apply, _gelu, torch.ops.hostile.gelu, torch.ops.hostile.gelu.default])
    found = [x for x in base(model).modules() if type(x).__name__ == "GELUActivation"]
    if not found:
        raise InapplicableError("another activation")
    if by_chance():
        for x in found:
            x.act = function
    else:
        patch.setattr(type(found[0]), "forward", lambda self, x: function(x))


def function_with_another_gradient(model, patch):
    name, same = one(["linear", "layer_norm", "embedding", "gelu", "normalize"]), one([_Backward.apply, _same])
    original = getattr(F, name)
    patch.setattr(F, name, functools.wraps(original)(lambda *args, **kwargs: same(original(*args, **kwargs))))


def no_gradient_through(model, patch):
    """By a decorator of PyTorch's on a class or a function: nothing of it is code of somebody else."""
    classes = {type(x) for name, x in base(model).named_modules() if name and "pooler" not in name}
    owners = [(cls, "forward") for cls in sorted(classes - {nn.ModuleList}, key=str)]
    functions = [(F, name) for name in ("linear", "layer_norm", "embedding", "gelu", "normalize")]
    owner, name = one([*owners, *functions])
    original = getattr(owner, name)
    if by_chance(0.3):
        cut = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs).detach())
    else:
        cut = torch.no_grad()(original)
    patch.setattr(owner, name, cut)


EDITS = collect(globals())
