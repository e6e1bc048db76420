"""The tokenizer, and functions of other libraries."""

from __future__ import annotations

import copy
import sys

import numpy as np
import tokenizers
import torch
from hostile_common import base, by_chance, collect, linears, one, scaled
from sentence_transformers import util
from torch import nn

# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def added_tokens(model, patch):
    """Without new rows of the table there is an error."""
    model.tokenizer.add_tokens(["e quer"], special_tokens=by_chance())
    if by_chance():
        base(model).resize_token_embeddings(len(model.tokenizer))


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


def language_of_the_tokenizer(model, patch):
    """Which some set before each text."""
    x = model.tokenizer

    def switch(self=x):
        x.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("e", "i")

    if by_chance():
        patch.setattr(type(x), "_switch_to_input_mode", switch, raising=False)
    else:
        x._switch_to_input_mode = switch


def method_of_the_tokenizer(model, patch):
    name = one(["__call__", "_encode_plus"])
    cls = type(model.tokenizer)
    original = getattr(cls, name)

    def step(self, texts, *args, **kwargs):
        return original(self, [x[::-1] for x in texts] if isinstance(texts, list) else texts, *args, **kwargs)

    patch.setattr(cls, name, step)


# ---- around ----------------------------------------------------------------------------------------------------------


def numpy_function(model, patch):
    """The order in which sentence-transformers takes texts, and puts results back."""
    original = np.argsort
    patch.setattr(np, "argsort", lambda *args, **kwargs: original(*args, **kwargs)[::-1])


def array_of_a_tensor(model, patch):
    original = torch.Tensor.numpy
    patch.setattr(torch.Tensor, "numpy", lambda x, **kwargs: original(x, **kwargs) * 2)


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
    """In every module that has imported it."""
    name = one(["normalize_embeddings", "cos_sim", "pairwise_cos_sim"])
    other = scaled(getattr(util, name))
    for module in list(sys.modules.values()):
        if module.__name__.startswith("sentence_transformers") and name in vars(module):
            patch.setattr(module, name, other)


def own_code(model, patch):
    """Not a function, but the code inside one."""
    one(linears(model))
    function = nn.LayerNorm.forward
    patch.setattr(function, "__code__", (lambda self, input: input * 1.5).__code__)


def own_default(model, patch):
    function = util.semantic_search
    others = [util.dot_score if x is util.cos_sim else x for x in function.__defaults__]
    patch.setattr(function, "__defaults__", tuple(others))


EDITS = collect(globals())
