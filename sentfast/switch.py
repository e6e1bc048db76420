"""The switch: patches sentence-transformers when it is there or as soon as it is imported, and undoes it exactly.

Imports neither PyTorch nor sentence-transformers. What is patched stands in
``sentfast/integrations/sentence_transformers.py``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sentfast import locks
from sentfast.report import logger, warn

# What `import sentfast` loads does without `typing` and `dataclasses`: they take longer to load than all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TARGET = "sentence_transformers"
# Those with the values that they may have, where not every value means something.
ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "SENTFAST_BACKEND": (),
    "SENTFAST_CPU_ISA": (),
    "SENTFAST_CUDA_GRAPHS": ("0", "1"),
    "SENTFAST_DISABLE": ("0", "1"),
    "SENTFAST_STRICT": ("0", "1"),
}
# Read by setup.py and by the benchmarks; here they mean nothing. Names that begin with TESTS are read by the tests.
OTHERS = ("SENTFAST_CUDA", "SENTFAST_CUDA_ARCHS", "SENTFAST_NO_EXT", "SENTFAST_GPU_DRY_RUN")
TESTS = "SENTFAST_TEST_"


class Site:
    """One attribute to replace: `build` makes the replacement out of the original."""

    def __init__(self, name: str, owner: Any, attribute: str, build: Callable[[Any], Any]):
        self.name, self.owner, self.attribute, self.build = name, owner, attribute, build


class _Patch:
    """One attribute that is replaced."""

    def __init__(self, site: Site, original: Any, replacement: Any):
        self.name, self.owner, self.attribute = site.name, site.owner, site.attribute
        self.original, self.replacement = original, replacement


_lock = locks.new()
_ledger: list[_Patch] = []
_added: list[Site] = []  # sites that came up later, by their first use
_enabled = False
_problem = ""
_disabled_here: ContextVar[bool] = ContextVar("sentfast_disabled", default=False)


def is_enabled() -> bool:
    """Whether calls are accelerated in the current thread or task: switched on, and not inside :func:`disabled`."""
    return _enabled and not _disabled_here.get()


@contextmanager
def disabled() -> Iterator[None]:
    """Runs sentence-transformers' own code inside the block, in this thread or asyncio task only.

    It does not reach into code that ``torch.compile`` has already compiled.
    """
    # By value, not by token: an interrupt may come between setting it and having the token.
    before = _disabled_here.get()
    try:
        _disabled_here.set(True)
        yield
    finally:
        _disabled_here.set(before)


def run_original(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls an original with everything that it calls in turn also unpatched."""
    before = _disabled_here.get()
    try:
        _disabled_here.set(True)
        return function(*args, **kwargs)
    finally:
        _disabled_here.set(before)


def enable() -> None:
    """Switches the acceleration on for the process. ``import sentfast`` calls it; calling it again does no harm."""
    global _enabled
    # Waits, without our lock, for another thread that is in the middle of importing the target.
    module = importlib.import_module(TARGET) if TARGET in sys.modules else None
    with _lock:
        _enabled = True
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        if module is not None:
            _patch()
        for site in _added:
            _apply(site)


def add(site: Site) -> None:
    """Patches one attribute more, whenever sentfast is switched on. Adding it again does no harm."""
    with _lock:
        if not any(_same(site, other) for other in _added):
            _added.append(site)
        if _enabled:
            _apply(site)


def remove(site: Site) -> None:
    """Undoes :func:`add`."""
    with _lock:
        _added[:] = [other for other in _added if not _same(site, other)]
        for patch in [patch for patch in _ledger if _same(site, patch)]:
            if _restore(patch):
                _ledger.remove(patch)


def disable() -> None:
    """Restores every patched attribute. One that other code has patched since is left, with a warning that names it."""
    global _enabled
    with _lock:
        _enabled = False
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        # An entry that stays is not patched again by enable(): the other code still calls our replacement.
        for patch in list(reversed(_ledger)):
            if _restore(patch):
                _ledger.remove(patch)


def patched() -> list[str]:
    """The names of the attributes that are replaced at the moment."""
    with _lock:
        return [patch.name for patch in _ledger]


def problem() -> str:
    """Why sentence-transformers could not be patched; empty if nothing went wrong."""
    return _problem


def _same(one: Any, other: Any) -> bool:
    return one.owner is other.owner and one.attribute == other.attribute


def _apply(site: Site) -> None:
    """The ledger comes first, here and below: wherever an interrupt comes, what is replaced stands in it."""
    patch = next((patch for patch in _ledger if _same(site, patch)), None)
    if patch is None:
        original = _current(site.owner, site.attribute)
        patch = _Patch(site, original, site.build(original))
        _ledger.append(patch)
    if _current(patch.owner, patch.attribute) is patch.original:
        setattr(patch.owner, patch.attribute, patch.replacement)


def _restore(patch: _Patch) -> bool:
    """Whether the attribute was still ours."""
    if _current(patch.owner, patch.attribute) is patch.original:
        return True
    if _current(patch.owner, patch.attribute) is patch.replacement:
        setattr(patch.owner, patch.attribute, patch.original)
        return True
    warn(f"{patch.name} was patched by other code after sentfast and is left as it is; it runs the original code")
    return False


def _current(owner: Any, attribute: str) -> Any:
    return vars(owner).get(attribute) if isinstance(owner, type) else getattr(owner, attribute)


def _patch() -> None:
    global _problem
    spec = getattr(sys.modules[TARGET], "__spec__", None)
    if getattr(spec, "_initializing", False) and not _finder.patching:
        _problem = f"imported in the middle of the import of {TARGET}; call sentfast.enable() afterwards"
        warn(f"sentence-transformers is not accelerated: {_problem}")
        return
    # The switch must never break an import: what goes wrong is shown, here and by doctor, and leaves the original code.
    try:
        sites = importlib.import_module("sentfast.integrations.sentence_transformers").sites()
        for site in sites:
            _apply(site)
        _problem = ""
    except Exception as error:
        _problem = f"{type(error).__name__}: {error}"
        logger.info("sentence-transformers is not accelerated", exc_info=True)
        warn(f"sentence-transformers is not accelerated: {_problem}")


class _Finder:
    """Import hook: lets the other finders find the target and patches it once it has run."""

    patching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != TARGET:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec is not None and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """The target's own loader with one step more; the module itself never sees it."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        with _lock:
            if _enabled:
                _finder.patching = True
                try:
                    _patch()
                finally:
                    _finder.patching = False


_finder = _Finder()


def _check_environment() -> None:
    """Warns of names that look like ours and mean nothing, and of values that mean nothing."""
    for name in sorted(os.environ):
        if not name.startswith("SENTFAST_") or name in OTHERS or name.startswith(TESTS):
            continue
        if name not in ENVIRONMENT:
            difflib = importlib.import_module("difflib")
            near = difflib.get_close_matches(name, ENVIRONMENT, 1, 0)[0]
            warn(f"unknown environment variable {name}; nearest: {near}; known: {', '.join(ENVIRONMENT)}")
            continue
        value, values = os.environ[name], ENVIRONMENT[name]
        if values and value not in ("", *values):
            warn(f"{name}: expected one of {values}, got {value!r}")


def start() -> None:
    """What ``import sentfast`` does: nothing with ``SENTFAST_DISABLE=1``, else :func:`enable`."""
    _check_environment()
    if os.environ.get("SENTFAST_DISABLE", "0") in ("", "0"):
        enable()
