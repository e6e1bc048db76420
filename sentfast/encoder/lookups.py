"""Every name that some code looks up while it runs, and where: modules of Python, classes, functions, dictionaries.

Found by reading the code itself: which globals a function names, which attributes of those, which functions they are
and what these name in turn. Somebody who replaces one of them, or puts one where none was, expects the next result to
show it.
"""

from __future__ import annotations

import builtins
import functools
import os
import sys
import types
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch

from sentfast import private
from sentfast.encoder.own_names import PLACES, own_names
from sentfast.encoder.watch import dictionary
from sentfast.integrations import trampolines
from sentfast.integrations.guards import ours

# Whose code may stand behind a name; any other has been put there. A mock runs whatever somebody has told it to, or
# counts its calls.
_KNOWN = frozenset(sys.stdlib_module_names) - {"unittest"} | {
    "accelerate",
    "huggingface_hub",
    "numpy",
    "packaging",
    "peft",
    "safetensors",
    "scipy",
    "sentence_transformers",
    "sentfast",
    "sklearn",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
}
# Where modules of Python lie.
_PYTHON = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
# Whose operators are known.
_NAMESPACES = frozenset({"aten", "mkldnn", "onednn", "prim", "prims", "quantized", "sentfast", "torchvision"})
# Modules of which nothing enters a result.
_SILENT = frozenset({"logging", "typing", "warnings"})
# Looked up without being named: what operators and statements call. Making and showing an object is no part of it.
_IMPLICIT = frozenset(
    name
    for kind in (object, type, int, list, dict, property, types.GeneratorType)
    for name, value in vars(kind).items()
    # Of some, such as ``dict.__getitem__``, Python has a method in its own language.
    if isinstance(value, (types.WrapperDescriptorType, types.MethodDescriptorType)) and name.startswith("__")
) | {"__getattr__", "__enter__", "__exit__", "__bool__", "__torch_function__", "__instancecheck__", "forward"}
_IMPLICIT -= {"__init__", "__repr__", "__str__", "__hash__", "__format__", "__sizeof__", "__dir__"}
_IMPLICIT -= {"__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__subclasses__"}


class Lookups:
    """The arguments of ``Names``, and `foreign`, what code of somebody else was found ("" for none).

    Args:
        packages: prefixes of the modules whose functions are read on; of other code the name alone is compared.
        functions: where reading starts.
        classes: of the objects that the code is given; every name is looked up along the order of their bases.
        passed: (class, name) of what is compared elsewhere.
    """

    def __init__(
        self,
        packages: tuple[str, ...],
        functions: Iterable[Any],
        classes: Iterable[type],
        passed: Set[tuple[type, str]] = frozenset(),
    ):
        self.foreign = ""
        self.lists: list[list] = []
        self.functions: list[types.FunctionType] = []
        self.cells: list[Any] = []
        self.sets: list[set] = [private.kernels_of_python]
        self.names: set[str] = set(_IMPLICIT)
        self._own = own_names(_names_of)
        self._packages, self._passed = packages, passed
        self._tables: dict[int, tuple[dict, Any, dict[str, None], Any]] = {}
        self._seen: set[int] = set()
        self._spaces: dict[int, tuple[dict, bool]] = {}  # of modules of Python; whether everything in them counts
        self._by_class: dict[type, set[str]] = {}
        self._judge_kernels()
        for cls in (*classes, torch.nn.Parameter):
            self._with_bases(cls)
        for function in functions:
            self._judge(function, getattr(function, "__qualname__", ""))
            self._visit(function)
        self._space(vars(builtins), False)
        self._read_on()
        self._ours()

    @property
    def tables(self) -> list[tuple[dict, Any, tuple[str, ...], Any]]:
        return [(space, owner, tuple(keys), barred) for space, owner, keys, barred in self._tables.values()]

    def _read_on(self) -> None:
        """Until no function and no name is new."""
        count = -1
        while count != len(self.names) + len(self._seen):
            count = len(self.names) + len(self._seen)
            for cls in list(self._by_class):
                self._class(cls)
            for space, whole in list(self._spaces.values()):
                self._space(space, whole)

    def _ours(self) -> None:
        """What our own code asks for: whose it is. It is not read on from there."""
        asked: list[tuple[Any, Set[str]]] = [(vars(place), self._own & vars(place).keys()) for place in PLACES]
        # A class may get what it had from its bases until now.
        asked += [(cls.__dict__, self._own & self._by_class[cls]) for cls in torch.Tensor.__mro__[:-1]]
        for space, names in asked:
            keys = self._table(dictionary(space))
            for name in names - keys.keys():
                keys[name] = None
                if name in space:
                    self._judge(space[name], name)

    # ---- functions ----

    def _visit(self, value: Any) -> None:
        """Reads a function, once."""
        inside = _inside(value)
        if inside is not None:
            self._visit(inside)
        # A decorator's function is read too, unless it is ours.
        if not isinstance(value, types.FunctionType) or ours(value):
            return
        if id(value) in self._seen or not self._reads(value):
            return
        self._seen.add(id(value))
        self.functions.append(value)
        for cell in value.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:
                continue
            self.cells.append(cell)
            self._visit(contents)
        self.names |= _names_of(value.__code__)
        self._space(value.__globals__, True)
        self._visit(trampolines.original_of(value))

    def _reads(self, function: types.FunctionType) -> bool:
        return f"{function.__globals__.get('__name__', '')}.".startswith(self._packages)

    # ---- modules of Python ----

    def _space(self, space: Any, whole: bool) -> None:
        """Of a module's names those that are looked up; of one whose code is not read its functions and numbers."""
        space = dictionary(space)
        self._spaces[id(space)] = space, whole
        keys = self._table(space)
        for name in self.names.intersection(space) - keys.keys():
            value = space[name]
            if whole or callable(value) or type(value) in (int, float):
                keys[name] = None
                self._follow(value, name)

    def _follow(self, value: Any, name: str) -> None:
        self._judge(value, name)
        if isinstance(value, types.ModuleType):
            if id(vars(value)) not in self._spaces and value.__name__ not in _SILENT:
                self._space(vars(value), f"{value.__name__}.".startswith(("torch.", *self._packages)))
        elif hasattr(type(value), "_global_mapping"):
            self.registry(value)
        elif not isinstance(value, type):
            self._visit(value)

    def registry(self, registry: Any) -> None:
        """Attention functions and masks by the name of the implementation, and how these are found."""
        self._with_bases(type(registry))
        for mapping in (vars(registry).get("_local_mapping"), type(registry)._global_mapping):
            for name in ("sdpa", "eager") if isinstance(mapping, dict) else ():
                keys = self._table(mapping, None)
                if name not in keys:
                    keys[name] = None
                    self._judge(mapping.get(name), name)
                    self._visit(mapping.get(name))

    # ---- classes ----

    def _with_bases(self, cls: type) -> None:
        for kind in cls.__mro__:
            if kind is not object and kind not in self._by_class:
                self._by_class[kind] = set().union(*map(vars, kind.__mro__[:-1]))  # type: ignore[arg-type]
                self._table(dictionary(kind.__dict__))

    def _class(self, cls: type) -> None:
        """What a class defines of the names, and that it does not define the others of its bases."""
        space = dictionary(cls.__dict__)
        keys = self._table(space)
        for name in (self.names & self._by_class[cls]) - keys.keys():
            if (cls, name) not in self._passed:
                keys[name] = None
                value = space.get(name)
                if value is not None:
                    self._judge(value, f"{cls.__name__}.{name}")
                    self._visit(value)

    # ---- whose code it is ----

    def _judge(self, value: Any, name: str) -> None:
        """Remembers a name behind which there is code of somebody else."""
        home = stranger(value)
        if home and not self.foreign:
            self.foreign = f"{name} is code of {home}"

    def _judge_kernels(self) -> None:
        """``torch.library`` can put code of somebody else behind every function of PyTorch."""
        found = private.foreign_kernels()
        if found:
            self.foreign = f"{found[0]} was registered as a kernel through torch.library"

    # ---- what is compared ----

    def _table(self, space: dict, barred: Any = True) -> dict[str, None]:
        """The keys of a dictionary that are compared. barred: the names may not be added to it."""
        found = self._tables.get(id(space))
        if found is None:
            found = self._tables[id(space)] = space, None, {}, self.names if barred else None
        return found[2]


def stranger(value: Any) -> str:
    """Where the code of somebody else comes from that runs behind a function, a descriptor; "" for none."""
    while _place_inside(value):
        # A class of somebody else's may have been made for a function of PyTorch's, as an autograd.Function is.
        home = _module_of(_class_of(value.__self__)) if isinstance(value, types.MethodType) else ""
        if home and not _known(home):
            return home
        value = _inside(value)
    if isinstance(value, type) or not (callable(value) or hasattr(type(value), "__get__")):
        return ""
    inside = None if ours(value) else getattr(value, "__wrapped__", None)
    found = stranger(inside) if inside is not None and inside is not value else ""
    home = found or _home(value)
    return home if found or not _known(home) else ""


def _known(home: str) -> bool:
    return home.partition(".")[0] in _KNOWN


def _class_of(owner: Any) -> type:
    return owner if isinstance(owner, type) else type(owner)


def _module_of(cls: type) -> str:
    """The module of a class; the file of one that only has the name of a module of Python."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return _in_python(cls.__module__, file) or cls.__module__


def _in_python(name: str, file: str | None) -> str:
    """The file of a module that is named as one of Python's and lies elsewhere; "" for any other."""
    own = name.partition(".")[0] not in sys.stdlib_module_names or file is None
    return "" if own or os.path.abspath(str(file)).startswith(_PYTHON) else str(file)


def _place_inside(value: Any) -> str:
    """The attribute in which a method, a partial, a property has its function; "" for any other object."""
    # By its class: there are objects that have an attribute of any name, and that again has one.
    kind = type(value)
    if issubclass(kind, (types.MethodType, staticmethod, classmethod)):
        return "__func__"
    if issubclass(kind, property):
        return "fget"
    partial = any(base.__module__ == "functools" for base in kind.__mro__)
    return "func" if partial and hasattr(value, "func") else ""


def _inside(value: Any) -> Any:
    """The function inside a method, a partial, a property, a decorated function; None for a plain one."""
    found = getattr(value, _place_inside(value) or "__wrapped__", None)
    return found if callable(found) and found is not value else None


def _home(function: Any) -> str:
    """The module that the code of a function, a callable object or a descriptor comes from."""
    if isinstance(function, types.FunctionType):
        names, file = function.__globals__, function.__code__.co_filename
        made = file.startswith("<") or trampolines.original_of(function) is not None
        same = made or os.path.abspath(file) == os.path.abspath(names.get("__file__") or file)
        name = str(names.get("__name__", ""))
        return (_in_python(name, names.get("__file__")) or name) if same else file
    if isinstance(function, types.BuiltinFunctionType):
        owner = function.__self__
        inside = _class_of(owner)
        return str(
            function.__module__ or (owner.__name__ if isinstance(owner, types.ModuleType) else inside.__module__)
        )
    namespace = private.namespace_of(function)
    if namespace:
        return "torch" if namespace in _NAMESPACES else f"ops.{namespace}"
    return _module_of(type(function))


@functools.cache
def _names_of(code: types.CodeType) -> frozenset[str]:
    return frozenset(_walk(code))


def _walk(code: types.CodeType) -> Iterator[str]:
    """Names, and texts that may become one through ``getattr``."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _walk(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant
