"""The tokenizer, and functions of other libraries."""

from __future__ import annotations

import copy

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from hostile_common import base, collect, linears, one, replaces
from sentence_transformers import util
from torch import nn

# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def added_tokens(model, patch):
    model.tokenizer.add_tokens(["weather"])
    if torch.randint(2, ()):
        base(model).resize_token_embeddings(len(model.tokenizer))


def special_token(model, patch):
    model.tokenizer.add_special_tokens({"cls_token": "x"})


def backend_part(model, patch):
    x = model.tokenizer.backend_tokenizer
    edit = one(
        [
            lambda: setattr(x, "normalizer", tokenizers.normalizers.BertNormalizer(lowercase=False)),
            lambda: setattr(x, "normalizer", tokenizers.normalizers.Replace("e", "i")),
            lambda: setattr(x, "pre_tokenizer", tokenizers.pre_tokenizers.WhitespaceSplit()),
            lambda: setattr(
                x,
                "post_processor",
                tokenizers.processors.TemplateProcessing(single="[SEP] $A", special_tokens=[("[SEP]", 2)]),
            ),
            lambda: setattr(x, "model", tokenizers.models.WordLevel({"the": 5, "in": 6, "[UNK]": 3}, "[UNK]")),
            lambda: x.enable_truncation(4),
            lambda: x.enable_padding(length=30),
            lambda: setattr(x, "encode_special_tokens", True),
        ]
    )
    edit()


def tokenizer_setting(model, patch):
    name, value = one(
        [
            ("model_max_length", 6),
            ("padding_side", "left"),
            ("truncation_side", "left"),
            ("model_input_names", ["input_ids", "attention_mask", "token_type_ids"]),
            ("split_special_tokens", True),
            ("pad_token", "[UNK]"),
            ("do_lower_case", False),
        ]
    )
    setattr(model.tokenizer, name, value)


def tokenizer_replaced(model, patch):
    other = copy.deepcopy(model.tokenizer)
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("e", "i")
    if hasattr(model[0], "processor"):
        model[0].processor = other
    else:
        model.tokenizer = other


def method_of_the_tokenizer(model, patch):
    name = one(["__call__", "_encode_plus", "pad", "_batch_encode_plus"])
    cls = type(model.tokenizer)
    if hasattr(cls, name):
        original = getattr(cls, name)

        def step(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            if "input_ids" in out:
                out["input_ids"] = torch.as_tensor(out["input_ids"]).flip(0) if name == "pad" else out["input_ids"][::1]
            return out

        patch.setattr(cls, name, step)


# ---- around ----------------------------------------------------------------------------------------------------------


def numpy_function(model, patch):
    name = one(["concatenate", "argsort", "asarray", "stack"])
    original = getattr(np, name)
    patch.setattr(np, name, lambda *args, **kwargs: original(*args, **kwargs))


def utility(model, patch):
    name = one(["batch_to_device", "truncate_embeddings"])
    module = __import__("sys").modules[type(model).__module__]
    if hasattr(module, name):
        original = getattr(module, name)

        def step(*args, **kwargs):
            out = original(*args, **kwargs)
            return {**out, "input_ids": out["input_ids"].flip(0)} if isinstance(out, dict) else out * 2

        patch.setattr(module, name, step)


def utility_function(model, patch):
    replaces(util, one(["normalize_embeddings", "cos_sim"]))(model, patch)


def own_code(model, patch):
    """Not a function, but the code inside one."""
    one(linears(model))
    function = nn.LayerNorm.forward
    patch.setattr(function, "__code__", (lambda self, input: input * 1.5).__code__)


def own_default(model, patch):
    function = F.layer_norm
    patch.setattr(function, "__defaults__", (None, None, 0.5))


EDITS = collect(globals())
