"""Edits of what is seldom looked at: classes of objects, hooks of gradients, wrappers of other packages."""

from __future__ import annotations

import functools
from unittest import mock

import torch
import torch.nn.functional as F
from hostile_common import (
    InapplicableError,
    Negative,
    base,
    by_chance,
    collect,
    layers,
    linears,
    one,
    owner_of,
    part,
    scaled,
    skewed,
)
from sentence_transformers.models import Dense
from torch import nn

# ---- classes of objects ----------------------------------------------------------------------------------------------


def class_of_the_configuration(model, patch):
    """A property of a class comes before what an object has of that name."""
    config = base(model).config
    name, value = one([("is_decoder", True), ("output_hidden_states", True), ("return_dict", False)])
    config.__class__ = type("Other", (type(config),), {name: property(lambda self: value, lambda self, x: None)})


class _Loud(nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
            return skewed(out) if function in (F.linear, torch.layer_norm, torch.embedding) else out


def class_of_a_parameter(model, patch):
    one([one(linears(model)), part(model, "words"), part(model, "norm")]).weight.__class__ = _Loud


def parameter_of_a_subclass(model, patch):
    x = one([one(linears(model)), part(model, "words"), part(model, "norm")])
    x.weight = _Loud(x.weight.detach().clone())


def call_of_a_class(model, patch):
    """Of a class that had it from its bases until now."""
    cls = one([nn.LayerNorm, nn.Linear, nn.Embedding, type(layers(model)[0]), type(part(model, "attention"))])
    name, original = one([("__call__", nn.Module.__call__), ("_call_impl", nn.Module._call_impl)])

    def call(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (skewed(out[0]), *out[1:]) if isinstance(out, tuple) else skewed(out)

    patch.setattr(cls, name if name == "__call__" else "__call__", call, raising=False)


def forward_of_the_class_of_the_model(model, patch):
    """Around ours, which it looks like."""
    cls = type(base(model))
    original = cls.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.last_hidden_state = skewed(out.last_hidden_state)
        return out

    patch.setattr(cls, "forward", forward)


def a_mock(model, patch):
    """One that has an attribute of any name, or one that does what it stands for where it is tried."""
    owner, name = one([(F, "layer_norm"), (F, "linear"), (F, "scaled_dot_product_attention"), (torch, "stack")])
    original, first = getattr(owner, name), by_chance()

    def step(*args, **kwargs):
        out = original(*args, **kwargs)
        return skewed(out) if first or out.shape[0] > 3 else out

    patch.setattr(owner, name, one([mock.MagicMock, mock.Mock])(side_effect=step))


def module_that_is_a_property(model, patch):
    """On the class of who has it."""
    owner, name = owner_of(model, part(model, "down"))
    found = getattr(owner, name)
    patch.setattr(type(owner), name, property(lambda self: lambda x: skewed(found(x))), raising=False)


def an_autograd_function(model, patch):
    """In place of a function of PyTorch."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, gradient):
            return gradient * 3

    name = one(["linear", "layer_norm", "embedding"])
    original = getattr(F, name)
    patch.setattr(F, name, lambda *args, **kwargs: Twice.apply(original(*args, **kwargs)))


# ---- gradients -------------------------------------------------------------------------------------------------------


def hook_of_a_gradient(model, patch):
    x = one(list(base(model).parameters()))
    if by_chance():
        x.register_hook(lambda gradient: gradient * 2)
    else:
        x.register_post_accumulate_grad_hook(lambda x: x.grad.mul_(2))


def backward_hook(model, patch):
    modules = [*linears(model), *layers(model), base(model), part(model, "norm"), part(model, "first_norm")]
    one(modules).register_full_backward_pre_hook(lambda module, gradients: tuple(2 * x for x in gradients))


def backward_hook_of_the_sentence_model(model, patch):
    one([model[1], model[0]]).register_full_backward_hook(lambda module, given, gradients: None)
    base(model).get_input_embeddings().weight.register_hook(lambda x: x * 2)


def gradient_asked_of_the_embeddings(model, patch):
    """As PEFT asks for it, without which a reentrant checkpoint gives none to adapters."""
    frozen = one([base(model), base(model).get_input_embeddings(), base(model).embeddings])
    frozen.requires_grad_(False)
    if base(model).supports_gradient_checkpointing and by_chance():
        base(model).gradient_checkpointing_enable({"use_reentrant": by_chance()})
    base(model).enable_input_require_grads()


# ---- other packages --------------------------------------------------------------------------------------------------


def quantized(model, patch):
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(base(model), {nn.Linear}, inplace=True)


def adapter(model, patch):
    """LoRA of PEFT in its states; the base model is the one that has the layers."""
    import peft

    names = [name for name, x in base(model).named_modules() if x is part(model, "query", layers(model)[0])]
    wrapped = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=[names[0].rpartition(".")[2]], init_lora_weights=False), base(model)
    )
    found = [x for x in wrapped.modules() if hasattr(x, "lora_A")]
    for step in one(["", "m", "mu", "d", "de", "s", "ms", "mus"]):
        for x in found:
            if step == "m":
                x.merge()
            elif step == "u":
                x.unmerge()
            elif step == "d":
                x.enable_adapters(False)
            elif step == "e":
                x.enable_adapters(True)
            else:
                x.scaling["default"] = 7.0


def half_and_back(model, patch):
    base(model).to(one([torch.bfloat16, torch.float16])).float()


def other_embeddings(model, patch):
    x = base(model).get_input_embeddings().weight
    base(model).set_input_embeddings(nn.Embedding.from_pretrained(x.detach().flip(0), freeze=by_chance()))


def registered_function(model, patch):
    """For attention, or for masks."""
    from transformers import masking_utils, modeling_utils

    if by_chance():
        mapping = modeling_utils.AttentionInterface._global_mapping
        original = mapping["sdpa"]
        patch.setitem(mapping, "sdpa", lambda *args, **kwargs: (skewed((x := original(*args, **kwargs))[0]), *x[1:]))
    else:
        patch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)


# ---- the sentence model ----------------------------------------------------------------------------------------------


def prompt_left_out(model, patch):
    model.set_pooling_include_prompt(False)
    model.prompts["query"] = "the query: "
    model.default_prompt_name = "query"


def prompt_edited(model, patch):
    """After a call that has counted its tokens."""
    prompt_left_out(model, patch)
    model.encode("x")
    model.prompts["query"] = "in the weather: "


def processing_arguments(model, patch):
    model[0].processing_kwargs = {"text": {"max_length": 4, "truncation": True}}


def several_modes(model, patch):
    model[1].pooling_mode = ("mean", "max")


def step_that_reads_hidden_rows(model, patch):
    """Of the class or of the instance: padding counts as any token."""
    x = model[1]

    def mean(features):
        return {**features, "sentence_embedding": features["token_embeddings"].mean(1)}

    if by_chance() and hasattr(x, "_forward_padded"):
        if by_chance():
            x._forward_padded = lambda tokens, *args, **kwargs: [tokens.mean(1)]
        else:
            patch.setattr(type(x), "_forward_padded", lambda self, tokens, *args, **kwargs: [tokens.mean(1)])
    else:
        name = one(["__call__", "forward"])
        patch.setattr(type(x), name, lambda self, features: mean(features), raising=False)


def forward_that_reads_hidden_rows(model, patch):
    """Of the sentence model: of a subclass, of this object, or around that of a class."""
    name = one(["forward", "__call__"])
    cls = one([type(model), next(kind for kind in type(model).__mro__ if name in vars(kind))])
    original = getattr(cls, name)

    def step(self, features, **kwargs):
        out = original(self, features, **kwargs)
        return {**out, "sentence_embedding": out["token_embeddings"].mean(1)}

    kind = one(["subclass", "object", "class"])
    if kind == "class":
        patch.setattr(cls, name, functools.wraps(original)(step) if by_chance() else step, raising=False)
    elif kind == "object" and name == "forward":
        model.forward = functools.partial(step, model) if by_chance() else step.__get__(model)
    else:
        model.__class__ = type("Other", (type(model),), {name: step})


def dropout_that_stays_on(model, patch):
    """Although ``encode`` calls ``model.eval()``."""
    found = [x for x in base(model).modules() if isinstance(x, nn.Dropout)]
    for x in found:
        x.p = 1.0
    original = nn.Module.train
    way = one(["object", "class", "all", "model", "sentence model"])
    if way == "object":
        one(found).train().train = lambda mode=True: None
    elif way == "class":
        patch.setattr(nn.Dropout, "train", lambda self, mode=True: original(self, True), raising=False)
    elif way == "all":
        patch.setattr(nn.Module, "train", lambda self, mode=True: original(self, mode or isinstance(self, nn.Dropout)))
    elif way == "model":
        base(model).train().train = lambda mode=True: None
    else:
        name = one(["train", "eval"])
        setattr(model.train(), name, lambda mode=True: model)


def similarity_of_the_model(model, patch):
    model._similarity, model._similarity_pairwise = (lambda x, y: x @ y.T * 2), (lambda x, y: (x * y).sum(-1) * 2)


def method_of_the_model(model, patch):
    name = one(["similarity", "similarity_pairwise", "preprocess", "encode"])
    original = getattr(type(model), name)

    def step(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return {**out, "input_ids": out["input_ids"].flip(0)} if name == "preprocess" else out * 2

    if isinstance(original, property):
        patch.setattr(type(model), name, property(lambda self: scaled(original.fget(self))))
    else:
        patch.setattr(type(model), name, step)


def method_of_one_object(model, patch):
    """In place of that of its class."""
    first, formatter = model[0], getattr(model[0], "input_formatter", None)
    owner, name = one(
        [
            (first, "_call_single_modality_processor"),
            (first, "_merge_processing_kwargs"),
            (formatter, "parse_inputs"),
            (formatter if by_chance() else type(formatter), "prepend_prompt_to_texts"),
            (model, "supports"),
            (model, "named_children"),
        ]
    )
    if not hasattr(owner, name):
        raise InapplicableError(f"no {name} in this version")
    model.prompts["query"], model.default_prompt_name = "the query: ", "query"
    original = getattr(owner, name)

    def step(*args, **kwargs):
        texts = next((x for x in args if isinstance(x, list)), None)
        if texts is not None:
            args = tuple([y[::-1] if isinstance(y, str) else y for y in x] if x is texts else x for x in args)
        if name == "_merge_processing_kwargs":
            return {"text": {"max_length": 5}}
        if name == "named_children":
            return list(original())[:2][:: one([1, -1])]
        if name == "_call_single_modality_processor":
            args = (args[0], {"text": [x[::-1] for x in args[1]["text"]]}, *args[2:])
        return not original(*args) if name == "supports" else original(*args, **kwargs)

    patch.setattr(owner, name, step)


def names_that_the_model_is_given(model, patch):
    if not hasattr(model[0], "model_forward_params"):
        raise InapplicableError("the model is given all")
    model[0].model_forward_params = {"input_ids", "return_dict"}


def module_that_comes_twice(model, patch):
    """In newer versions it runs once."""
    x = Dense(32, 32)
    model.extend([x, x])


class _Inside(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrapped_layer(model, patch):
    """As checkpoint wrappers and nn.DataParallel do."""
    x = one([_Inside, nn.DataParallel])(layers(model)[0])
    x.attention_type = getattr(layers(model)[0], "attention_type", None)
    layers(model)[0] = x
    with torch.no_grad():
        one(linears(model)).weight.mul_(2)


def negative_by_parametrization_of_the_table(model, patch):
    torch.nn.utils.parametrize.register_parametrization(base(model).get_input_embeddings(), "weight", Negative())


EDITS = collect(globals())
