"""Code that is replaced: functions, methods, classes, modules."""

from __future__ import annotations

import copy
import functools
import types

import torch
import torch.nn.functional as F
from hostile_common import base, collect, layer, linears, one, replaces, scaled
from torch import nn

# ---- functions and methods that are replaced -------------------------------------------------------------------------


FUNCTIONS = [
    replaces(F, "layer_norm"),
    replaces(F, "gelu"),
    replaces(F, "linear"),
    replaces(F, "embedding"),
    replaces(F, "dropout"),
    replaces(F, "normalize"),
    replaces(F, "scaled_dot_product_attention"),
    replaces(torch, "layer_norm"),
    replaces(torch, "embedding"),
    replaces(torch, "matmul"),
    replaces(torch, "cat"),
    replaces(torch, "sum"),
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
    replaces(torch.Tensor, "expand"),
    replaces(torch.Tensor, "unsqueeze"),
    replaces(torch.Tensor, "numpy"),
    replaces(torch.Tensor, "cpu"),
    replaces(torch.Tensor, "detach"),
    replaces(torch, "stack"),
    replaces(nn.Linear, "forward"),
    replaces(nn.LayerNorm, "forward"),
    replaces(nn.Embedding, "forward"),
    replaces(nn.Dropout, "forward"),
    replaces(nn.Module, "__call__"),
    replaces(nn.Module, "_call_impl"),
    replaces(nn.Module, "_wrapped_call_impl"),
    replaces(nn.Module, "__getattr__", 1.5),
]


def attribute_of_a_class(model, patch):
    patch.setattr(type(base(model)), "config", copy.deepcopy(base(model).config), raising=False)


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
            out.last_hidden_state = out.last_hidden_state * torch.arange(out.last_hidden_state.shape[-1])
            return out

    base(model).__class__ = Other


def call_of_a_subclass(model, patch):
    class Other(type(base(model).encoder)):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state.flip(-1)
            return out

    base(model).encoder.__class__ = Other


def own_module(model, patch):
    """LoRA by hand."""

    class Lora(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside, self.a = inside, nn.Parameter(torch.randn(inside.out_features, inside.in_features) * 0.3)

        def forward(self, x):
            return self.inside(x) + x @ self.a.t()

    x = layer(model).attention.self
    x.query = Lora(x.query)


def swapped_layers(model, patch):
    layers = base(model).encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def fewer_layers(model, patch):
    base(model).encoder.layer = base(model).encoder.layer[:1]


def appended_layer(model, patch):
    base(model).encoder.layer.append(copy.deepcopy(base(model).encoder.layer[0]))


def deleted_layer(model, patch):
    del base(model).encoder.layer[0]


def shared_layer(model, patch):
    base(model).encoder.layer[1] = base(model).encoder.layer[0]


def identity_for_a_norm(model, patch):
    layer(model).output.LayerNorm = nn.Identity()


def module_in_the_dictionary(model, patch):
    x = layer(model).output
    x._modules["dense"] = copy.deepcopy(x.dense)
    with torch.no_grad():
        x._modules["dense"].weight.mul_(2)


def no_bias(model, patch):
    one(linears(model)).bias = None


EDITS = collect(globals())
