"""Code that is replaced: functions, methods, classes, modules."""

from __future__ import annotations

import copy
import functools
import types

import torch
import torch.nn.functional as F
from hostile_common import (
    InapplicableError,
    base,
    collect,
    kind_of,
    layer,
    layers,
    linears,
    one,
    owner_of,
    part,
    replaces,
    scaled,
    skewed,
    stack,
)
from torch import nn
from transformers.activations import GELUActivation

# ---- functions and methods that are replaced -------------------------------------------------------------------------


FUNCTIONS = [
    replaces(F, "layer_norm"),
    replaces(GELUActivation, "forward"),
    replaces(F, "linear"),
    replaces(F, "embedding"),
    replaces(F, "dropout"),
    replaces(F, "normalize"),
    replaces(F, "scaled_dot_product_attention"),
    replaces(torch, "layer_norm"),
    replaces(torch, "embedding"),
    replaces(torch, "cat"),
    replaces(torch, "clamp"),
    replaces(torch.Tensor, "__add__"),
    replaces(torch.Tensor, "__mul__"),
    replaces(torch.Tensor, "__truediv__"),
    replaces(torch.Tensor, "__getitem__"),
    replaces(torch.Tensor, "sum"),
    replaces(torch.Tensor, "transpose"),
    replaces(torch.Tensor, "contiguous"),
    replaces(torch.Tensor, "view"),
    replaces(torch.Tensor, "reshape"),
    replaces(torch.Tensor, "to"),
    replaces(torch.Tensor, "float"),
    replaces(torch.Tensor, "unsqueeze"),
    replaces(torch.Tensor, "cpu"),
    replaces(torch.Tensor, "detach"),
    replaces(torch, "stack"),
    replaces(nn.Linear, "forward"),
    replaces(nn.LayerNorm, "forward"),
    replaces(nn.Embedding, "forward"),
    replaces(nn.Dropout, "forward"),
    replaces(nn.Module, "__call__"),
    replaces(nn.Module, "_call_impl"),
]


def attribute_of_a_class(model, patch):
    """Found before the module of that name, which the instance has."""
    owner, name = owner_of(model, part(model, "down"))
    x = copy.deepcopy(getattr(owner, name))
    with torch.no_grad():
        x.weight.mul_(2)
    patch.setattr(type(owner), name, x, raising=False)


def matmul_of_eager_attention(model, patch):
    base(model).set_attn_implementation("eager")
    patch.setattr(torch, "matmul", scaled(torch.matmul))


def get_attribute(model, patch):
    original = nn.Module.__getattr__

    def found(self, name):
        x = original(self, name)
        return x * 1.5 if name == "weight" and isinstance(x, torch.Tensor) else x

    patch.setattr(nn.Module, "__getattr__", found)


def forward_of_a_layer(model, patch):
    x = layer(model)
    x.forward = types.MethodType(lambda self, *args, **kw: scaled(type(self).forward)(self, *args, **kw), x)


def forward_by_partial(model, patch):
    x = one(linears(model))
    x.forward = functools.partial(lambda x, y: F.linear(y, x.weight * 2, x.bias), x)


def class_of_a_linear(model, patch):
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    one(linears(model)).__class__ = Other


def class_of_the_model(model, patch):
    class Other(type(base(model))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = skewed(out.last_hidden_state)
            return out

    base(model).__class__ = Other


def call_of_a_subclass(model, patch):
    """Of the module that runs the layers, or of the model where it does that itself."""

    class Other(type(stack(model))):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state.flip(-1)
            return out

    stack(model).__class__ = Other


def own_module(model, patch):
    """LoRA by hand."""

    class Lora(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside, self.a = inside, nn.Parameter(torch.randn_like(inside.weight) * 0.3)

        def forward(self, x):
            return self.inside(x) + x @ self.a.t()

    linear = part(model, "query")
    owner, name = owner_of(model, linear)
    setattr(owner, name, Lora(linear))


def swapped_layers(model, patch):
    x = layers(model)
    x[0], x[1] = x[1], x[0]


def fewer_layers(model, patch):
    owner, name = owner_of(model, layers(model))
    setattr(owner, name, layers(model)[:1])


def appended_layer(model, patch):
    layers(model).append(copy.deepcopy(layers(model)[0]))


def deleted_layer(model, patch):
    del layers(model)[-1]


def shared_layer(model, patch):
    layers(model)[1] = layers(model)[0]


def identity_for_a_norm(model, patch):
    owner, name = owner_of(model, part(model, "norm"))
    setattr(owner, name, nn.Identity())


def module_in_the_dictionary(model, patch):
    owner, name = owner_of(model, part(model, "down"))
    x = owner._modules[name] = copy.deepcopy(owner._modules[name])
    with torch.no_grad():
        x.weight.mul_(2)


def no_bias(model, patch):
    with_bias = [x for x in linears(model) if x.bias is not None]
    if not with_bias:
        raise InapplicableError(f"{kind_of(model)} has no bias")
    one(with_bias).bias = None


EDITS = collect(globals())
