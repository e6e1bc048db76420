"""What a model looked like when it was examined, compared in few steps at every call.

The comparisons run over flat lists inside the interpreter's own loops: a model of 12 layers has 200 parameters, and
one query of a small model takes less time than a loop over them in Python.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from sentfast import native
from sentfast.encoder.examine import inner_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_hooks = itemgetter(*_HOOKS)
_backward_hooks = itemgetter("_backward_hooks", "_backward_pre_hooks")
_training = itemgetter("training")
_version = attrgetter("_version")
_kind = attrgetter("dtype", "device")
_requires_grad = attrgetter("requires_grad")


class Structure:
    """The modules of a model, their classes and parameters. Holds the parts of the model, never the model itself."""

    def __init__(self, model: nn.Module):
        self.inner = [module for _, module in inner_modules(model)]
        self.spaces = [vars(module) for module in self.inner]
        # Only tables that hold something: a child or parameter more is used by other code, which is seen by itself.
        self.child_tables = [table for space in [vars(model), *self.spaces] if (table := space["_modules"])]
        self.parameter_tables = [table for space in self.spaces if (table := space["_parameters"])]
        self.children = list(chain.from_iterable(map(dict.values, self.child_tables)))
        self.slots = list(chain.from_iterable(map(dict.values, self.parameter_tables)))
        self.parameters = [parameter for parameter in self.slots if parameter is not None]
        self.sizes = list(map(len, self.spaces))
        self.types = list(map(type, self.inner))
        self.classes: list[Any] = [type(model), *set(self.types)]
        self.forwards = [cls.forward for cls in self.classes]
        self.kinds = list(map(_kind, self.parameters))

    def same_parts(self) -> bool:
        """The modules and parameters are the same objects."""
        children = list(chain.from_iterable(map(dict.values, self.child_tables)))
        slots = list(chain.from_iterable(map(dict.values, self.parameter_tables)))
        # Modules compare by identity, tensors must not be compared by `==`.
        return children == self.children and len(slots) == len(self.slots) and all(map(is_, slots, self.slots))

    def same_code(self) -> bool:
        """No class was changed, no attribute such as ``forward`` was set on a module."""
        return (
            list(map(len, self.spaces)) == self.sizes
            and list(map(type, self.inner)) == self.types
            and [cls.forward for cls in self.classes] == self.forwards
        )

    def same_kinds(self) -> bool:
        """Dtypes and devices, for a model of which nothing else is known."""
        return list(map(_kind, self.parameters)) == self.kinds

    def hooked(self) -> bool:
        """Hooks on inner modules that may see or change what passes."""
        return any(chain.from_iterable(map(_hooks, self.spaces))) and has_hooks(self.spaces)

    def hooked_backward(self) -> bool:
        return any(chain.from_iterable(map(_backward_hooks, self.spaces)))

    def drops(self) -> bool:
        """A Dropout in training mode, or a module that asks its Dropout for the probability while itself in it."""
        if not any(map(_training, self.spaces)):
            return False
        dropouts = [module for module in self.inner if isinstance(module, nn.Dropout)]
        asking = [module for module in self.inner if type(module).__module__.startswith("transformers.models.")]
        return any(module.training for module in dropouts + asking) and any(module.p > 0 for module in dropouts)

    def requires_grad(self) -> bool:
        return any(map(_requires_grad, self.parameters))


# Modules of transformers whose hooks change nothing: one records outputs only when asked to, the other asks for the
# gradient of the embeddings.
_HARMLESS = ("transformers.utils.output_capturing", "transformers.modeling_utils")


def has_hooks(spaces: list[dict[str, Any]]) -> bool:
    """Hooks that do something, on the way forward."""
    hooks = chain.from_iterable(map(dict.values, chain.from_iterable(map(_hooks, spaces))))
    return any(getattr(hook, "__module__", "") not in _HARMLESS for hook in hooks)


class State:
    """The memory of a model's parameters: where it is, and what tells whether it was written to."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        # Tensors made in inference mode count no versions.
        self.counted = [parameter for parameter in parameters if not parameter.is_inference()]
        self.bytes = [parameter.numel() * parameter.element_size() for parameter in parameters]
        self.pointers = list(map(Tensor.data_ptr, parameters))
        self.versions = list(map(_version, self.counted))
        self.readable = all(parameter.is_cpu for parameter in parameters)
        self.print = self._fingerprint(self.pointers)

    def current(self) -> bool:
        pointers = list(map(Tensor.data_ptr, self.parameters))
        return (
            pointers == self.pointers
            and list(map(_version, self.counted)) == self.versions
            and self._fingerprint(pointers) == self.print
        )

    def _fingerprint(self, pointers: list[int]) -> int:
        """Hash of a few words of each tensor: writing through ``.data`` changes neither address nor version."""
        function = getattr(native.state.cpu, "fingerprint", None) if self.readable else None
        return 0 if function is None else function(pointers, self.bytes)


def global_hooks() -> bool:
    """Hooks on every module of the process, as profilers set them."""
    return torch.nn.modules.module._has_any_global_hook()
