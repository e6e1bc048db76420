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
HALF_DTYPES = (torch.bfloat16, torch.float16)


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
    cancels: bool = False  # the result is the difference of numbers as large as the inputs
    gpu_backends: tuple[str, ...] = ("triton", "cuda")

    def run(self, call: Call) -> Tensor:
        return self.function(*call.tensors, **call.options)

    def size(self, call: Call) -> float:
        """What the result was made of, for the tolerance rule."""
        return max(x.abs().max().item() for x in call.tensors) if self.cancels else 0.0


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
    sizes = [(2, 3, 5), (3, 6, 17)]
    if not small:  # the last: lines of the mask, and more sentences than are looked at ahead
        sizes = [(1, 1, 1), (3, 5, 8), (2, 7, 15), (4, 9, 33), (3, 21, 100), (25, 140, 7)]
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


def attention_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    """Lengths around the panels of 64 keys, and empty; sizes and options take turns."""
    lengths = [(3, 0, 5), (9,)] if small else [(1,), (5, 0, 17, 33), (64, 7), (130, 65), (3, 3, 3, 3)]
    sizes = itertools.cycle(
        [(2, 5), (1, 16)] if small else [(1, 8), (3, 32), (2, 64), (1, 20), (2, 5), (1, 32), (2, 16)]
    )
    options: list[dict[str, Any]] = [
        {},
        {"dropout_p": 0.3},
        {"causal": True, "softmax_scale": 0.3},
        {"window_size": (4, 2), "dropout_p": 0.1},
        {"window_size": (-1, 70)},
    ]
    options = [options[i] for i in torch.randperm(len(options))]
    for turn, (kinds, with_bias) in enumerate(itertools.product(lengths, (False, True))):
        (heads, dim), option = next(sizes), options[turn % len(options)]
        total, longest = sum(kinds), max(kinds)
        tensors = [vectors(total, heads, dim, dtype=dtype, device=device) for _ in range(3)]
        given = {"cu_seqlens": torch.tensor([0, *kinds]).cumsum(0).int().to(device), **option}
        given |= {"seed": int(torch.randint(2**62, ())), "stream": 3} if "dropout_p" in option else {}
        if with_bias:
            tensors.append(vectors(heads, 2 * (longest + turn % 3) - 1, dtype=dtype, device=device))
        yield Call(tuple(tensors), given, f"{kinds} x {heads} x {dim} bias {with_bias} {option}")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.varlen_attention(q, k, v, bias=bias, **options)


def packed_attention(qkv: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.varlen_attention_qkvpacked(qkv, bias=bias, **options)


def packed_attention_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    for call in list(attention_calls(dtype, device, small))[-3:]:
        yield Call((torch.stack(call.tensors[:3], dim=1), *call.tensors[3:]), call.options, call.label)


def short_attention_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    """What csrc/cuda has a kernel for, around its strips of 16 and blocks of 64 and 128; strides take turns."""
    lengths = [(3, 0, 5), (17,)] if small else [(0, 1, 15, 16, 17), (63, 64, 65), (128, 129), (511,), (2, 512)]
    turns = itertools.cycle(itertools.product(("apart", "packed", "spaced"), ((2, 32), (1, 64))))
    for (kinds, bias), (layout, (heads, dim)) in zip(itertools.product(lengths, (False, True)), turns, strict=False):
        shape = sum(kinds), 3, heads, dim + (layout == "spaced")  # whose rows start off the alignment of a vector
        parts = vectors(*shape, dtype=dtype, device=device)[..., :dim].unbind(1)
        tensors = [x.contiguous() if layout == "apart" else x for x in parts]
        if bias:
            tensors.append(vectors(heads, 2 * max(kinds) + 1, dtype=dtype, device=device))
        options = {"cu_seqlens": torch.tensor([0, *kinds]).cumsum(0).int().to(device), "softmax_scale": 0.2}
        yield Call(tuple(tensors), options, f"{kinds} x {heads} x {dim} bias {bias} {layout}")


def norm_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    """With and without residual, bias and dropout; rows around the blocks of 64 whose sums are made by themselves."""
    shapes = [(2, 3, 9), (5, 16)] if small else [(9,), (5, 15), (2, 3, 17), (65, 8), (130, 64), (3, 384), (2, 1100)]
    for shape, residual, bias in itertools.product(shapes, (False, True), (False, True)):
        tensors = [vectors(*shape, dtype=dtype, device=device) for _ in range(1 + residual)]
        tensors += [vectors(shape[-1], dtype=dtype, device=device) for _ in range(1 + bias)]
        p = 0.2 * float(torch.rand(()) < 0.5)
        options = {"residual": residual, "dropout_p": p, "seed": int(torch.randint(2**62, ())), "eps": 1e-5}
        yield Call(tuple(tensors), options, f"{shape} residual {residual} bias {bias} dropout {p}")


def norm(x: Tensor, *others: Tensor, residual: bool, **options: Any) -> Tensor:
    added, weights = (others[0], others[1:]) if residual else (None, others)
    return F.dropout_add_layer_norm(x, added, *weights, **options)


def dropout_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    for shape in [(3, 5), (2, 2, 70)] if small else [(1,), (7, 63), (2, 3, 65), (5, 384), (3, 1000)]:
        for p in (0.1, 0.75, 1.0):
            options = {"p": p, "seed": int(torch.randint(2**62, ())), "stream": int(torch.randint(100, ()))}
            yield Call((vectors(*shape, dtype=dtype, device=device),), options, f"{shape} p {p}")


def activation_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    shapes = [(2, 3, 9), (5, 16)] if small else [(1,), (5, 15), (2, 3, 17), (130, 8), (3, 384)]
    for shape, name, bias in itertools.product(shapes, ("gelu", "gelu_tanh", "relu", "silu"), (False, True)):
        tensors = [3 * vectors(*shape, dtype=dtype, device=device)]
        tensors += [vectors(shape[-1], dtype=dtype, device=device)] if bias else []
        yield Call(tuple(tensors), {"activation": name}, f"{shape} {name} bias {bias}")


def linear_activation_calls(dtype: torch.dtype, device: str, small: bool) -> Iterator[Call]:
    """Around the tiles of 64 and 128 and the steps of 32 and 64; activations and biases take turns."""
    sizes = [(3, 70, 5), (67, 2, 3), (2, 5, 66)]
    if not small:
        sizes += [(1, 1, 1), (130, 65, 129), (70, 384, 300), (600, 9, 70)]  # and more rows than a group of tiles
    # Five names and two kinds of bias: each name meets both. The last are not GELU, NaN or 0 at -inf.
    names = itertools.cycle(("silu", "gelu", "gelu", "gelu_tanh", "relu"))
    for ((rows, columns, features), bias), name in zip(itertools.product(sizes, (False, True)), names, strict=False):
        tensors = [vectors(rows, columns, dtype=dtype, device=device)]
        tensors += [vectors(features, columns, dtype=dtype, device=device)]
        tensors += [vectors(features, dtype=dtype, device=device)] if bias else []
        yield Call(tuple(tensors), {"activation": name}, f"{rows}x{columns}x{features} {name} bias {bias}")


ATTENTION = ("varlen_attention", "varlen_attention_backward")
NORM = ("dropout_add_layer_norm", "dropout_add_layer_norm_backward")
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


ACTIVATION = ("bias_activation", "bias_activation_backward")
LINEAR_ACTIVATION = ("linear_activation", "bias_activation_backward")
PAIRWISE = ("pairwise_similarity", "pairwise_similarity_backward")
CASES = [
    Case("pool", F.pool, pool_calls, ("pool", "pool_backward")),
    Case("varlen_attention", attention, attention_calls, ATTENTION, gpu_backends=("triton",)),
    Case("varlen_attention_qkvpacked", packed_attention, packed_attention_calls, ATTENTION, gpu_backends=("triton",)),
    Case("dropout_add_layer_norm", norm, norm_calls, NORM, gpu_backends=("triton",)),
    Case("bias_activation", F.bias_activation, activation_calls, ACTIVATION, cancels=True, gpu_backends=("triton",)),
    Case(
        "linear_activation",
        F.linear_activation,
        linear_activation_calls,
        LINEAR_ACTIVATION,
        cancels=True,
        gpu_backends=("triton",),
    ),
    Case("dropout", F.dropout, dropout_calls, ("dropout",), gpu_backends=("triton",)),
    Case("l2_normalize", F.l2_normalize, normalize_calls, ("l2_normalize", "l2_normalize_backward")),
    Case("dot_similarity", F.dot_similarity, matrix_calls, ("dot_similarity",)),
    Case("cosine_similarity", F.cosine_similarity, matrix_calls, ("cosine_similarity", "dot_similarity")),
    *(
        Case(f"pairwise_{metric}", F.pairwise_similarity, pairwise_calls(metric), PAIRWISE)
        for metric in ("cosine", "dot", "euclidean", "manhattan")
    ),
    Case("contrastive_loss", contrastive, contrastive_calls, ("contrastive_loss",), gpu_backends=("triton",)),
]
# Kernels of half precision that give values alone: their gradients are another backend's.
VALUES = [Case("short_attention", attention, short_attention_calls, ("varlen_attention",))]
