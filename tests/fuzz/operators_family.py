"""The operators of sentfast.functional on every tier of this CPU against their definition; odd shapes and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compare import Sized
from draw import Draw, Raised
from torch import Tensor

import sentfast
import sentfast.functional as F
from sentfast import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def case(draw: Draw) -> dict[str, Any]:
    """Here "stock" is the definition in PyTorch, in the dtype of the input, and the exact run is it in float64."""
    name = draw.one_of("operator", tuple(OPERATORS))
    isa = draw.one_of("instruction set", native.supported_cpu_isas()) if native.cpu_loaded() else None
    dtype = draw.one_of("dtype", DTYPES, p=0.4)
    function, tensors = OPERATORS[name](draw, dtype)
    for x in tensors:
        x.requires_grad_(draw.chance("gradient", 0.7))
    before = [x.detach().clone() for x in tensors]
    if draw.ours and isa is not None:
        previous = native.cpu_isa()
        native.cpu_isa(isa)
        draw.finally_(lambda: native.cpu_isa(previous))
        return results(draw, function, tensors, before)
    with sentfast.use_backend("reference"):
        return results(draw, function, tensors, before)


def results(draw: Draw, function: Callable, tensors: list[Tensor], before: list[Tensor]) -> dict[str, Any]:
    size = max([x.detach().abs().max().item() for x in tensors if x.numel()], default=0.0)
    out = draw.attempt(function, *tensors)
    if isinstance(out, Raised):
        return {"result": out}
    seen: dict[str, Any] = {"result": Sized(out.detach(), size)}
    leaves = [x for x in tensors if x.requires_grad]
    if out.requires_grad:
        weights = draw.normal("weights of the loss", *out.shape).to(out.dtype)
        grads = draw.attempt(torch.autograd.grad, (out * weights).sum(), leaves, allow_unused=True)
        if isinstance(grads, Raised):
            seen["gradients"] = grads
        else:
            largest = max([g.abs().max().item() for g in grads if g is not None and g.numel()], default=0.0)
            # Through the norm of one column nothing comes back: a difference of equal numbers, divided by that norm.
            largest = max(size, largest) * (1e6 if draw.values.get("width") == 1 else 1.0)
            seen["gradients"] = [g if g is None else Sized(g, largest) for g in grads]
    seen["unchanged"] = [torch.equal(x.detach(), y) for x, y in zip(tensors, before, strict=True)]
    return seen


def strided(draw: Draw, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers in a drawn layout."""
    x = draw.normal(name, *shape, dtype=dtype)
    layout = draw.one_of(f"layout of {name}", ("plain", "columns apart", "rows apart", "transposed", "offset"), p=0.4)
    if layout == "columns apart":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "rows apart" and x.ndim > 1:
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    elif layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "offset":
        x = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(shape)
    return x.detach()


def size(draw: Draw, name: str, largest: int = 150) -> int:
    return draw.one_of(name, (3, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, largest))


def lengths(draw: Draw, longest: int = 140) -> Tensor:
    """cu_seqlens of some sequences, a few of them empty."""
    count = draw.one_of("sequences", (1, 2, 3, 6, 20))
    top = min(longest, 400 // count)
    made = [draw.stream("length").choice((0, 1, 2, 8, 15, 16, 17, 33, 64, 65, 100, top)) for _ in range(count)]
    return torch.tensor([0, *(min(length, top) for length in made)]).cumsum(0).int()


def pool(draw: Draw, dtype: torch.dtype) -> Any:
    modes = tuple(draw.some_of("modes", MODES, 0.4)) or draw.one_of("mode", MODES)
    options: dict[str, Any] = {"mode": modes, "normalize": draw.chance("normalize")}
    options["prompt_length"] = draw.one_of("prompt length", (0, 1, 3, 50), p=0.3)
    width = draw.one_of("width", (8, 1, 5, 16, 17, 33, 100, 384, 1030))
    if draw.chance("packed"):
        cu = lengths(draw)
        return lambda x: F.pool(x, cu_seqlens=cu, **options), [strided(draw, "x", dtype, int(cu[-1]), width)]
    rows, columns = size(draw, "rows", 20), draw.integer("columns", 1, 40)
    mask = draw.integers("mask", 0, 1, rows, columns).to(
        draw.one_of("mask dtype", (torch.long, torch.bool, torch.int8))
    )
    given = None if draw.chance("no mask", 0.2) else mask
    return lambda x: F.pool(x, given, **options), [strided(draw, "x", dtype, rows, columns, width)]


def attention(draw: Draw, dtype: torch.dtype) -> Any:
    cu = lengths(draw)
    total, longest = int(cu[-1]), int(cu.diff().max())
    heads = draw.integer("heads", 1, 3)
    head = draw.one_of("head size", (*range(8, 136, 8), 160, 200, 256, 320, 1, 5, 20, 36))
    options: dict[str, Any] = {"causal": draw.chance("causal", 0.3)}
    if draw.chance("window", 0.4):
        options["window_size"] = (draw.integer("before", -1, 70), draw.integer("behind", -1, 70))
    if draw.chance("scale", 0.3):
        options["softmax_scale"] = draw.one_of("softmax_scale", (0.3, 0.0, 2.0))
    if draw.chance("dropout", 0.2):
        options |= {"dropout_p": 0.3, "seed": draw.integer("seed", 0, 2**62), "stream": 3}
    bias = [draw.normal("bias", heads, 2 * longest + 1, dtype=dtype)] if draw.chance("bias", 0.3) else []
    if draw.chance("qkvpacked"):
        tensors = [strided(draw, "qkv", dtype, total, 3, heads, head)]
        return lambda x, b=None: F.varlen_attention_qkvpacked(x, cu, bias=b, **options), tensors + bias
    tensors = [strided(draw, name, dtype, total, heads, head) for name in "qkv"]
    return lambda q, k, v, b=None: F.varlen_attention(q, k, v, cu, bias=b, **options), tensors + bias


def norm(draw: Draw, dtype: torch.dtype) -> Any:
    rows, width = size(draw, "rows"), draw.one_of("width", (16, 1, 5, 8, 33, 64, 384, 1100))
    residual, bias = draw.chance("residual"), draw.chance("bias")
    tensors = [strided(draw, name, dtype, rows, width) for name in ("x", "y")[: 1 + residual]]
    tensors += [draw.normal(name, width, dtype=dtype) for name in ("weight", "shift")[: 1 + bias]]
    p = draw.one_of("dropout", (0.0, 0.2), p=0.3)
    options = {"dropout_p": p, "seed": draw.integer("seed", 0, 2**62), "eps": draw.one_of("eps", (1e-5, 1e-12, 0.1))}

    def call(x: Tensor, *others: Tensor) -> Tensor:
        return F.dropout_add_layer_norm(x, others[0] if residual else None, *others[residual:], **options)

    return call, tensors


def activation(draw: Draw, dtype: torch.dtype) -> Any:
    rows, width = size(draw, "rows"), size(draw, "width", 300)
    name = draw.one_of("activation", ("gelu", "gelu_tanh", "relu", "silu"))
    tensors = [strided(draw, "x", dtype, rows, width)]
    tensors += [draw.normal("bias", width, dtype=dtype)] if draw.chance("with bias") else []
    return lambda x, b=None: F.bias_activation(x, b, activation=name), tensors


def linear(draw: Draw, dtype: torch.dtype) -> Any:
    rows, inner, out = size(draw, "rows"), size(draw, "inner", 400), size(draw, "out", 300)
    tensors = [strided(draw, "x", dtype, rows, inner), strided(draw, "weight", dtype, out, inner)]
    tensors += [draw.normal("bias", out, dtype=dtype)] if draw.chance("with bias") else []
    if draw.chance("with activation"):
        name = draw.one_of("activation", ("gelu", "gelu_tanh", "relu", "silu"))
        return lambda *x: F.linear_activation(*x, activation=name), tensors
    return lambda *x: F.linear(*x), tensors


def matrix(draw: Draw, dtype: torch.dtype) -> Any:
    width = draw.one_of("width", (16, 1, 7, 20, 33, 64, 384, 1030))
    function = F.cosine_similarity if draw.chance("cosine") else F.dot_similarity
    return function, [
        strided(draw, "a", dtype, size(draw, "rows"), width),
        strided(draw, "b", dtype, size(draw, "columns"), width),
    ]


def pairwise(draw: Draw, dtype: torch.dtype) -> Any:
    metric = draw.one_of("metric", ("cosine", "dot", "euclidean", "manhattan"))
    shape = size(draw, "rows"), draw.one_of("width", (16, 1, 7, 20, 33, 64, 384, 1030))
    return lambda a, b: F.pairwise_similarity(a, b, metric), [strided(draw, name, dtype, *shape) for name in "ab"]


def normalize(draw: Draw, dtype: torch.dtype) -> Any:
    return F.l2_normalize, [
        strided(draw, "x", dtype, size(draw, "rows"), draw.one_of("width", (16, 1, 7, 33, 384, 1500)))
    ]


def contrastive(draw: Draw, dtype: torch.dtype) -> Any:
    queries, negatives = draw.one_of("queries", (4, 1, 2, 7, 16, 33, 70)), draw.integer("negatives", 0, 2)
    width = draw.one_of("width", (16, 1, 7, 33, 64))
    options: dict[str, Any] = {"scale": draw.one_of("scale", (1.0, 20.0, 0.1))}
    options["similarity"] = draw.one_of("similarity", ("cosine", "dot"), p=0.3)
    directions = draw.some_of("directions", DIRECTIONS[1:], 0.3)
    options["directions"] = ("query_to_doc", *directions)
    options["partition_mode"] = draw.one_of("partition", ("joint", "per_direction"))
    options["reduction"] = draw.one_of("reduction", ("mean", "none"), p=0.3)
    if draw.chance("hardness", 0.3):
        options["hardness_mode"] = draw.one_of(
            "hardness_mode", ("in_batch_negatives", "hard_negatives", "all_negatives")
        )
        options["hardness_strength"] = 0.5
    documents = queries * (1 + negatives)
    tensors = [strided(draw, "q", dtype, queries, width), strided(draw, "d", dtype, documents, width)]
    return lambda q, d: F.contrastive_loss(q, d, **options), tensors


OPERATORS: dict[str, Callable] = {
    "pool": pool,
    "attention": attention,
    "norm": norm,
    "activation": activation,
    "linear": linear,
    "matrix": matrix,
    "pairwise": pairwise,
    "normalize": normalize,
    "contrastive": contrastive,
}
