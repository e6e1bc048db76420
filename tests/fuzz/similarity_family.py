"""The similarity functions on tensors of drawn shapes, dtypes, strides and magnitudes, forward, backward and twice."""

from __future__ import annotations

from typing import Any

import torch
from compare import Sized
from draw import Draw, Raised
from sentence_transformers import util
from torch import Tensor

FUNCTIONS = (
    *("cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"),
    *("pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim", "pairwise_manhattan_sim"),
    *("pairwise_angle_sim", "normalize_embeddings"),
)
MAGNITUDES = (1.0, 1e19, 1e-25, 1e30, 1e-38, 0.0, 3e4)
SPOILS = ("nothing", "nan", "inf", "-inf", "zero row", "equal rows")


def case(draw: Draw) -> dict[str, Any]:
    name = draw.one_of("function", FUNCTIONS)
    pairwise, dimension = name.startswith("pairwise"), draw.one_of("dimension", (8, 1, 3, 16, 33, 100, 384, 1000, 0))
    rows = draw.one_of("rows", (3, 1, 2, 9, 70, 0))
    dtype = draw.one_of("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64), p=0.4)
    a = operand(draw, "a", rows, dimension, dtype)
    columns = rows if pairwise and not draw.chance("unequal", 0.05) else draw.one_of("columns", (3, 1, 5, 64, 130, 0))
    b = operand(draw, "b", columns, dimension, dtype)
    if draw.chance("b is a", 0.1):
        b = a
    operands = [a] if name == "normalize_embeddings" else [a, b]
    leaves = [x for x in operands if isinstance(x, Tensor) and x.is_floating_point() and draw.chance("gradient")]
    for leaf in leaves:
        leaf.requires_grad_()
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in operands]
    out = draw.attempt(getattr(util, name), *operands)
    seen: dict[str, Any] = {"result": sized(out, operands)}
    if isinstance(out, Tensor) and out.requires_grad:
        seen["gradients"] = gradients(draw, out, leaves)
    seen["unchanged"] = [alike(x, y) for x, y in zip(operands, before, strict=True)]
    return seen


def alike(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and x.layout == torch.strided:
        return torch.equal(x.detach().nan_to_num(), y.nan_to_num())
    return type(x) is type(y)


def sized(out: Any, operands: list[Any]) -> Any:
    """A difference of large numbers is as exact as they are."""
    if not isinstance(out, Tensor) or out.layout != torch.strided:
        return out
    dense = [x for x in operands if isinstance(x, Tensor) and x.layout == torch.strided]
    numbers = [x.detach().double() for x in dense if x.numel()]
    largest = max((x[x.isfinite()].abs().max().item() for x in numbers if x.isfinite().any()), default=0.0)
    return Sized(out, min(largest, 1e30)) if out.dim() == 1 else out


def operand(draw: Draw, name: str, rows: int, dimension: int, dtype: torch.dtype) -> Any:
    x = torch.randn(rows, dimension, generator=draw.generator(name)) * draw.one_of(f"size of {name}", MAGNITUDES, p=0.3)
    spoil(draw, name, x)
    if draw.chance(f"other dtype of {name}", 0.04):
        dtype = torch.float32
    x = x.nan_to_num(0, 0, 0).clamp(-9, 9).to(dtype) if not dtype.is_floating_point else x.to(dtype)
    x = draw.real(x)
    return FORMS[draw.one_of(f"form of {name}", tuple(FORMS), p=0.4)](x)


FORMS: Any = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda x: torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape),
    "one vector": lambda x: x[0] if len(x) else x,
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "flipped": lambda x: x.flip(0),
    "three dimensions": lambda x: x.unsqueeze(0),
    "numpy": lambda x: x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy(),
    "list of tensors": lambda x: list(x),
    "list of arrays": lambda x: list(x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()),
    "lists": lambda x: x.tolist(),
    "scalar": lambda x: x.sum(),
    "sparse": lambda x: x.to_sparse(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False) if x.is_floating_point() else x,
}


def spoil(draw: Draw, name: str, x: Tensor) -> None:
    kind = draw.one_of(f"spoil {name}", SPOILS, p=0.2)
    if not x.numel():
        return
    row = draw.integer(f"spoiled row of {name}", 0, len(x) - 1)
    column = draw.integer(f"spoiled column of {name}", 0, x.shape[1] - 1)
    if kind == "zero row":
        x[row] = 0
    elif kind == "equal rows":
        x[row:] = x[row].clone()
    elif kind != "nothing":
        x[row, column] = float(kind)


def gradients(draw: Draw, out: Tensor, leaves: list[Tensor]) -> Any:
    if draw.chance("in place", 0.15):
        changed = draw.attempt(lambda: out.mul_(20))
        if isinstance(changed, Raised):
            return changed
    weights = draw.normal("weights of the loss", *out.shape).to(out.dtype)
    twice = draw.chance("create_graph", 0.25)
    linear = not draw.chance("square", 0.5)
    loss = (out * weights if linear else out.square() * weights).sum()
    # Of a cosine of 1 the gradient cancels, and was made of these.
    dense = [x.detach().to_dense() if x.layout != torch.strided else x.detach() for x in leaves if x.numel()]
    longest = max((x.norm(dim=-1).nan_to_num(0, 0, 0).max().item() for x in dense), default=1.0)
    least = weights.abs().max().item() / max(1.0, longest) if weights.numel() else 0.0
    first = draw.attempt(torch.autograd.grad, loss, leaves, create_graph=twice, allow_unused=True)
    if isinstance(first, Raised) or not twice:
        return first if isinstance(first, Raised) else [bound(x, least) for x in first]
    if not any(x is not None and x.requires_grad for x in first):
        return "constants"
    penalty = sum(x.square().sum() for x in first if x is not None)
    second = draw.attempt(torch.autograd.grad, penalty, leaves, allow_unused=True)
    return second if isinstance(second, Raised) else [bound(x, least) for x in (*first, *second)]


def bound(x: Tensor | None, least: float) -> Any:
    """A gradient's size is that of its largest element, and no less than `least`; its strides are nobody's business."""
    if x is None or x.layout != torch.strided:
        return x
    finite = x.detach()[x.isfinite()]
    return Sized(x.detach(), max(least, finite.abs().max().item() if finite.numel() else 0.0))
