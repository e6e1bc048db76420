"""Plain transformers, accelerated by name: `model(**batch)` with drawn masks, ids, embeddings, positions and modes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import architectures
import torch
from compare import Sized, Tokens
from draw import Draw, Raised
from torch import Tensor

import sentfast

MASKS = (
    "right",
    "none",
    "ones",
    "left",
    "holes",
    "empty rows",
    "bool",
    "int32",
    "float",
    "twos",
    "4-d",
    "3-d",
    "narrow",
)
HEADS = ("Model", "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification")


def case(draw: Draw) -> dict[str, Any]:
    kind = architectures.model_type(draw)
    head = draw.one_of("head", HEADS, p=0.2) if kind not in ("t5", "gpt2") else "Model"
    model = architectures.base(draw, kind, head=head)
    dtype = architectures.cast(draw, model)
    accelerate(draw, model)
    inputs, mask = batch(draw, model, dtype)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    training = draw.chance("training mode", 0.2)
    model.train(training)
    seen: dict[str, Any] = {}
    with context(draw):
        for turn in range(draw.integer("calls", 1, 2)):
            out = draw.attempt(model, **inputs)
            seen[f"output {turn}"] = visible(out, mask, derived=head != "Model")
    seen["gradients"] = gradients(draw, model, out, mask, inputs)
    seen["inputs unchanged"] = all(torch.equal(inputs[name], value) for name, value in before.items())
    seen["training"] = model.training
    return seen


def accelerate(draw: Draw, model: Any) -> None:
    """Ours alone; a model that is not covered stays as it is."""
    if draw.ours:
        with contextlib.suppress(sentfast.UnsupportedModelError):
            sentfast.accelerate(model)


def mask_of(draw: Draw, rows: int, columns: int) -> Tensor | None:
    kind = draw.one_of("mask", MASKS, p=0.45)
    lengths = draw.integers("lengths", 1, columns, rows, 1)
    lengths[draw.integer("longest", 0, rows - 1)] = columns
    right = (torch.arange(columns) < lengths).long()
    if kind == "none":
        return None
    if kind == "empty rows":
        right[draw.integer("empty row", 0, rows - 1)] = 0
    made = {
        "ones": torch.ones(rows, columns, dtype=torch.long),
        "left": right.flip(1),
        "holes": draw.integers("holes", 0, 1, rows, columns),
        "bool": right.bool(),
        "int32": right.int(),
        "float": right.float(),
        "twos": 2 * right,
        "4-d": right[:, None, None, :].expand(rows, 1, columns, columns).bool(),
        "3-d": right[:, None, :].expand(rows, columns, columns),
        "narrow": right[:, :-1],
    }
    return made.get(kind, right)


def batch(draw: Draw, model: Any, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of a call, and the mask [B, L] of rows that count, if there is one."""
    rows, columns = draw.one_of("rows", (2, 1, 3, 7)), draw.one_of("columns", (5, 1, 2, 9, 17, 33, 64, 80), p=0.9)
    ids = draw.integers("ids", 2, architectures.VOCABULARY - 1, rows, columns)
    if draw.chance("padding inside", 0.15):
        ids[0, columns // 2] = architectures.PADDING
    if draw.chance("id out of range", 0.03):
        ids[-1, -1] = 10**6
    mask = mask_of(draw, rows, columns)
    if mask is not None and mask.shape == ids.shape:
        ids = torch.where(mask != 0, ids, architectures.PADDING)
    inputs: dict[str, Any] = {"input_ids": ids.int() if draw.chance("int32 ids", 0.1) else ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    config = model.config
    if getattr(config, "type_vocab_size", 0) and draw.chance("token types", 0.4):
        inputs["token_type_ids"] = draw.integers("token type ids", 0, config.type_vocab_size - 1, rows, columns)
    if draw.chance("position ids", 0.2):
        shape = (rows if draw.chance("positions by row") else 1, columns)
        inputs["position_ids"] = draw.integers("positions", 0, min(columns, 60), *shape)
    if draw.chance("inputs_embeds", 0.1):
        width = model.get_input_embeddings().weight.shape[1]
        del inputs["input_ids"]
        inputs["inputs_embeds"] = draw.normal("embeddings", rows, columns, width, dtype=dtype)
    for name in draw.some_of("flags", ("output_hidden_states", "output_attentions", "return_dict"), p=0.03):
        inputs[name] = name != "return_dict"
    known = mask if mask is not None and mask.ndim == 2 and mask.shape == ids.shape else None
    return inputs, known


@contextlib.contextmanager
def context(draw: Draw) -> Any:
    kind = draw.one_of("context", ("none", "no_grad", "inference_mode", "autocast"), p=0.4)
    if kind == "no_grad":
        with torch.no_grad():
            yield
    elif kind == "inference_mode":
        with torch.inference_mode():
            yield
    elif kind == "autocast":
        draw.coarse = True
        with torch.autocast("cpu", torch.bfloat16, enabled=not draw.exact):
            yield
    else:
        yield


def visible(out: Any, mask: Tensor | None, derived: bool) -> Any:
    """What a caller sees; rows of tokens that the mask hides by themselves."""
    if isinstance(out, Raised):
        return out
    if isinstance(out, Mapping):
        return {"class": type(out).__name__, **{name: tokens(value, mask, derived) for name, value in out.items()}}
    return tuple(tokens(value, mask, derived) for value in out)


def tokens(value: Any, mask: Tensor | None, derived: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(tokens(each, mask, derived) for each in value)
    if isinstance(value, Tensor) and mask is not None and value.shape[:2] == mask.shape and value.ndim == 3:
        return Tokens(value, mask, derived)
    return value


def gradients(draw: Draw, model: Any, out: Any, mask: Tensor | None, inputs: dict[str, Any]) -> Any:
    """Of all parameters, through the rows that count."""
    if isinstance(out, Raised) or not draw.chance("backward", 0.4):
        return None
    first = out[0] if not isinstance(out, Mapping) else next(iter(out.values()))
    if not isinstance(first, Tensor) or not first.requires_grad:
        return "no gradient"
    weights = draw.normal("weights of the loss", *first.shape)
    if mask is not None and first.ndim == 3 and first.shape[:2] == mask.shape:
        weights = weights * (mask != 0).unsqueeze(-1)
    error = draw.attempt((first * weights.to(first.dtype)).sum().backward)
    if isinstance(error, Raised):
        return error
    return of_parameters(model)


def of_parameters(model: Any) -> dict[str, Any]:
    """Which parameters have a gradient, and all of them in a row: their size is that of the largest."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not found:
        return {"names": []}
    flat = torch.cat([grad.detach().flatten().double() for grad in found.values()])
    size = flat.abs().max().item()
    dtype = next(iter(found.values())).dtype
    return {
        "names": list(found),
        "dtypes": [str(grad.dtype) for grad in found.values()] if dtype != torch.float64 else [],
        "values": Sized(flat.to(dtype), size),
    }
