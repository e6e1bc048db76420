"""Which models `encode` runs fused: a Transformer, a Pooling, then modules that read the sentence embedding alone."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sentfast import functional, private, weak
from sentfast.encoder import Composed, Encoder, choice, encoder_of, watch
from sentfast.integrations import guards, layers, modules, originals, tail_proof, tokenize
from sentfast.integrations.versions import Version

EMBEDDING = "sentence_embedding"

# What the original loop calls; a subclass or an instance that has its own expects it to run.
_MODEL_STEPS = ("__call__", "forward", "preprocess", "tokenize", "_can_flatten_inputs", "_resolve_inference_device")
_TRANSFORMER_STEPS = ("__call__", "forward", "preprocess", "tokenize", "_call_processor", "_get_prompt_length")

# What the base model is given.
_GIVEN = {"input_ids", "attention_mask", "token_type_ids", "return_dict"}

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
    formatter: type
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
            if x.is_cpu and type(module) is self.classes.dense and _takes_product(module, x):
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
        find("sentence_transformers.base.modality", "InputFormatter"),
        (find(others + "layer_norm", "LayerNorm"), find(others + "dropout", "Dropout")),
    )


@functools.cache
def _original(version: Version) -> originals.Original:
    """The loop of `encode`, and what it runs."""
    known = classes(version)
    return originals.Original([vars(known.model)["_inference"]], [kind for kind in (*known[:-1], *known.others)])


def find(version: Version, model: Any) -> Pipeline | str:
    """The model as the fused path runs it, or the reason code why not."""
    known = classes(version)
    children: tuple[Any, ...] = tuple(model._modules.values())
    if len(set(map(id, children))) < len(children):  # which the original calls once
        return "SF101"
    if len(children) < 2 or type(children[1]) is not known.pooling or not isinstance(children[0], known.transformer):
        return "SF101"
    transformer, pooling = children[:2]
    whole = _original(version)
    if reason := whole.why_not():
        return reason
    if whole.overridden(type(model), known.model) or whole.overridden(type(transformer), known.transformer):
        return "SF110"
    if _overridden(model, known.model, _MODEL_STEPS) or _overridden(transformer, known.transformer, _TRANSFORMER_STEPS):
        return "SF110"
    formatter = transformer.input_formatter
    if type(formatter) is not known.formatter or any(map(whole.replaced, (model, transformer, pooling, formatter))):
        return "SF110"
    if not all(_ours(cls) for cls in (known.transformer, known.pooling, known.normalize)):
        return "SF110"
    modes = modules.pooling_modes(version, pooling)
    reason = why_not_run(model, transformer, pooling) or why_not_transformer(transformer)
    reason = reason or modules.why_not_pooling(version, pooling, modes)
    if reason:
        return reason
    tail: tuple[Any, ...] = children[2:]
    normalizes = bool(tail) and type(tail[0]) is known.normalize and not _why_not_tail(known, tail[0])
    tail = tail[normalizes:]
    reason = next(filter(None, (_why_not_tail(known, module) for module in tail)), "")
    if reason:
        return reason
    base = transformer.auto_model
    if _listened_pooler(base):
        return "SF120"
    found = encoder_of(base, choice.chosen(base) or "match")
    if isinstance(found, str):
        return found
    pipeline = Pipeline(found, transformer, modes, not pooling.include_prompt, normalizes, tail, known)
    return tail_proof.why_not(model, pipeline, whole.epoch) or pipeline


def why_not_run(*parts: Any) -> str:
    """Nobody listens to these modules, and none is compiled."""
    if private.any_global_forward_hook() or any(map(_hooked, parts)):
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
    if any(transformer.processing_kwargs.values()) or not _hands_over(transformer):
        return "SF107"
    return tokenize.why_not(transformer.processor) or _why_not_padding(transformer.processor)


def _hands_over(transformer: Any) -> bool:
    """It takes every text for a text, and its model is given all that the tokenizer makes."""
    formatter, given = transformer.input_formatter, transformer.model_forward_params
    return formatter.supported_modalities == ["text"] and (given is None or given.issuperset(_GIVEN))


def _why_not_padding(tokenizer: Any) -> str:
    """With padding on the left, the original's positions and so its results depend on the longest text of a batch."""
    return "SF104" if tokenizer.padding_side != "right" else ""


def _overridden(module: Any, cls: type, steps: tuple[str, ...]) -> bool:
    if not vars(module).keys().isdisjoint(steps):
        return True
    found = type(module)
    if found is not cls and any(getattr(found, step, None) is not getattr(cls, step, None) for step in steps):
        return True
    return layers.any_foreign(cls, steps)


def _ours(cls: type) -> bool:
    """Its forward is still our replacement, and called as in PyTorch."""
    return guards.ours(vars(cls)["forward"]) and not layers.foreign(cls.__call__)


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _listened_pooler(base: Any) -> bool:
    """It makes nothing of what `encode` returns, but a hook on it is told the token embeddings and may change them."""
    pooler = vars(base).get("_modules", {}).get("pooler")
    return pooler is not None and any(map(_hooked, pooler.modules()))


def _why_not_tail(known: Classes, module: Any) -> str:
    """The module reads the sentence embedding and writes it, each row by itself, and nobody listens to it."""
    cls = type(module)
    if cls not in (known.normalize, known.dense, *known.others) or not _in_place(module):
        return "SF101"
    if cls is known.dense and type(module.activation_function) not in layers.ACTIVATIONS:
        return "SF101"
    parts = list(module.modules())
    if any(type(part) not in layers.ROW_BY_ROW for part in parts[1:]):
        return "SF101"
    if any("forward" in vars(part) or layers.any_foreign(type(part), ("__call__", "forward")) for part in parts):
        return "SF110"
    return why_not_run(*parts)


def _in_place(module: Any) -> bool:
    """The module reads the sentence embedding and writes it."""
    names = vars(module)
    return names.get("module_input_name", EMBEDDING) == names.get("module_output_name", EMBEDDING) == EMBEDDING


def _takes_product(module: Any, x: Tensor) -> bool:
    """Our product stands for the linear layer of a Dense; else the module runs as it is, which may be to raise."""
    if type(module.linear) is not nn.Linear:
        return False
    weight = module.linear.weight
    fits = not module.use_residual and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype
    return fits and not guards.tensor(weight)


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
    if type(function) in layers.EXACT_ACTIVATIONS:
        return function(x)
    width = x.shape[1]
    rows = nn.functional.pad(x, (0, -width % _LANES))
    return torch.cat([function(row) for row in rows.split(1)])[:, :width]


# The modules below a model as ``model.eval()`` has left them: compares that it would leave them so.
_evaluated: weak.Table[Any] = weak.Table()
_SWITCHES = ("train", "eval")


def find_evaluated(version: Version, model: Any) -> Pipeline | str:
    """:func:`find` after ``model.eval()``, which visits every module and is left out where it would change nothing."""
    known = _evaluated.get(model)
    own = not vars(model).keys().isdisjoint(_SWITCHES)
    if model.training or own or known is None or not known.same():
        model.eval()
        _evaluated[model] = watch.modes(_modes(model))
    return find(version, model)


def _modes(model: nn.Module) -> list[tuple[dict, Any, tuple[str, ...], Any]]:
    """Who is below a model, in which mode, and how it is switched."""
    tables: list[tuple[dict, Any, tuple[str, ...], Any]] = []
    kinds: dict[type, None] = {}
    for module in model.modules():
        tables.append((module._modules, None, tuple(module._modules), True))
        kinds.update(dict.fromkeys(type(module).__mro__[:-1]))
        if module is not model:  # which is never held, and was asked
            tables.append((vars(module), module, ("training", "_modules", *_SWITCHES), None))
    return tables + [(watch.dictionary(kind.__dict__), None, _SWITCHES, None) for kind in kinds]
