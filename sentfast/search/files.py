"""Tensors in one file that can be mapped into memory: the safetensors format, with a checksum for each tensor.

A file is written to a temporary name beside its own and renamed when it is complete, so a reader never meets half a
file, and a file that is mapped by another process keeps its old content. Reading checks all that the header says before
a byte of the data is used, and with `verify` the data too.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "sentfast.corpus"
FORMAT_VERSION = 1
_ALIGNMENT = 64
_HEADER_LIMIT = 100_000_000  # that of the safetensors library
_MOST = 2**62  # bytes of a tensor
_MOST_DIMENSIONS = 8
_BLOCK = 1 << 24  # bytes written and summed at a time
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class CorpusFileError(ValueError):
    """The file is not a corpus, is damaged, is of a newer format, or has changed since it was opened."""


def _is_strings(about: Any) -> bool:
    return isinstance(about, dict) and "format" in about and all(isinstance(value, str) for value in about.values())


def _is_counts(values: Any) -> bool:
    """A list of whole numbers from 0 on; True and 2.0 are none."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def write(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes the tensors to the file, with never more than a block of rows copied in memory."""
    path = Path(path)
    # Widest elements first: the format leaves no hole between tensors, and each has to lie aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    sums = dict.fromkeys(tensors, 0)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_header(tensors, metadata, sums))
            for name, tensor in tensors.items():
                for block in _blocks(tensor):
                    sums[name] = zlib.crc32(block, sums[name])
                    file.write(block)
            file.seek(0)
            file.write(_header(tensors, metadata, sums))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _header(tensors: dict[str, Tensor], metadata: dict[str, str], sums: dict[str, int]) -> bytes:
    """Its length and its JSON. Checksums have a fixed width: their values do not change the length."""
    texts = {name: f"{value:08x}" for name, value in sums.items()}
    about = {**metadata, "format": FORMAT, "version": str(FORMAT_VERSION), "crc32": json.dumps(texts)}
    head: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        head[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    about["header"] = _header_sum(head)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _header_sum(head: dict[str, Any]) -> str:
    """The checksum of all in the header but itself."""
    about = {name: value for name, value in head["__metadata__"].items() if name != "header"}
    text = json.dumps({**head, "__metadata__": about}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, some rows at a time."""
    rows = tensor.unsqueeze(0) if tensor.ndim == 0 else tensor
    step = max(1, _BLOCK // max(1, rows[:1].numel() * rows.element_size()))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].contiguous()
        if part.numel():
            yield part.flatten().view(torch.uint8).numpy().data


class File:
    """A file that :func:`write` has made.

    Attributes:
        metadata: what was written with the tensors.
        tensors: name -> tensor; with `mapped` they are views of the file, read when they are used.
        mapped: whether that is so.
    """

    def __init__(self, path: str | os.PathLike, *, mapped: bool, verify: bool):
        self.path = Path(path)
        self.mapped = mapped
        self._file = open(self.path, "rb")  # noqa: SIM115  stays open: whatever its name becomes, it is mapped
        try:
            self._stamp = self._stamp_now()
            self._start, head = self._read_header()
            self.metadata: dict[str, str] = head.pop("__metadata__")
            sums = self._sums(head, self.metadata.pop("crc32", ""))
            self.tensors = self._open(head)
            if verify:
                self._verify(sums)
            if not mapped:
                self.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
                self._check_unchanged()
        except BaseException:
            self._file.close()
            raise
        if not mapped:
            self._file.close()

    def check(self) -> None:
        """Raises :class:`CorpusFileError` if the mapped file has changed since it was opened."""
        if self.mapped:
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self._stamp_now() != self._stamp:
            raise self._error("its size or time has changed since it was opened; load it again")

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _error(self, what: str) -> CorpusFileError:
        return CorpusFileError(f"{self.path}: {what}")

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the header, of which the checksum is right."""
        first = self._file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(_HEADER_LIMIT, self._stamp[0] - 8):
            raise self._error("expected a corpus saved by sentfast, got a file without its header (foreign or cut off)")
        head = self._parsed(self._file.read(length))
        about = head.get("__metadata__") if isinstance(head, dict) else None
        if about is None or not _is_strings(about) or about["format"] != FORMAT:
            raise self._error("expected a corpus saved by sentfast, got another kind of file")
        if about.get("version") != str(FORMAT_VERSION):
            version = about.get("version")
            raise self._error(f"expected format version {FORMAT_VERSION}, got {version}; a newer sentfast reads it")
        if (8 + length) % _ALIGNMENT or about.get("header") != self._header_sum(head):
            raise self._error("damaged: the header does not have its checksum")
        return 8 + length, head

    def _parsed(self, text: bytes | str) -> Any:
        """None if it is no JSON, or is nested too deeply to be ours."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None

    def _header_sum(self, head: dict[str, Any]) -> str:
        try:
            return _header_sum(head)
        except RecursionError:
            return ""

    def _sums(self, head: dict[str, Any], text: str) -> dict[str, str]:
        sums = self._parsed(text)
        if not isinstance(sums, dict) or sums.keys() != head.keys():
            raise self._error("damaged: tensors without a checksum")
        return sums

    def _bytes_of(self, name: str, entry: Any, start: int) -> int:
        """The bytes of a tensor that begins at `start`, by its entry in the header."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"damaged: {name} is not described as a tensor")
        shape, kind = entry["shape"], entry["dtype"]
        if not isinstance(kind, str) or kind not in _DTYPES or not _is_counts(shape) or len(shape) > _MOST_DIMENSIONS:
            raise self._error(f"damaged: {name} has no dtype and shape of a tensor")
        # Not more than a file can have, whatever the sizes beside a 0 are.
        size = math.prod(shape) * _DTYPES[kind].itemsize
        if max(shape, default=0) > _MOST or size > _MOST:
            raise self._error(f"damaged: {name} is larger than the file")
        offsets = entry["data_offsets"]
        if not _is_counts(offsets) or offsets != [start, start + size] or start % _DTYPES[kind].itemsize:
            raise self._error(f"damaged: {name} lies elsewhere than its shape says")
        return size

    def _open(self, head: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors as views of the mapped file. The order of the header is that of the data."""
        size = self._stamp[0] - self._start
        end = 0
        for name, entry in head.items():
            end += self._bytes_of(name, entry, end)
        if end != size:
            kind = "cut off" if size < end else "damaged"
            raise self._error(f"{kind}: expected {end} bytes of data, got {size}")
        # Private pages: nothing that is written to a tensor reaches the file.
        mapped = np.memmap(self._file, np.uint8, "c", self._start, (size,)) if size else np.empty(0, np.uint8)
        data = torch.from_numpy(mapped)
        return {
            name: data[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
            for name, entry in head.items()
        }

    def _verify(self, sums: dict[str, str]) -> None:
        for name, tensor in self.tensors.items():
            found = 0
            for block in _blocks(tensor):
                found = zlib.crc32(block, found)
            if f"{found:08x}" != sums[name]:
                raise self._error(f"damaged: {name} does not have its checksum")
