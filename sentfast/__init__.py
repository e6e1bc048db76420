"""sentfast makes sentence-transformers fast: ``import sentfast`` switches it on, ``sentfast.disable()`` off."""

from __future__ import annotations

import importlib

from sentfast import single

# Some of these share their module's name; bound here, the name is the function whatever is imported later.
from sentfast.accelerate import UnsupportedModelError, accelerate, is_accelerated, precision_of, refresh, restore
from sentfast.doctor import doctor
from sentfast.explain import explain
from sentfast.report import SentfastWarning, report
from sentfast.switch import disable, disabled, enable, is_enabled, start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sentfast import functional, search
    from sentfast.native import cpu_isa, supported_cpu_isas
    from sentfast.registry import BackendError, use_backend

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "SentfastWarning",
    "UnsupportedModelError",
    "accelerate",
    "cpu_isa",
    "disable",
    "disabled",
    "doctor",
    "enable",
    "explain",
    "functional",
    "is_accelerated",
    "is_enabled",
    "precision_of",
    "refresh",
    "report",
    "restore",
    "search",
    "supported_cpu_isas",
    "use_backend",
]

# Loaded on first use, because they import PyTorch. An empty attribute stands for the module itself.
_LAZY = {
    "functional": ("sentfast.functional", ""),
    "cpu_isa": ("sentfast.native", "cpu_isa"),
    "supported_cpu_isas": ("sentfast.native", "supported_cpu_isas"),
    "BackendError": ("sentfast.registry", "BackendError"),
    "use_backend": ("sentfast.registry", "use_backend"),
    "search": ("sentfast.search", ""),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sentfast' has no attribute {name!r}")
    # Every operator is defined before its table or its libraries are touched.
    importlib.import_module("sentfast.ops")
    module, attribute = _LAZY[name]
    value: Any = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


single.remember()
start()
