"""Every name that the code of a model looks up: in its functions and classes, its modules and its configuration."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sentfast.encoder import adapters
from sentfast.encoder.lookups import Lookups

_PACKAGES = ("transformers.", "torch.nn.", "peft.")
_TABLES = ("_parameters", "_buffers", "_modules")
# Modes and hooks, which are compared by themselves, since they change what runs and not what comes out.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())).difference(_TABLES)


def _is_config(value: Any) -> bool:
    return any(cls.__name__ in ("PreTrainedConfig", "PretrainedConfig") for cls in type(value).__mro__)


class ModelLookups(Lookups):
    """Holds the modules inside the model, never the model itself."""

    def __init__(self, model: nn.Module, inner: list[nn.Module]):
        config = getattr(model, "config", None)
        kinds = dict.fromkeys(map(type, (model, *inner)))
        forwards = [getattr(cls, "forward", None) for cls in kinds]
        # Ours, and compared by itself; and what a model's class says of equality, which its code does not ask.
        passed = {(next(cls for cls in type(model).__mro__ if "forward" in vars(cls)), "forward")}
        passed |= {(cls, name) for cls in type(model).__mro__ for name in ("__eq__", "__ne__")}
        super().__init__(_PACKAGES, forwards, kinds if config is None else (*kinds, type(config)), passed)
        # ``examine`` looks at it for models too whose code does not.
        registered = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
        if hasattr(type(registered), "_global_mapping"):
            self.registry(registered)
        self._read_on()
        self._known_barred: dict[frozenset[str], set[str]] = {}
        for module in (model, *inner):
            self._instance(module, None if module is model else module)
            self._classes_of_tensors(module)
        if config is not None:
            self._whole(vars(config), nested=True, owner=config)

    def _classes_of_tensors(self, module: nn.Module) -> None:
        """An object may be given another class where it is."""
        for name in ("_parameters", "_buffers"):
            for x in vars(module)[name].copy().values():
                if x is not None:
                    self._tables[id(vars(x))] = vars(x), x, {}, None

    def _instance(self, module: nn.Module, owner: nn.Module | None) -> None:
        """All attributes that a module has, as the code may put their names together, and none of the names more."""
        space = vars(module)
        passed = self._passed_of(module, owner is None)
        keys = dict.fromkeys(name for name in list(space) if name not in passed)
        self._tables[id(space)] = space, owner, keys, self._barred(passed)
        for name in keys:
            value = space[name]
            if name in _TABLES:
                known = [key for key in value if owner is not None or key != "pooler"]
                self._tables[id(value)] = value, None, dict.fromkeys(known), True
            elif type(value) is dict:
                self._whole(value, nested=False)
            elif type(value) is list:
                self.lists.append(value)
            elif _is_config(value):  # a layer's own: copied, or come with it from another model
                self._whole(vars(value), nested=True, owner=value)
            elif name != "forward":  # ``examine`` looks at that, and knows what an adapter may have
                self._judge(value, f"{type(module).__name__}.{name}")

    @staticmethod
    def _passed_of(module: nn.Module, root: bool) -> frozenset[str]:
        """Attributes that are looked at elsewhere."""
        if isinstance(module, nn.Dropout):
            return _OF_EVERY_MODULE | {"p", "inplace"}
        found = _OF_EVERY_MODULE | {"forward"} if root else _OF_EVERY_MODULE
        return found | adapters.SWITCHES if adapters.adapted(module) else found

    def _barred(self, passed: frozenset[str]) -> set[str]:
        if passed not in self._known_barred:
            self._known_barred[passed] = self.names - passed
        return self._known_barred[passed]

    def _whole(self, space: dict, nested: bool, owner: Any = None) -> None:
        """Everything in a dictionary, and in what lies in it under a name that is looked up."""
        if id(space) in self._tables:
            return
        self._tables[id(space)] = (space, owner, dict.fromkeys(space), True)
        for name, value in space.copy().items():
            if nested and name not in self.names:
                continue
            if type(value) is dict:
                self._whole(value, nested=False)
            elif type(value) is list:
                self.lists.append(value)
