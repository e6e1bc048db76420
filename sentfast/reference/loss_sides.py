"""The two sides of a contrastive loss: embeddings with the norms of their prefixes, and the gradient they gather."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.similarity import NORMALIZE_EPS


@dataclass
class Prefix:
    """The first `end` columns of the embeddings, of which `columns` are not in a shorter prefix."""

    end: int
    columns: slice
    factor: float  # of its losses


def prefixes_of(dims: list[int], dim_weights: list[float]) -> list[Prefix]:
    begins = [0, *dims[:-1]]
    return [
        Prefix(dim, slice(begin, dim), weight) for begin, dim, weight in zip(begins, dims, dim_weights, strict=True)
    ]


@dataclass
class Side:
    """Embeddings with their norms, the gradient that they gather, their ids, and the guide's.

    `norms` and `along` have a column for each prefix; `along` is how much of x lies in its gradient, with several
    prefixes, where the gradient itself is a sum over them.
    """

    x: Tensor
    norms: Tensor | None
    gradient: Tensor | None
    along: Tensor | None
    ids: Tensor | None
    guide: Tensor | None
    guide_norm: Tensor | None

    def rows(self, begin: int, end: int) -> Side:
        return replace(self, **{name: x[begin:end] for name, x in vars(self).items() if x is not None})


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.to(accumulation_dtype(x.dtype)), dim=-1)


def reciprocal(norm: Tensor) -> Tensor:
    return 1 / norm.clamp(min=NORMALIZE_EPS)


def _within_range(x: Tensor, norms: Tensor, prefixes: list[Prefix]) -> tuple[Tensor, Tensor]:
    """x as its products are made of it: zeros where a prefix has a norm that its dtype cannot hold, as x / |x| has.

    A factor, so that infinity becomes NaN, as in x / |x|; no number is looked at, so nobody waits for a GPU.
    """
    if prefixes[0].end == 1:
        # A single number has a norm even where its square has none, and its x / |x| is its sign.
        beyond = (norms[:, 0] ** 2).isinf() & norms[:, 0].isfinite()
        norms = torch.cat([norms[:, :1].masked_fill(beyond.unsqueeze(1), 1), norms[:, 1:]], dim=1)
        sign = torch.where(beyond, x[:, 0].sign(), x[:, 0])
        x = torch.cat([sign.unsqueeze(1), x[:, 1:]], dim=1)
    held = norms != torch.inf
    if len(prefixes) == 1:
        return x * held, norms
    parts = [x[:, prefix.columns] * held[:, k, None] for k, prefix in enumerate(prefixes)]
    return torch.cat([*parts, x[:, prefixes[-1].end :]], dim=1), norms


def side_of(
    x: Tensor, prefixes: list[Prefix], cosine: bool, gradient: bool, ids: Tensor | None, guide: Tensor | None
) -> Side:
    dtype = accumulation_dtype(x.dtype)
    norms = torch.stack([_norm(x[:, : prefix.end]) for prefix in prefixes], dim=1) if cosine else None
    guide_norm = None if guide is None else _norm(guide)
    if norms is not None:
        x, norms = _within_range(x, norms, prefixes)
    if guide is not None and guide_norm is not None:
        guide = guide * (guide_norm != torch.inf).unsqueeze(1)
    return Side(
        x,
        norms,
        torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if gradient else None,
        torch.zeros_like(norms) if gradient and norms is not None else None,
        ids,
        guide,
        guide_norm,
    )


def through_norms(side: Side, prefixes: list[Prefix]) -> Tensor:
    """The gradient to x; below eps a norm is a constant, so nothing is taken away along x."""
    assert side.gradient is not None
    gradient = side.gradient
    if side.norms is not None and side.along is not None:
        x = side.x.to(gradient.dtype)
        if len(prefixes) == 1:
            columns = prefixes[0].columns
            side.along[:, 0] = (x[:, columns] * gradient[:, columns]).sum(dim=-1)
        along = torch.where(side.norms < NORMALIZE_EPS, 0, side.along * reciprocal(side.norms) ** 2)
        for k, prefix in enumerate(prefixes):
            # A column is in its prefix and in all longer ones.
            gradient[:, prefix.columns] -= x[:, prefix.columns] * along[:, k:].sum(dim=1, keepdim=True)
    return gradient.to(side.x.dtype)
