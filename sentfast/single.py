"""A process has one sentfast.

PyTorch registers an operator once, and what is patched is known to one ledger. So an import after the package was
removed from ``sys.modules`` leads back to the first one: this module, imported before all others, puts it back.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FIRST = "_sentfast"  # attribute of `sys`


def _modules(package: Any) -> dict[str, Any]:
    """A package and the modules in it that have been imported, by name."""
    found = {package.__name__: package}
    for value in list(vars(package).values()):
        if isinstance(value, type(sys)) and value.__name__.startswith(package.__name__ + "."):
            found.update(_modules(value))
    return found


def remember() -> None:
    """Called at the end of the first import."""
    if not hasattr(sys, _FIRST):
        # Of some modules the package has a function by that name.
        loaded = {name: module for name, module in sys.modules.copy().items() if name.startswith("sentfast.")}
        setattr(sys, _FIRST, (sys.modules["sentfast"], loaded))


if hasattr(sys, _FIRST):
    _package, _loaded = getattr(sys, _FIRST)
    sys.modules.update(_loaded)
    sys.modules.update(_modules(_package))
