"""Operators and their backends: one table, and the rule that picks from it.

A row (:class:`Op`) is a schema registered with PyTorch under ``torch.ops.sentfast``, its definition in
``reference/``, and the faster backends that exist for it:

==========  ====================================  =========================================
backend     what                                  used for
==========  ====================================  =========================================
cpu         compiled C++ (``csrc/cpu``)           CPU tensors
cuda        compiled CUDA C++ (``csrc/cuda``)     CUDA tensors
triton      Triton (``kernels``)                  CUDA tensors
reference   plain PyTorch (``reference/``)      everything else
==========  ====================================  =========================================

The rule: a forced backend wins (:func:`use_backend`, ``SENTFAST_BACKEND``) and is an error where it cannot run;
else the device decides; a dtype, a device or arguments without a kernel use the reference, which
``SENTFAST_STRICT=1`` turns into an error.

Names: ``<op>`` gives the result alone, ``<op>_forward`` the result and what ``<op>_backward`` needs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.compiler import is_compiling

from sentfast import native, private
from sentfast.report import anything_ran, counters

BACKENDS = ("cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("sentfast", "DEF")
# The compiled CUDA kernels live under a namespace of their own, so that one operator can have both them and Triton.
_CUDA_LIBRARY = torch.library.Library("sentfast_cuda", "DEF")
for _library in (_LIBRARY, _CUDA_LIBRARY):
    private.keep_at_exit(_library)


def _environment_backend() -> str | None:
    backend = os.environ.get("SENTFAST_BACKEND") or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"SENTFAST_BACKEND: expected one of {BACKENDS}, got {backend!r}")
    return backend


_STRICT = os.environ.get("SENTFAST_STRICT") == "1"
# Tests set it: the kernels run too where the original is faster, so that a test means the same on every processor.
RUN_ALL = os.environ.get("SENTFAST_TEST_ALL", "0") not in ("", "0")
_ENVIRONMENT_BACKEND = _environment_backend()
_forced: ContextVar[str | None] = ContextVar("sentfast_backend", default=_ENVIRONMENT_BACKEND)
forced_backend = _forced.get  # the backend that must run in this context, or None

_STATE = native.state

ops: dict[str, Op] = {}


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


class Op:
    """One operator: call it with its schema's arguments; the first, a tensor, decides device and dtype."""

    def __init__(
        self,
        name: str,
        reference: Callable,
        fake: Callable,
        prefer_triton: tuple[torch.dtype, ...],
        forward: Op | None,
        cuda_refuses: Callable[..., str] | None,
    ):
        self.name = name
        self.reference = reference
        self.fake = fake
        self.forward = forward
        self.prefer_triton = prefer_triton
        self.cuda_refuses = cuda_refuses
        self.triton: Callable | None = None
        self.overload = getattr(torch.ops.sentfast, self.name).default
        # What the overload calls after a Python hop; half a microsecond less where it is there.
        self.compiled_cpu = getattr(self.overload, "_op", self.overload)
        self.cuda = getattr(torch.ops.sentfast_cuda, self.name).default
        self.calls = counters(self.name.removesuffix("_forward"), BACKENDS)

    def __call__(self, *args: Any) -> Any:
        x = args[0]
        if is_compiling():  # the compiler sees one opaque operator; PyTorch picks the backend
            return self.overload(*args) if x.dtype in KERNEL_DTYPES else self.reference(*args)
        if x.is_cpu and x.dtype in KERNEL_DTYPES and forced_backend() is None and _STATE.cpu is not None:
            return self.native(*args)  # the common case, in the fewest steps
        backend, implementation = self.choose(*args)
        self.calls[backend] += 1
        return implementation(*args)

    def choose(self, x: torch.Tensor, *rest: Any) -> tuple[str, Callable]:
        """The backend for a call with these arguments, or with such a first tensor, and the function that runs it."""
        forced = forced_backend()
        if forced is not None:
            why = self.why_not(forced, x, *rest)
            if why:
                raise BackendError(f"sentfast: backend {forced!r} cannot run {self.name!r}: {why}.")
            return forced, self.implementation(forced)
        device = x.device.type
        if x.dtype in KERNEL_DTYPES:
            if device == "cpu" and _STATE.cpu is not None:
                return "cpu", self.overload
            if device == "cuda":
                for backend in ("triton", "cuda") if x.dtype in self.prefer_triton else ("cuda", "triton"):
                    if not self.why_not(backend, x, *rest):
                        return backend, self.implementation(backend)
        if _STRICT:
            raise BackendError(
                f"sentfast: SENTFAST_STRICT=1 and {self.name!r} has no kernel here: {self.explain(x, *rest)}."
            )
        return "reference", self.reference

    def native(self, *args: Any) -> Any:
        """Calls the compiled CPU kernel; for callers that know that it will run."""
        self.calls["cpu"] += 1
        return self.compiled_cpu(*args)

    def implementation(self, backend: str) -> Callable:
        if backend == "cpu":
            return self.overload
        if self.forward is not None and not (backend == "triton" and self.triton is not None):
            return _first(self.forward.implementation(backend))
        found = {"cuda": self.cuda, "triton": self.triton, "reference": self.reference}[backend]
        assert found is not None, backend
        return found

    def why_not(self, backend: str, x: torch.Tensor, *rest: Any) -> str:
        """Why `backend` cannot run a call with these arguments, or with such a first tensor; empty if it can."""
        if backend == "reference":
            return ""
        if x.dtype not in KERNEL_DTYPES:
            return f"no kernel for {x.dtype}"
        if backend == "triton":
            return native.why_no_triton(x.device.type) or ("" if _triton(self) else "no Triton kernel")
        if x.device.type != backend:
            return f"the tensor is on {x.device}"
        if backend == "cpu":
            return native.why_no_cpu()
        why = native.why_no_cuda() or ("" if _has_cuda(self) else "no CUDA kernel")
        return why or (self.cuda_refuses(x, *rest) if self.cuda_refuses is not None and rest else "")

    def explain(self, x: torch.Tensor, *rest: Any) -> str:
        """One line: every backend and why it cannot run the call."""
        return "; ".join(f"{backend}: {self.why_not(backend, x, *rest) or 'available'}" for backend in BACKENDS)


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    prefer_triton: tuple[torch.dtype, ...] = (),
    forward: Op | None = None,
    on_cpu: Callable | None = None,
    cuda_refuses: Callable[..., str] | None = None,
) -> Op:
    """Registers an operator: its schema, its definition as the default implementation, and its shape function.

    prefer_triton: the dtypes for which Triton runs where a GPU has both.
    cuda_refuses: of a call's arguments, why CUDA C++ has no kernel for them; empty if it has.
    on_cpu: the operator as calls of others that are compiled, where ``csrc/cpu`` has no kernel of its own for it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _CUDA_LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sentfast::{name}", fake, lib=_LIBRARY)
    if on_cpu is not None:
        _LIBRARY.impl(name, on_cpu, "CPU")
    op = ops[name] = Op(name, reference, fake, prefer_triton, forward, cuda_refuses)
    op.compiled_cpu = on_cpu or op.compiled_cpu
    _LIBRARY.impl(name, lambda *args: op(*args), "CUDA")
    return op


def result_of(forward: Op, *, compiled: bool = True) -> Op:
    """Registers `<name>` beside `<name>_forward`: its first result alone, for calls that need no gradient.

    A backend may have a kernel of its own for it, as the CPU does: fewer results are less work, and each costs half a
    microsecond by itself. The others use the forward operator's; compiled=False: the CPU too.
    """
    arguments = str(forward.overload._schema).removeprefix(f"sentfast::{forward.name}").rpartition(" -> ")[0]
    return define(
        forward.name.removesuffix("_forward") + arguments + " -> Tensor",
        reference=_first(forward.reference),
        fake=_first(forward.fake),
        prefer_triton=forward.prefer_triton,
        forward=forward,
        cuda_refuses=forward.cuda_refuses,
        on_cpu=None if compiled else _first(forward.overload),
    )


def _first(function: Callable) -> Callable:
    return lambda *args: function(*args)[0]


def implements(name: str) -> Callable[[Callable], Callable]:
    """Decorator of a Triton implementation: same name, same arguments as the operator."""

    def register(function: Callable) -> Callable:
        ops[name].triton = function
        return function

    return register


def _triton(op: Op) -> Callable | None:
    native.load_triton()
    return op.triton or (op.forward.triton if op.forward is not None else None)


@functools.cache
def _has_cuda(op: Op) -> bool:
    """Asked only when the library is open, so the answer stays."""
    return private.has_kernel_for((op.forward or op).cuda.name(), "CUDA")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces a backend in this context: "cpu", "cuda", "triton" or "reference"; a call it cannot run is an error."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r:.80}")
    before = _forced.get()
    try:
        _forced.set(backend)
        yield
    finally:
        _forced.set(before)


_one_thread_after_fork = False


def _before_fork() -> None:
    global _one_thread_after_fork
    tasks = "/proc/self/task"
    _one_thread_after_fork = anything_ran() and (not os.path.isdir(tasks) or len(os.listdir(tasks)) > 1)


def _after_fork() -> None:
    """PyTorch's threads do not outlive a fork, and a child would wait for them; as in a DataLoader, it runs on one."""
    if _one_thread_after_fork:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
