"""What runs in place of ``BertModel.forward`` and its kin, for the models that are marked; the others never see it.

A class is patched when its first model is marked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sentfast import switch
from sentfast.encoder import (
    Composed,
    Encoder,
    Packed,
    choice,
    encoder_or_parts,
    pack_on_device,
    pack_padded,
    token_embeddings,
)
from sentfast.encoder.architecture import Architecture, architecture_of
from sentfast.encoder.device import composed
from sentfast.encoder.examine import Parts
from sentfast.integrations import guards, loaders

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_OUTPUTS = ("output_attentions", "output_hidden_states")

_lock = threading.RLock()
_marked: WeakSet[nn.Module] = WeakSet()
_sites: dict[type, switch.Site] = {}  # by the class that is patched


class Signature(NamedTuple):
    """Of the original: names in order of position, and whether it takes others."""

    names: tuple[str, ...]
    more: bool


def mark(model: nn.Module) -> None:
    """Lets calls of a base model run packed; one that cannot runs the original and is counted."""
    if model in _marked or choice.is_off(model):
        return
    found = architecture_of(type(model))
    if found is None:
        return
    architecture, owner = found
    build = functools.partial(_build, architecture)
    with _lock:
        _marked.add(model)
        site = _sites.setdefault(owner, switch.Site(f"{owner.__name__}.forward", owner, "forward", build))
        switch.add(site)


def unmark(model: nn.Module) -> None:
    """Undoes :func:`mark`."""
    with _lock:
        _marked.discard(model)
    sweep()


def sweep() -> None:
    """Restores the classes of which no marked model is left."""
    with _lock:
        alive = [type(model) for model in _marked]
        for owner in list(_sites):
            if not any(issubclass(cls, owner) for cls in alive):
                switch.remove(_sites.pop(owner))


def _build(architecture: Architecture, original: Callable) -> Callable:
    parameters = list(inspect.signature(original).parameters.values())[1:]
    signature = Signature(
        tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD),
        any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters),
    )
    attempt = functools.partial(_forward, architecture, signature)
    accelerated = guards.accelerated(f"{architecture.model_class}.forward", original, attempt)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self not in _marked:
            return original(self, *args, **kwargs)
        return accelerated(self, *args, **kwargs)

    setattr(forward, guards.MARK, True)
    return forward


def _forward(architecture: Architecture, signature: Signature, model: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = _arguments(signature, args, kwargs)
    if isinstance(arguments, str):
        return arguments
    form = _form(model, arguments)
    if isinstance(form, str):
        return form
    found = encoder_or_parts(model, choice.chosen(model) or "match", inside=True)
    if isinstance(found, str):
        return found
    inputs = [arguments.get(name) for name in _INPUTS]
    hidden = _on_device(found, inputs) if composed(found.device) else _on_cpu(found, inputs)  # type: ignore[arg-type]
    return hidden if isinstance(hidden, str) else _outputs(architecture, model, hidden, form)


def _on_cpu(found: Encoder | Parts, inputs: list[Any]) -> Tensor | str:
    packed = pack_padded(found.tables, *inputs)
    if isinstance(packed, str):
        return packed
    return _infer(found, packed) if isinstance(found, Encoder) else _train(found, packed)


def _on_device(found: Composed | Parts, inputs: list[Any]) -> Tensor | str:
    loaders.watch()
    batch = pack_on_device(found.tables, found.device, *inputs)
    if isinstance(batch, str):
        return batch
    if isinstance(found, Composed):
        return batch.pad(found.hidden(batch))
    ids, types, positions, cu_seqlens, longest, *_ = batch
    return batch.pad(token_embeddings(found, ids, cu_seqlens, longest, types, positions))


def _infer(encoder: Encoder, packed: Packed) -> Tensor:
    return encoder.run(
        packed.input_ids,
        packed.cu_seqlens,
        token_type_ids=packed.token_type_ids,
        position_ids=packed.position_ids,
        padded_length=packed.length,
        checked=True,
    )


def _train(parts: Parts, packed: Packed) -> Tensor:
    ids, ends = packed.input_ids, packed.cu_seqlens
    positions = parts.tables.count_positions(ids, ends) if packed.position_ids is None else packed.position_ids
    longest = int(ends.diff().max())
    return packed.pad(token_embeddings(parts, ids, ends, longest, packed.token_type_ids, positions))


def _arguments(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | str:
    """By name; a call that the original refuses, or whose arguments we do not know, is for the original."""
    names, more = signature
    arguments = dict(zip(names, args, strict=False))
    if len(args) > len(names) or not arguments.keys().isdisjoint(kwargs):
        return "SF107"
    arguments.update(kwargs)
    for name, value in arguments.items():
        known = name in (*_INPUTS, *_OUTPUTS, "return_dict")
        if name not in names and not (more and known):
            return "SF107"
        if name in _OUTPUTS and value:
            return "SF121"
        if value is not None and value is not False and not known:
            return "SF107"
    return arguments


def _form(model: Any, arguments: dict[str, Any]) -> bool | str:
    """Whether the outputs come as an object; else as a tuple."""
    config = vars(model.config)  # its own look-up costs a microsecond
    by_default = config.get("return_dict", True) and not config.get("torchscript", False)
    asked = arguments.get("return_dict")
    # The versions of transformers read None and a missing pooler differently.
    if asked is None and "return_dict" in arguments and not by_default:
        return "SF121"
    as_object = by_default if asked is None else bool(asked)
    if not as_object and getattr(model, "pooler", model) is None:
        return "SF121"
    return as_object


def _outputs(architecture: Architecture, model: Any, hidden: Tensor, as_object: bool) -> Any:
    values = {"last_hidden_state": hidden}
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        values["pooler_output"] = pooler(hidden)
    if not as_object:
        return tuple(values.values())
    return _output_class(architecture.output_class)(**values)


@functools.cache
def _output_class(name: str) -> type:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)
