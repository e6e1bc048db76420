"""`Pooling` and `Normalize` called with features made by hand: odd masks, strides, dtypes and extra keys."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import torch
from compare import Sized
from draw import Draw, Raised
from pipelines import POOLING_MODES
from sentence_transformers.sentence_transformer import modules as st_modules
from torch import Tensor

MASKS = ("right", "left", "holes", "empty row", "none", "missing", "bool", "float", "int32", "uint8", "twos", "narrow")
LAYOUTS = ("plain", "transposed", "every second", "expanded", "offset")


def case(draw: Draw) -> dict[str, Any]:
    rows, columns = draw.one_of("rows", (3, 1, 2, 9)), draw.one_of("columns", (5, 1, 2, 17, 60))
    width = draw.one_of("width", (8, 1, 5, 17, 33, 130, 384))
    dtype = draw.one_of("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), p=0.3)
    x = tokens(draw, rows, columns, width, dtype)
    modes: Any = tuple(draw.some_of("modes", POOLING_MODES, 0.4)) or draw.one_of("mode", POOLING_MODES)
    pooling = st_modules.Pooling(width, pooling_mode=modes, include_prompt=not draw.chance("exclude prompt", 0.3))
    features: Any = {"token_embeddings": x}
    given = mask(draw, rows, columns)
    if given != "missing":
        features["attention_mask"] = given
    if draw.chance("prompt_length", 0.3):
        length = draw.one_of("prompt length", (2, 0, 1, 100))
        tensors = (length, torch.tensor(length), torch.full((rows,), length))
        features["prompt_length"] = draw.one_of("prompt as", tensors)
    if draw.chance("flattened", 0.15):
        flatten(draw, features, rows, columns)
    extra(draw, features, rows)
    kind = draw.one_of("mapping", (dict, OrderedDict, UserDict), p=0.15)
    features = kind(features)
    if draw.chance("gradient", 0.6):
        x = features["token_embeddings"] = features["token_embeddings"].requires_grad_()
    before = features["token_embeddings"].detach().clone()
    out = draw.attempt(pooling, features)
    if draw.chance("normalize") and not isinstance(out, Raised):
        out = draw.attempt(st_modules.Normalize(), out)
    seen: dict[str, Any] = {"raised": out if isinstance(out, Raised) else None, "same": out is features}
    seen["features"] = {name: value for name, value in features.items() if name != "token_embeddings"}
    seen["unchanged"] = torch.equal(before.nan_to_num(), features["token_embeddings"].detach().nan_to_num())
    if not isinstance(out, Raised):
        seen["gradient"] = gradient(draw, out["sentence_embedding"], x, given)
    return seen


def gradient(draw: Draw, embedding: Tensor, x: Tensor, mask: Any) -> Any:
    if not embedding.requires_grad:
        return "none"
    if draw.chance("in place", 0.15):
        changed = draw.attempt(lambda: embedding.mul_(3))
        if isinstance(changed, Raised):
            return changed
    twice = draw.chance("create_graph", 0.2)
    weights = draw.normal("weights of the loss", *embedding.shape).to(embedding.dtype)
    loss = (embedding * weights).sum()
    first = draw.attempt(torch.autograd.grad, loss, x, create_graph=twice)
    if isinstance(first, Raised):
        return first
    found = [first[0]]
    if twice and first[0].requires_grad:
        second = draw.attempt(torch.autograd.grad, first[0].square().sum(), x)
        if isinstance(second, Raised):
            return second
        found.append(second[0])
    # Normalised, it is a difference of numbers that may cancel altogether.
    return [
        Sized(without_hidden(each.detach(), embedding, mask), max(largest(each), largest(weights))) for each in found
    ]


def without_hidden(gradient: Tensor, embedding: Tensor, mask: Any) -> Tensor:
    """Of an embedding that is not finite, the tokens that are not in use have NaN times 0 in stock, and 0 here.

    In float16 it is zeros here, where stock divides 0 by 0.
    """
    if not isinstance(mask, Tensor) or mask.shape != gradient.shape[:2] or len(embedding) != len(mask):
        return gradient
    finite = embedding.detach().isfinite() & (embedding.detach() != 0).any(dim=1, keepdim=True)
    hidden = (mask == 0) & ~finite.all(dim=1, keepdim=True)
    return gradient.masked_fill(hidden[:, :, None] & gradient.isnan(), 0)


def largest(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def tokens(draw: Draw, rows: int, columns: int, width: int, dtype: torch.dtype) -> Tensor:
    x = draw.normal("x", rows, columns, width, dtype=dtype) * draw.one_of("magnitude", (1.0, 100.0, 1e-3), p=0.2)
    layout = draw.one_of("layout", LAYOUTS, p=0.3)
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand(rows, -1, -1)
    if layout == "offset":
        return torch.cat([x[:, :1], x], dim=1)[:, 1:]
    return x


def mask(draw: Draw, rows: int, columns: int) -> Any:
    kind = draw.one_of("mask", MASKS, p=0.7)
    lengths = draw.integers("lengths", 1, columns, rows, 1)
    right = (torch.arange(columns) < lengths).long()
    if kind in ("none", "missing"):
        return None if kind == "none" else "missing"
    if kind == "empty row":
        right[draw.integer("row", 0, rows - 1)] = 0
    made = {
        "left": right.flip(1),
        "holes": draw.integers("holes", 0, 1, rows, columns),
        "bool": right.bool(),
        "float": right.float(),
        "int32": right.int(),
        "uint8": right.to(torch.uint8),
        "twos": 2 * right,
        "narrow": right[:, :-1],
    }
    return made.get(kind, right)


def flatten(draw: Draw, features: Any, rows: int, columns: int) -> None:
    """As flash-attention leaves them: all tokens in one row, with the ends of the sequences."""
    features["token_embeddings"] = features["token_embeddings"].reshape(1, rows * columns, -1)
    features.pop("attention_mask", None)
    features.pop("prompt_length", None)
    ends = torch.arange(rows + 1, dtype=torch.int32) * columns
    features["cu_seq_lens_q"] = ends.long() if draw.chance("int64 ends", 0.1) else ends


def extra(draw: Draw, features: Any, rows: int) -> None:
    for name in draw.some_of("extra features", ("token_weights_sum", "cls_token_embeddings", "own"), 0.05):
        width = features["token_embeddings"].shape[-1]
        dtype = features["token_embeddings"].dtype
        values = {"token_weights_sum": torch.full((rows,), 3.0), "own": [1, 2]}
        features[name] = values.get(name, draw.normal(name, rows, width).to(dtype))
