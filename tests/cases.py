"""THE table: for every operator how to call it, on which inputs, and what can be differentiated.

A row gives the public function and `calls(dtype, device, small)`, which draws fresh inputs. Sizes straddle the vector
widths (8 and 16 floats, tiles of 64 columns), lengths include 0 and 1, masks include left padding, holes and rows with
nothing in them. `small` keeps the number and size of the calls to what Triton's interpreter can do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import sentfast.functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """One call: `tensors` are the floating-point arguments, in order and differentiable; `options` the rest."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def to(self, dtype: torch.dtype) -> Call:
        return Call(tuple(x.to(dtype) for x in self.tensors), self.options, self.label)


@dataclass
class Case:
    name: str
    function: Callable[..., Tensor]
    calls: Callable[[torch.dtype, str, bool], Iterator[Call]]
    operators: tuple[str, ...]  # what must have run, forward and backward

    def run(self, call: Call) -> Tensor:
        return self.function(*call.tensors, **call.options)


def right_padded(batch: int, length: int) -> Tensor:
    lengths = torch.randint(0, length + 1, (batch, 1))
    return (torch.arange(length) < lengths).long()


MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda b, n: None,
    "right": right_padded,
    "left": lambda b, n: right_padded(b, n).flip(1).int(),
    "holes": lambda b, n: torch.rand(b, n) < 0.6,
    "int16": lambda b, n: (torch.rand(b, n) < 0.6).to(torch.int16) * 3,
}
MODES = (
    *("mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"),
    ("mean", "max"),
    ("weightedmean", "cls", "mean_sqrt_len_tokens", "lasttoken", "max", "mean"),
)


def cut(total: int, batch: int) -> Tensor:
    """cu_seqlens of `batch` sequences, some of them empty."""
    inner = torch.randint(0, total + 1, (batch - 1,)).sort().values
    return torch.cat([torch.tensor([0]), inner, torch.tensor([total])]).int()


def pool_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    """Every mode with every kind of mask and prompt; sizes and normalisation take turns."""
    sizes = [(2, 3, 5), (3, 6, 17)] if small else [(1, 1, 1), (3, 5, 8), (2, 7, 15), (4, 9, 33), (3, 21, 100)]
    kinds = ("holes", "packed") if small else (*MASKS, "packed")
    turns = itertools.cycle(itertools.product(sizes, (False, True)))
    next(turns) if torch.rand(()) < 0.5 else None
    for mode, kind, prompt in itertools.product(MODES, kinds, (0, 2)):
        (batch, length, dim), normalize = next(turns)
        options: dict[str, Any] = {"mode": mode, "prompt_length": prompt, "normalize": normalize}
        x = torch.randn(batch, length, dim, dtype=dtype, device=device)
        if kind == "packed":
            x = x.flatten(0, 1)
            options["cu_seqlens"] = cut(batch * length, batch + 1).to(device)
        else:
            mask = MASKS[kind](batch, length)
            options["attention_mask"] = None if mask is None else mask.to(device)
        yield Call((x,), options, f"{batch}x{length}x{dim} {mode} prompt {prompt} {kind} normalize {normalize}")


def vectors(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def normalize_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    for shape in (
        [(1,), (3, 8), (2, 3, 17)] if small else [(1,), (5, 15), (4, 16), (2, 3, 17), (7, 33), (3, 384), (2, 1500)]
    ):
        yield Call((vectors(*shape, dtype=dtype, device=device),), {}, f"{shape}")


def matrix_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    shapes = [((3,), (5,), 7), ((2, 4), (2, 3), 20)]
    if not small:
        shapes += [((1,), (1,), 1), ((7,), (1,), 16), ((1,), (70,), 31), ((13,), (65,), 384), ((100,), (130,), 33)]
        shapes += [((8,), (300,), 1030), ((2, 1, 9), (3, 10), 24), ((200,), (64,), 515)]
    for a, b, dim in shapes:
        tensors = vectors(*a, dim, dtype=dtype, device=device), vectors(*b, dim, dtype=dtype, device=device)
        yield Call(tensors, {}, f"{a} x {b} x {dim}")


def pairwise_calls(metric: str) -> Callable[[torch.dtype, str, bool], Iterator[Call]]:
    def calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
        for shape in [(3, 9), (2, 2, 20)] if small else [(1, 1), (5, 8), (2, 3, 17), (9, 33), (4, 384)]:
            tensors = vectors(*shape, dtype=dtype, device=device), vectors(*shape, dtype=dtype, device=device)
            yield Call(tensors, {"metric": metric}, f"{shape}")

    return calls


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "all directions": {"directions": ALL_DIRECTIONS, "scale": 1.5},
    "dot": {"similarity": "dot", "scale": 0.5, "directions": ("query_to_doc", "doc_to_doc")},
    "in-batch hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 1.0},
    "own hardness": {"hardness_mode": "hard_negatives", "hardness_strength": 0.5, "directions": ALL_DIRECTIONS},
    "all hardness": {"hardness_mode": "all_negatives", "hardness_strength": 0.75, "reduction": "none"},
    "none": {"reduction": "none", "directions": ("query_to_doc", "query_to_query")},
    "ids": {"directions": ALL_DIRECTIONS, "ids": True, "reduction": "none"},
    "guide": {"directions": ("query_to_doc", "query_to_query", "doc_to_doc"), "guide": True, "margin": 0.05},
    "relative guide": {"directions": ALL_DIRECTIONS, "guide": True, "margin": -0.1, "margin_strategy": "relative"},
    "prefixes": {"dims": True, "directions": ("query_to_doc", "query_to_query")},
    "prefixes, none": {"dims": True, "reduction": "none", "similarity": "dot"},
}


def contrastive_call(
    options: dict[str, Any], sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tensors and options for `rows` of `everyone` queries with `negatives` negatives each."""
    rows, everyone, negatives, dim = sizes
    options = {"scale": 1.0} | options
    count = everyone * (1 + negatives) + (negatives > 1)  # with a document that is nobody's
    tensors = vectors(rows, dim, dtype=dtype, device=device), vectors(count, dim, dtype=dtype, device=device)
    if rows < everyone:
        tensors += (vectors(everyone, dim, dtype=dtype, device=device),)
        options["offset"] = int(torch.randint(0, everyone - rows + 1, ()))
    if options.pop("ids", False):
        options["query_ids"] = torch.randint(-3, everyone // 2 + 2, (everyone,), device=device)
        options["document_ids"] = torch.randint(2**40, 2**40 + count // 2 + 2, (count,), device=device)
    if options.pop("guide", False):
        options["guide"] = tuple(torch.randn(len(x), 5, device=device) for x in tensors)
    if options.pop("dims", False):
        options["dims"] = (dim, dim - 1, max(4, dim // 2))
        options["dim_weights"] = (1.0, 0.5, 0.25)
    return tensors, options


def contrastive_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    sizes = [(3, 3, 0, 8), (4, 6, 2, 5)] if small else [(7, 7, 0, 33), (6, 9, 2, 8), (5, 70, 1, 17), (40, 40, 0, 65)]
    turns = itertools.cycle(sizes[::-1] if torch.rand(()) < 0.5 else sizes)
    for name, options in CONTRASTIVE.items():
        if dtype == torch.float64 and "hardness_mode" in options:
            continue  # its term has no gradient by definition, so the gradient is not the derivative
        for size in (next(turns), next(turns)):
            tensors, complete = contrastive_call(options, size, dtype, device)
            # A block of rows less than the batch, sometimes.
            if torch.rand(()) < 0.5:
                complete["workspace"] = 3 * 16 * (len(tensors[1]) + size[1])
            yield Call(tensors, complete, f"{name} {size}")


def contrastive(queries: Tensor, documents: Tensor, all_queries: Tensor | None = None, **options: Any) -> Tensor:
    return F.contrastive_loss(queries, documents, all_queries=all_queries, **options)


PAIRWISE = ("pairwise_similarity", "pairwise_similarity_backward")
CASES = [
    Case("pool", F.pool, pool_calls, ("pool", "pool_backward")),
    Case("l2_normalize", F.l2_normalize, normalize_calls, ("l2_normalize", "l2_normalize_backward")),
    Case("dot_similarity", F.dot_similarity, matrix_calls, ("dot_similarity",)),
    Case("cosine_similarity", F.cosine_similarity, matrix_calls, ("cosine_similarity", "dot_similarity")),
    *(
        Case(f"pairwise_{metric}", F.pairwise_similarity, pairwise_calls(metric), PAIRWISE)
        for metric in ("cosine", "dot", "euclidean", "manhattan")
    ),
    Case("contrastive_loss", contrastive, contrastive_calls, ("contrastive_loss",)),
]
