"""Which models `encode` runs fused: a Transformer, a Pooling, then modules that read the sentence embedding alone."""

from __future__ import annotations

import functools
import importlib
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sentfast import functional
from sentfast.encoder import Composed, Encoder, choice, encoder_of
from sentfast.integrations import guards, modules, tokenize
from sentfast.integrations.versions import Version

EMBEDDING = "sentence_embedding"

# What the original loop calls; a subclass or an instance that has its own expects it to run.
_MODEL_STEPS = ("__call__", "forward", "preprocess", "tokenize", "_can_flatten_inputs", "_resolve_inference_device")
_TRANSFORMER_STEPS = ("forward", "preprocess", "tokenize", "_call_processor", "_get_prompt_length")

# Activations whose vector and scalar code agree to the bit.
_EXACT_ACTIVATIONS = (nn.Identity, nn.Tanh, nn.ReLU)
_LANES = 16
# From seven rows on, the order of a sum in our product does not depend on how many there are.
_ROWS = 7


class Classes(NamedTuple):
    """The classes of sentence-transformers that the fused path knows."""

    model: type
    transformer: type
    pooling: type
    normalize: type
    dense: type
    others: tuple[type, ...]


class Pipeline(NamedTuple):
    """A model as the fused path runs it.

    Attributes:
        encoder: of the base model.
        transformer: the first module.
        modes, excludes_prompt: of the Pooling.
        normalizes: the Pooling is followed by a Normalize, which runs with it.
        tail: the modules after them.
        classes: those of the installed version.
    """

    encoder: Encoder | Composed
    transformer: Any
    modes: tuple[str, ...]
    excludes_prompt: bool
    normalizes: bool
    tail: tuple[nn.Module, ...]
    classes: Classes

    def run_tail(self, x: Tensor) -> Tensor:
        for module in self.tail:
            if x.is_cpu and type(module) is self.classes.dense and _plain_dense(module):
                x = _dense(module, x)
            else:
                x = module({EMBEDDING: x})[EMBEDDING]
        return x


@functools.cache
def classes(version: Version) -> Classes:
    def find(module: str, name: str) -> type:
        return getattr(importlib.import_module(module), name)

    others = "sentence_transformers.sentence_transformer.modules."
    return Classes(
        find(version.model, "SentenceTransformer"),
        find(version.transformer, "Transformer"),
        find(version.pooling, "Pooling"),
        find(version.normalize, "Normalize"),
        find("sentence_transformers.base.modules.dense", "Dense"),
        (find(others + "layer_norm", "LayerNorm"), find(others + "dropout", "Dropout")),
    )


def find(version: Version, model: Any) -> Pipeline | str:
    """The model as the fused path runs it, or the reason code why not."""
    known = classes(version)
    children: tuple[Any, ...] = tuple(model._modules.values())
    if len(children) < 2 or type(children[1]) is not known.pooling or not isinstance(children[0], known.transformer):
        return "SF101"
    transformer, pooling = children[:2]
    if _overridden(model, known.model, _MODEL_STEPS) or _overridden(transformer, known.transformer, _TRANSFORMER_STEPS):
        return "SF110"
    if "forward" in vars(pooling) or not all(_ours(cls) for cls in (known.transformer, known.pooling, known.normalize)):
        return "SF110"
    modes = modules.pooling_modes(version, pooling)
    reason = why_not_run(model, transformer, pooling) or why_not_transformer(transformer)
    reason = reason or modules.why_not_pooling(version, pooling, modes)
    if reason:
        return reason
    tail: tuple[Any, ...] = children[2:]
    normalizes = bool(tail) and type(tail[0]) is known.normalize and not _hooked(tail[0]) and _in_place(tail[0])
    tail = tail[normalizes:]
    for module in tail:
        if type(module) not in (known.normalize, known.dense, *known.others) or not _in_place(module):
            return "SF101"
    base = transformer.auto_model
    found = encoder_of(base, choice.chosen(base) or "match")
    if isinstance(found, str):
        return found
    return Pipeline(found, transformer, modes, not pooling.include_prompt, normalizes, tail, known)


def why_not_run(*parts: Any) -> str:
    """Nobody listens to these modules, and none is compiled."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks or any(map(_hooked, parts)):
        return "SF120"
    return "SF115" if any(part._compiled_call_impl is not None for part in parts) else ""


def why_not_transformer(transformer: Any) -> str:
    """The Transformer reads plain text, changes nothing about it and hands on the last hidden state."""
    text = transformer.modality_config.get("text")
    if len(transformer.modality_config) != 1 or text is None or text["method"] != "forward":
        return "SF101"
    if transformer.transformer_task != "feature-extraction" or transformer.module_output_name != "token_embeddings":
        return "SF101"
    output = text["method_output_name"]
    if output not in ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"]):
        return "SF101"
    if transformer.can_flatten_inputs or transformer.query_expansion is not None:
        return "SF107"
    if any(transformer.processing_kwargs.values()):
        return "SF107"
    return tokenize.why_not(transformer.processor) or _why_not_padding(transformer.processor)


def _why_not_padding(tokenizer: Any) -> str:
    """With padding on the left, the original's positions and so its results depend on the longest text of a batch."""
    return "SF104" if tokenizer.padding_side != "right" else ""


def _overridden(module: Any, cls: type, steps: tuple[str, ...]) -> bool:
    if not vars(module).keys().isdisjoint(steps):
        return True
    found = type(module)
    return found is not cls and any(getattr(found, step, None) is not getattr(cls, step, None) for step in steps)


def _ours(cls: type) -> bool:
    """Its forward is still our replacement."""
    return hasattr(vars(cls)["forward"], guards.MARK)


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _in_place(module: Any) -> bool:
    """The module reads the sentence embedding and writes it."""
    names = vars(module)
    return names.get("module_input_name", EMBEDDING) == names.get("module_output_name", EMBEDDING) == EMBEDDING


def _plain_dense(module: Any) -> bool:
    linear = module.linear
    if type(linear) is not nn.Linear or "forward" in vars(linear) or "forward" in vars(module):
        return False
    if _hooked(module) or _hooked(linear) or module.use_residual:
        return False
    return not guards.tensor(linear.weight)


def _dense(module: Any, x: Tensor) -> Tensor:
    """As Dense.forward, with the same bits for a row whatever rows are with it."""
    linear, count = module.linear, x.shape[0]
    rows = x if count >= _ROWS else nn.functional.pad(x, (0, 0, 0, _ROWS - count))
    x = functional.dot_similarity(rows, linear.weight)[:count]
    if linear.bias is not None:
        x = x + linear.bias
    return _activate(module.activation_function, x.to(linear.weight.dtype))


def _activate(function: Any, x: Tensor) -> Tensor:
    """Row by row, whole vectors at a time, unless the scalar code at a vector's end gives the same bits anyway."""
    if type(function) in _EXACT_ACTIVATIONS:
        return function(x)
    width = x.shape[1]
    rows = nn.functional.pad(x, (0, -width % _LANES))
    return torch.cat([function(row) for row in rows.split(1)])[:, :width]


_training = attrgetter("training")
# The modules below a model, with the encoder that tells whether they are still the same.
_below: WeakKeyDictionary[nn.Module, tuple[Encoder | Composed, list[nn.Module]]] = WeakKeyDictionary()


def find_evaluated(version: Version, model: Any) -> Pipeline | str:
    """:func:`find` after ``model.eval()``, which visits every module and is left out where it would change nothing."""
    if model.training:
        model.eval()
    found = find(version, model)
    if found == "SF122":  # a part of it is in training mode
        model.eval()
        found = find(version, model)
    if isinstance(found, str):
        return found
    below = _below.get(model)
    if below is None or below[0] is not found.encoder:
        below = _below[model] = found.encoder, list(model.modules())[1:]
    if any(map(_training, below[1])):
        model.eval()
    return found
