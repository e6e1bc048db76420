"""What a model looked like when it was examined, compared in few steps at every call."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from sentfast import private
from sentfast.encoder import watch
from sentfast.encoder.examine import has_memory, inner_modules
from sentfast.encoder.model_lookups import ModelLookups
from sentfast.integrations.guards import ours

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_hooks = itemgetter(*_HOOKS)
_backward_hooks = itemgetter(*_BACKWARD_HOOKS)
_version = attrgetter("_version")
_kind = attrgetter("dtype", "device")
_requires_grad = attrgetter("requires_grad")


class Structure:
    """The modules of a model, all that their code looks up, and their modes. Never holds the model itself.

    Attributes:
        inner: the modules that the encoder stands for.
        foreign: what code of somebody else was found among the names; "" for none.
    """

    def __init__(self, model: nn.Module):
        self.inner = [module for _, module in inner_modules(model)]
        spaces = [vars(module) for module in self.inner]
        self.parameters = [p for space in spaces for p in space["_parameters"].values() if p is not None]
        self.buffers = [b for space in spaces for b in space["_buffers"].values() if b is not None]
        self._spaces = spaces
        self._forward, self._own = unmarked(type(model).forward), vars(model)
        lookups = ModelLookups(model, self.inner)
        self.foreign = lookups.foreign
        self._names = watch.names(lookups)
        self._forms = self._forms_now()
        self._kinds = list(map(_kind, self.parameters))
        self._modes = watch.modes(_modes(self.inner))
        self._read_modes()

    def same(self, model: nn.Module) -> bool:
        """The modules, their parameters, and everything else that their code looks up."""
        own = vars(model) is self._own and unmarked(type(model).forward) is self._forward
        return own and self._names.same()

    def same_kinds(self) -> bool:
        """Dtypes and devices."""
        return list(map(_kind, self.parameters)) == self._kinds

    def same_forms(self) -> bool:
        """Sizes and strides, and whether there is memory behind them."""
        return self._forms_now() == self._forms

    def _forms_now(self) -> list[tuple[Any, ...]]:
        return list(map(_form, self.parameters))

    def hooked(self) -> bool:
        """Hooks on inner modules that may see or change what passes."""
        self._renew_modes()
        return self._hooked

    def hooked_backward(self) -> bool:
        return any(chain.from_iterable(map(_backward_hooks, self._spaces)))

    def drops(self) -> bool:
        """A Dropout in training mode, or a module that asks its Dropout for the probability while itself in it.

        As :meth:`hooked` has found it, which is asked first.
        """
        return self._drops

    def requires_grad(self) -> bool:
        """A parameter does, or a hook asks it of the embeddings, as for adapters under checkpointing."""
        return self._asked or any(map(_requires_grad, self.parameters))

    def _renew_modes(self) -> None:
        if not self._modes.same():
            self._modes.renew()
            self._read_modes()

    def _read_modes(self) -> None:
        listened = any(chain.from_iterable(map(_hooks, self._spaces)))
        self._hooked = listened and has_hooks(self._spaces)
        self._asked = listened and any(map(asks_for_gradient, self.inner))
        dropouts = [module for module in self.inner if isinstance(module, nn.Dropout)]
        asking = [module for module in self.inner if type(module).__module__.startswith("transformers.models.")]
        rates = [x.p for x in dropouts] + [vars(x).get("attention_dropout", 0.0) for x in asking]
        self._drops = any(module.training for module in dropouts + asking) and any(
            isinstance(rate, (int, float)) and rate > 0 for rate in rates
        )


def _form(x: Tensor) -> tuple[Any, ...]:
    return (x.layout, x.shape, x.stride(), has_memory(x)) if x.layout == torch.strided else (x.layout, x.shape)


def unmarked(function: Any) -> Any:
    """The original of a function that was replaced by ours."""
    while ours(function):
        function = function.__wrapped__
    return function


def _modes(inner: list[nn.Module]) -> list[tuple[dict, Any, tuple[str, ...], Any]]:
    """Modes and hooks of modules, which may change from call to call."""
    tables: list[tuple[dict, Any, tuple[str, ...], Any]] = []
    for module in inner:
        space = vars(module)
        tables.append((space, module, ("training", *_HOOKS, *(("p",) if isinstance(module, nn.Dropout) else ())), None))
        tables += [(space[name], None, tuple(space[name]), True) for name in _HOOKS]
    return tables


# Modules of transformers whose hooks change no number: one records outputs only when asked to, the other asks for the
# gradient of the embeddings.
_ASKING = "transformers.modeling_utils"
_HARMLESS = ("transformers.utils.output_capturing", _ASKING)


def has_hooks(spaces: list[dict[str, Any]]) -> bool:
    """Hooks that do something, on the way forward."""
    hooks = chain.from_iterable(map(dict.values, chain.from_iterable(map(_hooks, spaces))))
    return any(getattr(hook, "__module__", "") not in _HARMLESS for hook in hooks)


def asks_for_gradient(module: nn.Module) -> bool:
    """Whether ``enable_input_require_grads`` has put its hook on the module: its output gets a gradient."""
    hooks = vars(module)["_forward_hooks"].copy().values()
    return any(getattr(hook, "__module__", "") == _ASKING for hook in hooks)


class State:
    """The memory of a model's tensors: where and how they lie, and every byte of the buffers."""

    def __init__(self, parameters: list[Tensor], buffers: list[Tensor]):
        self._places = watch.Places([*parameters, *buffers])
        self._buffer_places = watch.Places(buffers)
        # What is compared must not be freed meanwhile, whatever the model holds by then.
        self._kept = [x.detach() for x in (*parameters, *buffers)]
        self._buffers = watch.bytes_of([x for x in buffers if x.is_cpu and x.is_contiguous()])
        self._written = Versions([x for x in buffers if not x.is_cpu])

    def same(self) -> bool:
        """All of it."""
        return self._places.same() and self._same_bytes()

    def same_buffers(self) -> bool:
        """Where they are, too: the old memory is kept, and looks the same when a buffer lies elsewhere now."""
        return self._buffer_places.same() and self._same_bytes()

    def _same_bytes(self) -> bool:
        return self._buffers.same(1.0) and self._written.same()


class Versions:
    """How often tensors were written to, as far as PyTorch counts it: not in inference mode, not through ``.data``."""

    def __init__(self, tensors: list[Tensor]):
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._before = list(map(_version, self._counted))

    def same(self) -> bool:
        return list(map(_version, self._counted)) == self._before


def global_hooks() -> bool:
    """Hooks on every module of the process, as profilers set them."""
    return private.any_global_hook()
