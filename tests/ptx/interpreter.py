"""ctypes bindings of the PTX interpreter (interface.h)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import build

STATISTICS = (
    *("instructions", "lanes", "divergent", "barriers"),
    *("global_loads", "global_load_sectors", "global_load_bytes"),
    *("global_stores", "global_store_sectors", "global_store_bytes"),
    *("copies", "copy_sectors", "copy_bytes"),
    *("shared_loads", "shared_load_wavefronts", "shared_stores", "shared_store_wavefronts"),
    *("tensor_core", "special_function", "shuffles"),
)
_MOST_PARAMETERS = 256


class PtxError(RuntimeError):
    """PTX that cannot be read, or a launch that has made mistakes."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("moment", ctypes.c_int32),
        ("watch_shared", ctypes.c_int32),
        ("watch_global", ctypes.c_int32),
        ("round_to_zero", ctypes.c_int32),
        ("parameters", ctypes.c_char_p),
        ("ranges", ctypes.POINTER(ctypes.c_uint64)),
        ("names", ctypes.c_char_p),
        ("range_count", ctypes.c_int32),
        ("statistics", ctypes.POINTER(ctypes.c_uint64)),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.interpreter()))
    library.ptx_message.restype = ctypes.c_char_p
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_load.argtypes = [ctypes.c_char_p]
    library.ptx_kernels.restype = ctypes.c_char_p
    library.ptx_kernels.argtypes = [ctypes.c_void_p]
    library.ptx_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    library.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return library


@dataclass(frozen=True)
class Range:
    """The memory of a tensor."""

    name: str
    begin: int
    end: int


@dataclass
class Launch:
    """How to run a kernel; without ranges global memory is not watched."""

    grid: tuple[int, int, int] = (1, 1, 1)
    threads: tuple[int, int, int] = (32, 1, 1)
    shared: int = 0  # bytes, beside what the kernel declares
    ranges: Sequence[Range] = ()
    seed: int = 0
    moment: int = 2
    watch_shared: bool = True
    watch_global: bool = True
    round_to_zero: bool = True
    statistics: dict[str, int] | None = field(default=None)  # that are added to


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str):
        self._library = _library()
        self._handle = self._library.ptx_load(text.encode())
        if not self._handle:
            raise PtxError(self._library.ptx_message().decode())

    def kernels(self) -> list[str]:
        return self._library.ptx_kernels(self._handle).decode().split()

    def parameters(self, kernel: str) -> list[tuple[int, int]]:
        """Offset and size of each parameter."""
        numbers = (ctypes.c_uint32 * (2 * _MOST_PARAMETERS))()
        count = self._library.ptx_parameters(self._handle, kernel.encode(), numbers, _MOST_PARAMETERS)
        return [(numbers[2 * i], numbers[2 * i + 1]) for i in range(count)]

    def launch(self, kernel: str, parameters: bytes, how: Launch) -> None:
        """Runs a kernel; PtxError names each mistake with the line of the PTX."""
        numbers = [number for found in how.ranges for number in (found.begin, found.end)]
        counts = (ctypes.c_uint64 * len(STATISTICS))()
        launch = _Launch(
            grid=how.grid,
            threads=how.threads,
            dynamic_shared=how.shared,
            seed=how.seed,
            moment=how.moment,
            watch_shared=how.watch_shared,
            watch_global=how.watch_global,
            round_to_zero=how.round_to_zero,
            parameters=parameters + bytes(16),
            ranges=(ctypes.c_uint64 * max(len(numbers), 1))(*numbers),
            names="\n".join(found.name for found in how.ranges).encode(),
            range_count=len(how.ranges),
            statistics=counts if how.statistics is not None else None,
        )
        failed = self._library.ptx_launch(self._handle, kernel.encode(), ctypes.byref(launch))
        if how.statistics is not None:
            for name, count in zip(STATISTICS, counts, strict=True):
                how.statistics[name] = how.statistics.get(name, 0) + count
        if failed:
            raise PtxError(self._library.ptx_message().decode())
