"""The backends that can run here, each as a context that forces it and fails if another one ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ptx.settings
import torch

import sentfast
import sentfast.functional
from sentfast import native, registry


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name

    @property
    def slow(self) -> bool:
        """A GPU's backend on CPU tensors: by Triton's interpreter of Python, or compiled and by ours of PTX."""
        return self.name in ("triton", "cuda") and self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        return self.slow and ptx.settings.asked() is None

    def supports(self, dtype: torch.dtype) -> bool:
        # Triton's interpreter computes bfloat16 wrongly without a word (triton-lang/triton#11584).
        return not (self.interpreted and dtype == torch.bfloat16)

    @contextmanager
    def forced(self, *operators: str) -> Iterator[None]:
        """Runs the body on this backend; fails unless it ran each of `operators`, and if another backend ran."""
        before = native.cpu_isa() if self.isa else None
        if self.isa:
            native.cpu_isa(self.isa)
        sentfast.report(reset=True)
        try:
            with registry.use_backend(self.name):
                yield
        finally:
            if before:
                native.cpu_isa(before)
        ran = sentfast.report().calls
        assert {backend for _, backend in ran} <= {self.name}, f"another backend than {self} ran: {ran}"
        missing = set(operators) - {operator for operator, _ in ran}
        assert not missing, f"{missing} did not run on {self}"


def executed(backend: str, architecture: str) -> list[Backend]:
    """The one backend of a GPU whose compiled code runs here, in the interpreter of PTX."""
    if backend == "triton":
        from ptx import triton_driver

        triton_driver.install(int(architecture))
    else:
        from ptx import cuda_library

        cuda_library.install(architecture)
    return [Backend(backend, "cpu")]


def available() -> list[Backend]:
    asked = ptx.settings.asked()
    if asked is not None:
        return executed(*asked)
    found = [Backend("reference", "cpu")]
    found += [Backend("cpu", "cpu", isa) for isa in native.supported_cpu_isas()]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [Backend("triton", "cpu")]
    if torch.cuda.is_available():
        if os.environ.get("SENTFAST_TEST_GPU_ALONE") == "1":  # what no other machine can test
            found = []
        found.append(Backend("triton", "cuda"))
        if not native.why_no_cuda():
            found.append(Backend("cuda", "cuda"))
    return found


BACKENDS = available()
BACKEND = "cpu" if native.cpu_loaded() else "reference"  # of CPU tensors, where none is forced
