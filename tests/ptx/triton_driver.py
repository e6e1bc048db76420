"""A Triton driver without a GPU: launches run the PTX that Triton has made, on CPU tensors, in the interpreter."""

from __future__ import annotations

import atexit
import os
import random
import struct
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel

from . import settings
from .interpreter import Launch, Module, Range

# How the launcher packs an argument, by its type in Triton's signature.
FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
    **{"fp32": "f", "f32": "f", "fp64": "d"},
}
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have

launches: Counter[str] = Counter()  # by kernel


def packed(layout: list[tuple[int, int]], kinds: list[str], values: list[Any]) -> bytes:
    """The block of parameters. Triton adds two of its own at the end, scratch memory that these kernels do not use."""
    block = bytearray(max((offset + size for offset, size in layout), default=0))
    for (offset, size), kind, value in zip(layout, kinds, values, strict=False):
        data = struct.pack("<Q", value.data_ptr()) if kind[0] == "*" else struct.pack("<" + FORMATS[kind], value)
        if len(data) != size:
            raise TypeError(f"a parameter of {size} bytes for an argument of type {kind}")
        block[offset : offset + size] = data
    return bytes(block)


def ranges_of(names: list[str], values: list[Any]) -> list[Range]:
    """The memory behind the tensors among the arguments, each once."""
    found: dict[int, Range] = {}
    for name, value in zip(names, values, strict=True):
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
            storage = value.untyped_storage()
            begin = storage.data_ptr()
            found.setdefault(begin, Range(name, begin, begin + storage.nbytes()))
    return list(found.values())


class Launcher:
    """Takes what Triton gives the launcher that it would compile."""

    def __init__(self, compiled: CompiledKernel, moment: int, draws: random.Random):
        self.module = Module(compiled.asm["ptx"])
        (self.name,) = self.module.kernels()
        self.layout = self.module.parameters(self.name)
        self.signature = compiled.src.signature
        self.metadata = compiled.metadata
        self.moment, self.draws = moment, draws

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed_metadata: Any, metadata: Any, enter: Any,
        leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        launches[self.name] += 1
        given = zip(self.signature.items(), arguments, strict=True)
        used = [(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
        names, kinds, values = ([part[i] for part in used] for i in range(3))
        launch = Launch(
            grid=(x, y, z),
            threads=(32 * self.metadata.num_warps, 1, 1),
            shared=self.metadata.shared,
            ranges=ranges_of(names, values),
            seed=self.draws.randrange(2**31),
            moment=self.moment,
        )
        self.module.launch(self.name, packed(self.layout, kinds, values), launch)


class Driver:
    """What Triton asks of a GPU."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)


def install(capability: int) -> None:
    """From now on Triton compiles for this capability and runs on CPU tensors."""
    from sentfast import native

    draws = random.Random(settings.seed())
    moment = settings.moment()

    def init_handles(self: CompiledKernel) -> None:
        if self.module is not None:
            return
        if self.metadata.shared > MOST_SHARED[capability]:
            raise RuntimeError(f"{self.metadata.shared} bytes of shared memory do not fit")
        self._run = Launcher(self, moment, draws)
        self.module = self.function = 1
        self.n_regs, self.n_spills, self.n_max_threads = 0, 0, 1024

    triton.runtime.driver.set_active(Driver(capability))
    CompiledKernel._init_handles = init_handles
    # No assembler: its output is not looked at, and other sessions must not find what has none.
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    key = CUDABackend.hash
    CUDABackend.hash = lambda self: key(self) + "-without-assembler"
    native.why_no_triton = lambda device: "" if device == "cpu" else f"Triton does not run on {device}"
    if settings.log():
        atexit.register(write_log, str(settings.log()))


def write_log(folder: str) -> None:
    """Which kernels this process has launched, for coverage.py."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"triton-{os.getpid()}"), "w") as file:
        file.writelines(f"{name}\n" for name in launches)
