"""Compares what three runs of a case have left: ours, stock's, and stock's in float64 as the judge of rounding.

Everything has to be the same: types, keys and their order, shapes, dtypes, devices, strides, what requires a gradient,
exceptions by their type. Floating-point values follow the rule of ``tests/accuracy.py`` with a larger share for
roundings, since thousands of cases are looked at:

    err(ours) <= 2 * err(stock) + SLACK * ROUNDINGS * eps(dtype) * size

In half precision that many roundings would be as much as the size itself: there HALF_ROUNDINGS take their place.
Where stock's own error is beyond ROUNDINGS of them, the case multiplies roundings, and whose are smaller is chance,
which changes with the instruction set: there ours may err SLACK times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from accuracy import ROUNDINGS, error
from draw import Raised
from torch import Tensor

SLACK = 8
HALF_ROUNDINGS = 16
UNJUDGED = 1e-4  # of the size, where the exact run has nothing to say


@dataclass
class Sized:
    """Numbers, gradients mostly, that were made of others as large as `size`; they may be views of larger tensors."""

    value: Any
    size: float


@dataclass
class Tokens:
    """Rows of tokens [B, L, ...]; where the mask is 0 they are zeros or stock's; derived: what a head makes of them."""

    value: Any
    mask: Tensor
    derived: bool = False


@dataclass
class Drawn:
    """Numbers that depend on random ones which cannot be the same: all but the values is compared."""

    value: Any


@dataclass
class Steps:
    """Whole numbers made by rounding: one step apart is the same, or twice as far from the exact ones as stock's.

    bits: of packed bits, few may differ.
    """

    value: Any
    bits: bool = False


@dataclass
class Ranking:
    """Ids and their scores, best first. Other ids may stand where the scores are equal but for rounding."""

    ids: list
    scores: list[float]
    size: float = 1.0


class Comparison:
    def __init__(self, coarse: bool = False) -> None:
        self.coarse = coarse  # see draw.py
        self.differences: list[str] = []
        self.compared = 0  # numbers

    def differ(self, path: str, text: str) -> None:
        self.differences.append(f"{path or 'result'}: {text}")

    def __call__(self, ours: Any, stock: Any, exact: Any, path: str = "") -> None:
        if isinstance(ours, Raised) or isinstance(stock, Raised):
            self.errors(ours, stock, path)
        elif type(ours) is not type(stock):
            self.differ(path, f"type {type(ours).__name__}, stock has {type(stock).__name__}")
        elif isinstance(stock, (Sized, Tokens, Drawn, Steps, Ranking)):
            judge = exact if type(exact) is type(stock) else None
            getattr(self, type(stock).__name__.lower())(ours, stock, judge, path)
        elif isinstance(stock, Tensor):
            self.tensor(ours, stock, exact, path)
        elif isinstance(stock, np.ndarray):
            self.array(ours, stock, exact, path)
        elif isinstance(stock, Mapping):
            self.mapping(ours, stock, exact, path)
        elif isinstance(stock, (list, tuple)):
            self.sequence(ours, stock, exact, path)
        elif isinstance(stock, (float, np.floating)):
            self.numbers(*(torch.tensor(float(x)) for x in (ours, stock)), judge_of(exact), path)
        elif is_dataclass(stock) and not isinstance(stock, type):
            for each in fields(stock):
                self(*(getattr(x, each.name, None) for x in (ours, stock, exact)), f"{path}.{each.name}")
        elif type(stock).__eq__ is not object.__eq__ and not bool(ours == stock):
            self.differ(path, f"{ours!r:.200}, stock has {stock!r:.200}")

    def errors(self, ours: Any, stock: Any, path: str) -> None:
        if not (isinstance(ours, Raised) and isinstance(stock, Raised) and ours.type is stock.type):
            self.differ(path, f"{describe(ours)}; stock: {describe(stock)}")

    def mapping(self, ours: Any, stock: Any, exact: Any, path: str) -> None:
        if list(ours) != list(stock):
            self.differ(path, f"keys {list(ours)}, stock has {list(stock)}")
        exact = exact if isinstance(exact, Mapping) else {}
        for key in stock:
            if key in ours:
                self(ours[key], stock[key], exact.get(key), f"{path}[{key!r}]" if path else str(key))

    def sequence(self, ours: Any, stock: Any, exact: Any, path: str) -> None:
        if len(ours) != len(stock):
            self.differ(path, f"{len(ours)} elements, stock has {len(stock)}")
            return
        known = isinstance(exact, (list, tuple)) and len(exact) == len(stock)
        for i, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
            self(mine, theirs, exact[i] if known else None, f"{path}[{i}]")

    def tensor(self, ours: Tensor, stock: Tensor, exact: Any, path: str, size: float = 0.0) -> None:
        for name in ("layout", "dtype", "device", "requires_grad"):
            if getattr(ours, name) != getattr(stock, name):
                self.differ(path, f"{name} {getattr(ours, name)}, stock has {getattr(stock, name)}")
        if ours.shape != stock.shape:
            self.differ(path, f"shape {list(ours.shape)}, stock has {list(stock.shape)}")
            return
        if ours.is_inference() != stock.is_inference():
            self.differ(path, f"inference tensor {ours.is_inference()}, stock has {stock.is_inference()}")
        if stock.layout != torch.strided:
            self(ours.to_dense(), stock.to_dense(), to_dense(exact), path)
            return
        if stock.is_contiguous() and not ours.is_contiguous():
            self.differ(path, f"strides {ours.stride()}, stock's are contiguous")
        if not size:
            self.held(ours, stock, path)
        self.numbers(ours.detach(), stock.detach(), exact, path, size)

    def held(self, ours: Tensor, stock: Tensor, path: str) -> None:
        """A result must not keep more memory than stock's."""
        mine, theirs = ours.untyped_storage().nbytes(), stock.untyped_storage().nbytes()
        if mine > theirs and mine > 2 * ours.nbytes:
            self.differ(path, f"holds {mine} bytes for {ours.nbytes}, stock {theirs}")

    def array(self, ours: Any, stock: Any, exact: Any, path: str) -> None:
        for name in ("dtype", "shape"):
            if getattr(ours, name) != getattr(stock, name):
                self.differ(path, f"{name} {getattr(ours, name)}, stock has {getattr(stock, name)}")
                return
        for flag in ("C_CONTIGUOUS", "WRITEABLE"):
            if stock.flags[flag] and not ours.flags[flag]:
                self.differ(path, f"not {flag}, stock is")
        if stock.dtype.kind in "fiub":
            judge = torch.from_numpy(exact) if isinstance(exact, np.ndarray) and exact.dtype.kind == "f" else None
            self.numbers(torch.tensor(ours), torch.tensor(stock), judge, path)
        elif not (ours == stock).all():
            self.differ(path, f"{ours!r:.200}, stock has {stock!r:.200}")

    def numbers(self, ours: Tensor, stock: Tensor, exact: Any, path: str, size: float = 0.0) -> None:
        if stock.is_meta:  # has no numbers
            return
        self.compared += stock.numel()
        if not stock.is_floating_point():
            wrong = int((ours != stock).sum())
            if wrong:
                self.differ(path, f"{wrong} of {stock.numel()} integers differ")
            return
        judged = isinstance(exact, Tensor) and exact.shape == stock.shape and exact.is_floating_point()
        true = exact.detach().double() if judged else stock.double()
        eps = max(torch.finfo(stock.dtype).eps, torch.finfo(torch.bfloat16).eps if self.coarse else 0.0)
        # Sums that leave float16 in stock do not here, where they are float32: ours are held to the exact ones.
        if judged and stock.dtype == torch.float16:
            stock = stock.where(stock.isfinite() | ~ours.isfinite() | ~true.isfinite(), true.to(stock.dtype))
        # Where one of the two is not finite, stock decides: a mask of padding may overflow in float64 alone.
        true = torch.where(stock.isfinite() == true.isfinite(), true, stock.double())
        odd = ~(true.isfinite() & stock.isfinite())
        same = (ours == stock) | (ours.isnan() & stock.isnan()) | ~odd
        if not same.all():
            where = (~same).nonzero()[0].tolist()
            self.differ(
                path,
                f"{int((~same).sum())} of {stock.numel()} differ in inf or NaN; at {where} {ours[tuple(where)]}, "
                f"stock has {stock[tuple(where)]}",
            )
            return
        finite = true[~odd]
        size = max(size, finite.abs().max().item() if finite.numel() else 0.0)
        rounding = (SLACK * ROUNDINGS if eps < 1e-4 else HALF_ROUNDINGS) * eps * size
        judge = torch.where(odd, float("nan"), true)
        theirs = error(stock, judge)
        factor = SLACK if theirs > ROUNDINGS * eps * size else 2
        limit = factor * theirs + rounding if judged else max(rounding, UNJUDGED * size)
        mine = error(ours, judge)
        if not mine <= limit and not ("gradient" in path and self.jumps(ours, stock, judge)):
            worst = (ours.double() - true).abs().where(~odd, torch.tensor(0.0)).nan_to_num(float("inf"))
            places = np.unravel_index(int(worst.argmax()), tuple(worst.shape)) if worst.ndim else ()
            where = tuple(int(i) for i in places)
            known = f"exact {true[where].item():.6g}" if judged else "no exact result"
            self.differ(
                path,
                f"error {mine:.3g} > {limit:.3g} (stock's {theirs:.3g}, size {size:.3g}); at {list(where)} "
                f"{ours[where].item():.6g}, stock has {stock[where].item():.6g}, {known}",
            )

    def jumps(self, ours: Tensor, stock: Tensor, judge: Tensor) -> bool:
        """Whether single numbers of a gradient alone are far off, as in half precision on a kink's other side.

        Such as that of relu or of an absolute value, of which one changes a tenth of a small gradient.
        """
        if not self.coarse or stock.numel() < 1000:
            return False
        mine, theirs = ((x.double() - judge).nan_to_num().norm().item() for x in (ours, stock))
        size = judge.nan_to_num().norm().item()
        return mine <= 2 * theirs + size / 10

    def sized(self, ours: Sized, stock: Sized, exact: Sized | None, path: str) -> None:
        judge = exact.value if exact is not None else None
        if isinstance(stock.value, Tensor) and isinstance(ours.value, Tensor):
            size = exact.size if exact is not None and stock.size != stock.size else stock.size
            self.tensor(ours.value, stock.value, judge, path, size)
        else:
            self(ours.value, stock.value, judge, path)

    def tokens(self, ours: Tokens, stock: Tokens, exact: Tokens | None, path: str) -> None:
        mine, theirs, judge = ours.value, stock.value, exact.value if exact is not None else None
        if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape):
            self(mine, theirs, judge, path)
            return
        hidden = (stock.mask == 0)[(..., *[None] * (theirs.ndim - stock.mask.ndim))].expand_as(theirs)
        if hidden.is_meta or not hidden.any():
            self(mine, theirs, judge, path)
            return
        zeroed = torch.zeros((), dtype=theirs.dtype)
        if stock.derived or bool((mine.detach()[hidden] == 0).all()):
            mine, theirs = mine.where(~hidden, zeroed), theirs.where(~hidden, zeroed)
            judge = judge.where(~hidden, zeroed.double()) if isinstance(judge, Tensor) else None
        self(mine, theirs, judge, path)

    def drawn(self, ours: Drawn, stock: Drawn, exact: Drawn | None, path: str) -> None:
        before = len(self.differences)
        self(ours.value, stock.value, exact.value if exact is not None else None, path)
        kept = [text for text in self.differences[before:] if ": error " not in text]
        self.differences[before:] = kept

    def steps(self, ours: Steps, stock: Steps, exact: Any, path: str) -> None:
        if any(isinstance(x.value, Tensor) and x.value.is_meta for x in (ours, stock)):
            self(ours.value, stock.value, None, path)
            return
        mine, theirs = np.asarray(ours.value), np.asarray(stock.value)
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or type(ours.value) is not type(stock.value):
            self.differ(path, f"{mine.dtype} {mine.shape}, stock has {theirs.dtype} {theirs.shape}")
            return
        if stock.bits:
            wrong = int((np.unpackbits(mine.view(np.uint8)) != np.unpackbits(theirs.view(np.uint8))).sum())
            if wrong > 2 + mine.size * 8 // 1000:
                self.differ(path, f"{wrong} of {mine.size * 8} bits differ")
            return
        true = np.asarray(exact.value) if isinstance(exact, Steps) else theirs
        true = true if true.shape == theirs.shape else theirs
        off = [int(abs(x.astype(int) - true.astype(int)).max(initial=0)) for x in (mine, theirs)]
        if off[0] > 1 + 2 * off[1]:
            self.differ(
                path, f"integers are off by {off[0]}, stock's by {off[1]}: {mine!r:.100}, stock {theirs!r:.100}"
            )

    def ranking(self, ours: Ranking, stock: Ranking, exact: Ranking | None, path: str) -> None:
        if len(ours.ids) != len(stock.ids):
            self.differ(path, f"{len(ours.ids)} results, stock has {len(stock.ids)}")
            return
        judge = exact.scores if exact is not None and len(exact.scores) == len(stock.scores) else stock.scores
        columns = (torch.tensor(x, dtype=torch.float64) for x in (ours.scores, stock.scores, judge))
        mine, theirs, true = columns
        self.numbers(mine.float(), theirs.float(), true, f"{path}.scores", stock.size)
        near = 64 * ROUNDINGS * torch.finfo(torch.float32).eps * stock.size
        by_id = dict(zip(map(repr, stock.ids), stock.scores, strict=True))
        for i, (a, b) in enumerate(zip(ours.ids, stock.ids, strict=True)):
            score = by_id.get(repr(a), stock.scores[-1])
            if a != b and score != stock.scores[i] and not abs(score - stock.scores[i]) <= near:
                self.differ(path, f"place {i}: id {a} with {ours.scores[i]}, stock has {b} with {stock.scores[i]}")
                return


def describe(x: Any) -> str:
    if isinstance(x, Raised):
        return repr(x)
    if isinstance(x, Tensor):
        return f"gave a tensor {list(x.shape)} {x.dtype}"
    if isinstance(x, np.ndarray):
        return f"gave an array {list(x.shape)} {x.dtype}"
    return f"gave {type(x).__name__} {x!r:.100}"


def judge_of(x: Any) -> Tensor | None:
    return torch.tensor(float(x), dtype=torch.float64) if isinstance(x, (float, int, np.floating)) else None


def to_dense(x: Any) -> Any:
    return x.to_dense() if isinstance(x, Tensor) and x.layout != torch.strided else x
