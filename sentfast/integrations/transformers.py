"""What runs in place of ``BertModel.forward`` and its kin, for the models that are marked; the others never see it.

A class is patched when its first model is marked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sentfast import locks, switch, weak
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
from sentfast.integrations import guards, hidden_rows, loaders

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_OUTPUTS = ("output_attentions", "output_hidden_states")
# What modules of sentence-transformers leave in the features, from which the next call of the model takes its
# arguments. No code of transformers reads them.
_LEFT = frozenset(
    {
        "token_embeddings",
        "sentence_embedding",
        "token_weights_sum",
        "scores",
        "sentence_embedding_backbone",
        "sentence_embedding_encoded",
        "sentence_embedding_encoded_4k",
        "auxiliary_embedding",
        "decoded_embedding_k",
        "decoded_embedding_4k",
        "decoded_embedding_aux",
        "decoded_embedding_k_pre_bias",
    }
)

_lock = locks.new()
_marked = weak.Set()
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
        site = _sites.setdefault(owner, switch.Site(f"{owner.__name__}.forward", owner, "forward", build))
        switch.add(site)
        _marked.add(model)  # last: a model that is marked is not looked at again


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

    guards.mark(forward)
    return forward


def _forward(architecture: Architecture, signature: Signature, model: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = _arguments(signature, args, kwargs)
    if isinstance(arguments, str):
        return arguments
    form = _form(architecture, model, arguments)
    if isinstance(form, str):
        return form
    found = encoder_or_parts(model, choice.chosen(model) or "match", inside=True)
    if isinstance(found, str):
        return found
    inputs = [arguments.get(name) for name in _INPUTS]
    run = _on_device if composed(found.device) else _on_cpu
    hidden = run(model, found, inputs)  # type: ignore[arg-type]
    if hidden is None:
        hidden = _every_row(model, inputs)
    return hidden if isinstance(hidden, str) else _outputs(architecture, model, hidden, form)


def _on_cpu(model: nn.Module, found: Encoder | Parts, inputs: list[Any]) -> Tensor | str | None:
    """The rows that the mask leaves; None where the others are read too."""
    packed = pack_padded(found.tables, *inputs)
    if isinstance(packed, str):
        return packed
    if packed.padded and _read(model):
        return None
    return _infer(found, packed) if isinstance(found, Encoder) else _train(found, packed)


def _on_device(model: nn.Module, found: Composed | Parts, inputs: list[Any]) -> Tensor | str | None:
    loaders.watch()
    batch = pack_on_device(found.tables, found.device, *inputs)
    if isinstance(batch, str):
        return batch
    if batch.rows is not None and _read(model):
        return None
    if isinstance(found, Composed):
        return batch.pad(found.hidden(batch))
    ids, types, positions, cu_seqlens, longest, *_ = batch
    return batch.pad(token_embeddings(found, ids, cu_seqlens, longest, types, positions))


def _read(model: nn.Module) -> bool:
    """Whether rows that the mask hides are read."""
    if hidden_rows.read(model):
        return True
    hidden_rows.left_zero(model)
    return False


def _every_row(model: nn.Module, inputs: list[Any]) -> Tensor | str:
    """Those that the mask hides too: they see the tokens that it leaves, and are seen by none."""
    parts = encoder_or_parts(model, inside=True, steps=True)
    if isinstance(parts, str):
        return parts
    assert isinstance(parts, Parts)
    ids, mask, types, positions = inputs
    visible = mask.bool()
    window = max(parts.windows, default=-1)
    if window >= 0 and ids.shape[1] - int(visible.sum(1).min()) > window:
        return "SF130"  # a row that sees no token at all
    if composed(parts.device):
        batch = pack_on_device(parts.tables, parts.device, ids, None, types, positions)
        if isinstance(batch, str):
            return batch
        ids, types, positions, ends, longest, *_ = batch
    else:
        packed = pack_padded(parts.tables, ids, None, types, positions)
        if isinstance(packed, str):
            return packed
        ids, ends, types, positions, longest = packed
        positions = parts.tables.count_positions(ids, ends) if positions is None else positions
    return token_embeddings(parts, ids, ends, longest, types, positions, visible).view(*visible.shape, -1)


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
        if more and name in _LEFT and name not in names:
            continue
        known = name in (*_INPUTS, *_OUTPUTS, "return_dict")
        if name not in names and not (more and known):
            return "SF107"
        if name in _OUTPUTS and value:
            return "SF121"
        if value is not None and value is not False and not known:
            return "SF107"
    return arguments


def _form(architecture: Architecture, model: Any, arguments: dict[str, Any]) -> bool | str:
    """Whether the outputs come as an object; else as a tuple."""
    config = vars(model.config)  # its own look-up costs a microsecond
    by_default = config.get("return_dict", True) and not config.get("torchscript", False)
    asked = arguments.get("return_dict")
    # The versions of transformers read None and a missing pooler differently.
    if asked is None and "return_dict" in arguments and not by_default:
        return "SF121"
    as_object = by_default if asked is None else bool(asked)
    pooler = getattr(model, "pooler", None) if architecture.pooler else model
    if pooler is None:
        return as_object or "SF121"
    if pooler is not model and not _described(architecture, type(pooler)):
        return "SF108"
    return as_object


def _described(architecture: Architecture, pooler: type) -> bool:
    """A pooler of another kind may be called with something else, or read rows that the mask hides."""
    return pooler.__name__ == architecture.pooler and pooler.__module__ == architecture.module


def _outputs(architecture: Architecture, model: Any, hidden: Tensor, as_object: bool) -> Any:
    values = {"last_hidden_state": hidden}
    pooler = getattr(model, "pooler", None) if architecture.pooler else None
    if pooler is not None:
        values["pooler_output"] = pooler(hidden)
    if not as_object:
        return tuple(values.values())
    return _output_class(architecture.output_class)(**values)


@functools.cache
def _output_class(name: str) -> type:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)
