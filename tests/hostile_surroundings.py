"""What surrounds a call, and the sentence model."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import types

import process_settings
import torch
import torch.nn.functional as F
from hostile_common import TEXTS, InapplicableError, Negative, base, collect, linears, one, part, scaled, skewed
from sentence_transformers import models
from tiny_models import VERSION
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "sentence_embedding"

# ---- contexts --------------------------------------------------------------------------------------------------------


class _Modes:
    class Twice(TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out * 2 if function in (F.linear, torch.nn.functional.linear) else out

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            return out * 2 if "addmm" in str(function) else out


def function_mode(model, patch):
    return _Modes.Twice()


def dispatch_mode(model, patch):
    return _Modes.Dispatched()


def autocast(model, patch):
    stack = contextlib.ExitStack()
    for _ in range(int(torch.randint(1, 3, ()))):
        stack.enter_context(
            torch.autocast("cpu", one([torch.bfloat16, torch.float16]), enabled=bool(torch.randint(2, ())))
        )
    return stack


def gradient_mode(model, patch):
    return one([torch.inference_mode, torch.no_grad, torch.enable_grad])()


def default_dtype(model, patch):
    return process_settings.default_dtype(one([torch.float64, torch.bfloat16]))


@contextlib.contextmanager
def _flags(settings):
    before = [(get(), set_) for get, set_, _ in settings]
    for _, set_, value in settings:
        set_(value)
    try:
        yield
    finally:
        for value, set_ in before:
            set_(value)


def precision_flags(model, patch):
    settings = [(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, one(["medium", "high"]))]
    return _flags(settings)


# ---- the sentence model ----------------------------------------------------------------------------------------------


def pooling_mode(model, patch):
    mode = one(["cls", "max", "lasttoken", "weightedmean"])
    if VERSION >= (5, 4):
        model[1].pooling_mode = mode
    else:
        model[1].pooling_mode_mean_tokens = False
        name = {
            "cls": "cls_token",
            "max": "max_tokens",
            "lasttoken": "lasttoken",
            "weightedmean": "weightedmean_tokens",
        }
        setattr(model[1], f"pooling_mode_{name[mode]}", True)


def pooling_of_a_subclass(model, patch):
    class Other(models.Pooling):
        def forward(self, features):
            features = super().forward(features)
            features["sentence_embedding"] = features["sentence_embedding"] * 2
            return features

    model[1].__class__ = Other


def pooling_step_of_the_instance(model, patch):
    x = model[1]
    name = "_forward_padded" if hasattr(x, "_forward_padded") else "forward"
    original = getattr(x, name)

    def step(*args, **kwargs):
        out = original(*args, **kwargs)
        return (
            [2 * y for y in out]
            if isinstance(out, list)
            else {**out, "sentence_embedding": out["sentence_embedding"] * 2}
        )

    setattr(x, name, step)


def normalized(model, patch):
    model.append(models.Normalize())


def own_normalize(model, patch):
    class Normalize(nn.Module):
        def forward(self, features):
            features["sentence_embedding"] = F.normalize(features["sentence_embedding"], p=1)
            return features

    model.add_module(str(len(model)), Normalize())


def dense(model, patch):
    model.append(models.Dense(32, 8))


def edited_dense(model, patch):
    model.append(models.Dense(32, 32))
    model.encode(TEXTS[:1])
    x = model[len(model) - 1]
    edit = one(
        [
            lambda: setattr(x, "activation_function", nn.ReLU()),
            lambda: setattr(x.activation_function, "forward", lambda y: y * 2),
            lambda: setattr(x.linear, "weight", nn.Parameter(x.linear.weight.detach() * 2)),
            lambda: x.linear.weight.data.mul_(2),
            lambda: setattr(x.linear, "forward", lambda y: y * 2),
            lambda: setattr(x, "use_residual", True),
            lambda: setattr(x, "_compiled_call_impl", lambda given: {**given, NAME: -x.forward(given)[NAME]}),
            lambda: setattr(x, "module_input_name", "token_embeddings"),
            lambda: setattr(x, "linear", nn.Sequential(x.linear, nn.Tanh())),
            lambda: setattr(x.linear, "__class__", type("Own", (nn.Linear,), {"forward": lambda self, y: y * 3})),
            lambda: prune.random_unstructured(x.linear, "weight", amount=0.5),
            lambda: parametrize.register_parametrization(x.linear, "weight", Negative()),
            lambda: x.linear.register_forward_hook(lambda module, args, out: out * 2),
        ]
    )
    edit()


def modules_in_another_order(model, patch):
    model._modules = {"0": model[0], "1": model[1], "2": models.Normalize()}


def lower_limit(model, patch):
    model.max_seq_length = int(torch.randint(3, 9, ()))


def truncated_dimension(model, patch):
    model.truncate_dim = int(torch.randint(1, 32, ()))


def prompts(model, patch):
    model.prompts = {"query": "query: ", "other": "passage "}
    model.default_prompt_name = one(["query", "other"])


def similarity(model, patch):
    model.similarity_fn_name = one(["dot", "euclidean"])


def copied(model, patch):
    """The copy replaces the model; edits of the original must not show."""
    x = one([lambda: copy.deepcopy(base(model)), lambda: pickle.loads(pickle.dumps(base(model)))])()
    with torch.no_grad():
        x.get_input_embeddings().weight.mul_(-1)
    if hasattr(model[0], "model"):
        model[0].model = x
    else:
        model[0].auto_model = x


def transformer_arguments(model, patch):
    name = one(["_get_prompt_length", "forward", "preprocess", "tokenize"])
    if not hasattr(model[0], name):
        return
    original = getattr(model[0], name)
    if name == "forward":

        def step(features, **kwargs):
            out = original(features, **kwargs)
            out["token_embeddings"] = skewed(out["token_embeddings"])
            return out
    elif name == "_get_prompt_length":
        return
    else:

        def step(texts, *args, **kwargs):
            return original([x[::-1] if isinstance(x, str) else x for x in texts], *args, **kwargs)

    setattr(model[0], name, step)


def parameters_for_one_call(model, patch):
    """As ``torch.func.functional_call`` does it, around a call."""
    changed = {name: x.detach() * 0.7 for name, x in base(model).named_parameters()}
    original = type(base(model)).forward
    x = base(model)

    def forward(*args, **kwargs):
        del x.forward
        try:
            return torch.func.functional_call(x, changed, args, kwargs)
        finally:
            x.forward = forward

    assert original
    x.forward = forward


@contextlib.contextmanager
def _default_device():
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(before if before.index is not None or before.type != "cpu" else None)


def default_device(model, patch):
    return _default_device()


def method_of_a_registry(model, patch):
    """The dictionary of attention functions itself."""
    from transformers import modeling_utils

    registry = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if not hasattr(registry, "_global_mapping"):
        return
    name = one(["__getitem__", "get_interface", "get"])
    if hasattr(type(registry), name):
        original = getattr(type(registry), name)

        def found(self, *args, **kwargs):
            function = original(self, *args, **kwargs)

            def attend(*args, **kwargs):
                out = function(*args, **kwargs)
                return (out[0] * 1.5, *out[1:])

            return attend

        patch.setattr(type(registry), name, found)


def mask_function(model, patch):
    """What makes masks, in the model's own module."""
    module = __import__("sys").modules[type(base(model)).__module__]
    names = [
        name for name in ("create_bidirectional_mask", "_prepare_4d_attention_mask_for_sdpa") if hasattr(module, name)
    ]
    for name in names:
        patch.setattr(module, name, lambda *args, **kwargs: None)


def module_of_python(model, patch):
    """Another module under the name ``nn`` or ``torch`` where the model's code looks."""
    module = __import__("sys").modules[type(base(model)).__module__]

    class Other:
        def __getattr__(self, name):
            found = getattr(torch, name)
            return scaled(found) if name == "cat" or name == "tanh" else found

    patch.setattr(module, "torch", Other())


def property_of_the_class(model, patch):
    x = part(model, "down")
    weight = x.weight.detach() * 2

    class Other(nn.Linear):
        @property
        def weight(self):
            return weight

    x.__class__ = Other


def slots_of_the_instance(model, patch):
    """The whole dictionary of one module."""
    x = one(linears(model))
    x.__dict__ = copy.deepcopy(x.__dict__)
    with torch.no_grad():
        x.weight.mul_(2)


def closed_over(model, patch):
    """What a decorator of the library closes over."""
    function = type(base(model)).forward
    while hasattr(function, "__sentfast__"):
        function = function.__wrapped__
    cells = [x for x in function.__closure__ or () if isinstance(x.cell_contents, types.FunctionType)]
    if not cells:
        raise InapplicableError("the version of transformers decorates no forward")
    original = cells[0].cell_contents

    @functools.wraps(original)
    def patched(*args, **kwargs):
        out = original(*args, **kwargs)
        out.last_hidden_state = skewed(out.last_hidden_state)
        return out

    patch.setattr(cells[0], "cell_contents", patched)


def kernel(model, patch):
    library = torch.library.Library("aten", "IMPL")
    library.impl("gelu", lambda x, approximate="none": torch.relu(x), "CPU")
    patch.setattr(library, "_kept", library, raising=False)
    KERNELS.append(library)

    @contextlib.contextmanager
    def until():
        try:
            yield
        finally:
            library._destroy()

    return until()


KERNELS: list = []


EDITS = collect(globals())
