"""What the files of hostile edits share."""

from __future__ import annotations

import functools
import types

import torch
from torch import nn

TEXTS = [
    "the query weather",
    "in",
    "a passage, long and of many words: weather in the passage 0 1 2 3",
    "x y",
    "[MASK] b",
]


def base(model):
    return model[0].auto_model


def linears(model):
    return [x for x in base(model).encoder.modules() if type(x) is nn.Linear]


def one(items):
    return items[int(torch.randint(len(items), ()))]


def layer(model):
    return one(list(base(model).encoder.layer))


def scaled(function, by=1.5):
    @functools.wraps(function)
    def patched(*args, **kwargs):
        out = function(*args, **kwargs)
        return out * by if isinstance(out, torch.Tensor) and out.is_floating_point() else out

    return patched


def collect(names):
    """The edits of a file by name: functions of a model and a patch."""
    return {
        name: value
        for name, value in names.items()
        if isinstance(value, types.FunctionType)
        and value.__code__.co_varnames[:2] == ("model", "patch")
        and value.__module__ == names["__name__"]
        and not name.startswith("_")
    }


def replaces(owner, name, by=1.5):
    def edit(model, patch):
        patch.setattr(owner, name, scaled(getattr(owner, name), by))

    edit.__name__ = f"{getattr(owner, '__name__', owner)}.{name}"
    return edit


class Negative(nn.Module):
    def forward(self, x):
        return -x
