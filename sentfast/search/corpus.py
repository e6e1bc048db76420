"""A corpus that is packed once and searched many times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sentfast.ops import checks
from sentfast.ops import search as ops
from sentfast.search import arguments, files, inputs, segments
from sentfast.search.results import Stats, TopK
from sentfast.search.segments import Segment


class Corpus:
    r"""Rows that are packed once and searched many times. Results are exact: those of :func:`sentfast.search.topk`.

    Args:
        embeddings: [N, D] of float32, float16 or bfloat16, as tensor, array or list; N >= 1. float32 rows are kept as
            they are, not copied: do not change them. They may be a memory map larger than the memory. Tensors on a
            GPU are searched there.
        precision: "int8" for a first pass over a packed copy (D + 24 bytes per row), "bf16" for one that is twice as
            large and leaves fewer pairs to be scored exactly, or "fp32" for none.
        ids: a name for each row, whole numbers or texts; see :meth:`names`.
        metric: "cos", "dot" or "euclidean" (:math:`-\lVert q - k \rVert`), unless a search says another.

    Attributes:
        stats: what all searches so far have done, as :class:`Stats`.
    """

    def __init__(
        self, embeddings: Any, precision: str = "int8", ids: Sequence[int] | Sequence[str] | None = None, metric="cos"
    ):
        self.precision = arguments.precision(precision)
        self.metric = arguments.metric(metric)
        self.stats = Stats()
        self._file: files.File | None = None
        rows = arguments.rows("embeddings", embeddings)
        self._ids: list[Any] | None = None if ids is None else arguments.names(ids, len(rows))
        self.segments: list[Segment] = [segments.segment(rows, ops.pack(rows, self.precision))]

    @classmethod
    def for_one_search(cls, rows: Tensor, queries: int) -> Corpus:
        """Float32 rows that are searched once, for so many queries."""
        segment = segments.for_one_search(rows, queries)
        return cls._of([segment], "int8" if segment.packed else "fp32", "cos")

    @classmethod
    def _of(cls, found: list[Segment], precision: str, metric: str) -> Corpus:
        self = cls.__new__(cls)
        self.stats, self.segments, self._ids, self._file = Stats(), found, None, None
        self.precision, self.metric = precision, metric
        return self

    def __len__(self) -> int:
        last = self.segments[-1]
        return last.first + len(last.rows)

    @property
    def dim(self) -> int:
        """The number of columns."""
        return self.segments[0].rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are and the results will be."""
        return self.segments[0].rows.device

    @property
    def ids(self) -> list[Any] | None:
        return None if self._ids is None else list(self._ids)

    def __repr__(self) -> str:
        return f"Corpus({len(self):,} x {self.dim}, precision={self.precision!r}, metric={self.metric!r})"

    def names(self, indices: Any) -> list[Any]:
        """The ids of rows, nested as `indices` are; None for -1. Without ids they are the numbers themselves."""
        if isinstance(indices, (Tensor, np.ndarray)):
            indices = indices.tolist() if indices.ndim == 0 else arguments.listed("indices", indices)
        if isinstance(indices, (list, tuple)):
            return [self.names(index) for index in indices]  # type: ignore[misc]
        indices = checks.whole("indices", indices, -1, len(self) - 1)
        if indices < 0:
            return None  # type: ignore[return-value]
        return indices if self._ids is None else self._ids[indices]

    def append(self, embeddings: Any, ids: Sequence[int] | Sequence[str] | None = None) -> None:
        """Adds rows at the end. Short segments are packed again together, so many small additions stay fast."""
        rows = arguments.rows("embeddings", embeddings)
        inputs.same_columns("embeddings", rows, "the corpus", self.dim)
        rows = inputs.on_device("embeddings", rows, embeddings, self.device)
        if (ids is None) != (self._ids is None):
            raise ValueError(f"ids: expected {'none' if self._ids is None else 'one for each row'}, as the corpus has")
        new = arguments.names(ids, len(rows), self._ids) if ids is not None and self._ids is not None else []
        kept = list(self.segments)
        # Each row is copied only when its segment at least doubles.
        together = [rows]
        while kept and self._owned(kept[-1]) and len(kept[-1].rows) <= sum(map(len, together)):
            together.insert(0, kept.pop().rows)
        rows = torch.cat(together) if len(together) > 1 else rows
        first = kept[-1].first + len(kept[-1].rows) if kept else 0
        kept.append(segments.segment(rows, ops.pack(rows, self.precision), first))
        self.segments = kept
        if self._ids is not None:
            self._ids = [*self._ids, *new]

    def _owned(self, segment: Segment) -> bool:
        """A mapped segment is not copied into memory."""
        return self._file is None or segment.first > 0

    def topk(
        self,
        queries: Any,
        k: int,
        *,
        metric: str | None = None,
        threshold: float | None = None,
        exclude: Any = None,
        exclude_self: bool = False,
        ceiling: Any = None,
        progress: bool = False,
    ) -> TopK:
        """The k best rows for each query; see :func:`sentfast.search.topk`."""
        wanted = arguments.queries(queries, self.dim, self.device)
        k = checks.whole("k", k, 1, len(self))
        self.check()
        scores, indices, stats = segments.topk(
            self.segments,
            wanted,
            k,
            self.metric_of(metric),
            threshold=None if threshold is None else checks.number("threshold", threshold),
            highest=arguments.ceiling(ceiling, len(wanted), self.device),
            excluded=arguments.excluded(exclude, exclude_self, len(wanted), len(self), self.device),
            progress="Searching" if checks.flag("progress", progress) else "",
        )
        self.check()
        self.stats += stats
        result = TopK(scores, indices, stats)
        return result.numpy() if arguments.wants_numpy(queries) else result

    def metric_of(self, metric: str | None) -> str:
        """The metric of a search that names this one or None."""
        return self.metric if metric is None else arguments.metric(metric)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Rows by their numbers, float32 [len(indices), D]; a copy."""
        indices = arguments.listed("indices", indices)
        found = torch.empty(len(indices), self.dim, dtype=torch.float32, device=self.device)
        for place, index in enumerate(indices):
            index = checks.whole("indices", index, 0, len(self) - 1)
            segment = next(segment for segment in reversed(self.segments) if segment.first <= index)
            found[place] = segment.rows[index - segment.first]
        return found

    def blocks(self, queries: Tensor | None, progress: str = "") -> Iterator[tuple[Tensor, int | None]]:
        """The queries of one operator call after the other, or all own rows with the number of the first of them."""
        if queries is not None:
            for part in segments.slices(queries, len(self), progress):
                yield queries[part], None
            return
        for segment in self.segments:
            for part in segments.slices(segment.rows, len(self), progress):
                yield segment.rows[part], segment.first + part.start

    def check(self) -> None:
        """Raises :class:`CorpusFileError` if the file that a mapped corpus reads was changed in place."""
        if self._file is not None:
            self._file.check()

    def save(self, path: str | os.PathLike) -> None:
        """Writes rows, packed rows and ids to one file, in the safetensors format.

        The file is complete or not there: it is written beside its place and renamed.
        """
        path = arguments.path(path)
        self.check()
        tensors: dict[str, Tensor] = {}
        for number, segment in enumerate(self.segments):
            tensors[f"rows.{number}"] = segment.rows.cpu()
            if segment.packed is not None:
                tensors.update({f"{name}.{number}": part.cpu() for name, part in segment.packed._asdict().items()})
        tensors.update(_names_to_tensors(self._ids))
        about = {"precision": self.precision, "metric": self.metric, "segments": str(len(self.segments))}
        files.write(path, tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike, mmap: bool = True, verify: bool = True) -> Corpus:
        """Reads a corpus that :meth:`save` has written.

        Args:
            mmap: map the file instead of reading it; then the corpus may be larger than the memory, and the file must
                not be changed in place. Replacing it, as :meth:`save` does, is safe.
            verify: check every byte against its checksum; without it only the header and the sizes.

        Raises:
            CorpusFileError: the file is damaged, cut off, of another kind or of a newer format.
        """
        path, mmap, verify = arguments.path(path), checks.flag("mmap", mmap), checks.flag("verify", verify)
        file = files.File(path, mapped=mmap, verify=verify)
        try:
            precision = arguments.precision(file.metadata["precision"])
            self = cls._of(_segments(file, precision), precision, arguments.metric(file.metadata["metric"]))
            self._ids = _names_from_tensors(file.tensors)
            if self._ids is not None and len(self._ids) != len(self):
                raise ValueError(f"{len(self._ids)} ids for {len(self)} rows")
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise files.CorpusFileError(f"{path}: damaged: {error}") from error
        self._file = file if mmap else None
        return self


def _segments(file: files.File, precision: str) -> list[Segment]:
    """The segments of a file; the operators check the packed rows' shapes with each call."""
    found: list[Segment] = []
    first = 0
    for number in range(int(file.metadata["segments"])):
        rows = file.tensors[f"rows.{number}"]
        if rows.dtype != torch.float32 or rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"rows of {rows.dtype} and shape {list(rows.shape)}")
        if found and rows.shape[1] != found[0].rows.shape[1]:
            raise ValueError("rows of different lengths")
        packed = None
        if precision != "fp32":
            packed = ops.Packed(*(file.tensors[f"{name}.{number}"] for name in ops.Packed._fields))
            expected = ops.pack_fake(rows.to("meta"), ops.BITS[precision])
            if [(x.shape, x.dtype) for x in packed] != [(x.shape, x.dtype) for x in expected]:
                raise ValueError("packed rows of another shape than the rows")
        found.append(segments.segment(rows, packed, first))
        first += len(rows)
    if not found:
        raise ValueError("no rows")
    return found


def _names_to_tensors(ids: list[Any] | None) -> dict[str, Tensor]:
    if ids is None:
        return {}
    if isinstance(ids[0], int):
        return {"ids": torch.tensor(ids, dtype=torch.int64, device="cpu")}
    texts = json.dumps(ids, ensure_ascii=False).encode()
    return {"names": torch.frombuffer(bytearray(texts), dtype=torch.uint8)}


def _names_from_tensors(tensors: dict[str, Tensor]) -> list[Any] | None:
    """The reverse; a ValueError for anything that it cannot have made."""
    if "ids" in tensors:
        ids = tensors["ids"]
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"ids of {ids.dtype} and shape {list(ids.shape)}")
        return ids.tolist()
    if "names" in tensors:
        try:
            names = json.loads(tensors["names"].numpy().tobytes())
        except RecursionError as error:
            raise ValueError("names that are no list of texts") from error
        if not isinstance(names, list) or not all(type(name) is str for name in names):
            raise ValueError("names that are no list of texts")
        return names
    return None
