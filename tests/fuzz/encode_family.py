"""`encode`, `encode_query` and `encode_document` with all their arguments, drawn, over drawn pipelines."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pipelines
import torch
from compare import Steps, Tokens
from draw import Draw, Raised
from torch import Tensor

FORMS = (
    "list",
    "string",
    "tuple",
    "array",
    "pairs",
    "dicts",
    "numpy strings",
    "empty list",
    "generator",
    "mixed",
    "odd",
)


def case(draw: Draw) -> dict[str, Any]:
    model = pipelines.sentence_transformer(draw)
    model.train(draw.chance("training mode", 0.1))
    seen: dict[str, Any] = {}
    for turn in range(draw.integer("calls", 1, 2)):
        method = draw.one_of("method", ("encode", "encode_query", "encode_document"), p=0.3)
        inputs, options = inputs_of(draw), options_of(draw)
        out = draw.attempt(getattr(model, method), inputs(), **options)
        seen[f"{method} {turn}"] = visible(out, options)
        seen[f"use {turn}"] = used(draw, out)
        seen[f"similarity {turn}"] = similarities(draw, model, out)
    seen["modes"] = [module.training for module in model.modules()]
    return seen


def inputs_of(draw: Draw) -> Any:
    """A function that makes the inputs, since a generator can be read once."""
    form = draw.one_of("form", FORMS, p=0.5)
    made = pipelines.texts(draw, "texts", draw.one_of("count", (3, 1, 2, 9, 40, 70)))
    if draw.chance("half a character", 0.03):
        made[-1] = "\ud83d"
    forms: dict[str, Any] = {
        "string": lambda: made[0],
        "tuple": lambda: tuple(made),
        "array": lambda: np.array(made),
        "pairs": lambda: list(zip(made, made[::-1], strict=True)),
        "dicts": lambda: [{"text": text} for text in made],
        "numpy strings": lambda: [np.str_(text) for text in made],
        "empty list": list,
        "generator": lambda: (text for text in made),
        "mixed": lambda: [*made, (made[0], made[-1])],
        "odd": lambda: [made[0], draw.stream("odd").choice([None, 3, 2.5, b"bytes", [], ["a"], {}])],
    }
    return forms.get(form, lambda: list(made))


def options_of(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {}
    choices: dict[str, tuple[Any, ...]] = {
        "batch_size": (32, 1, 2, 7, 0, -1, 2.5, np.int64(4), True),
        "convert_to_tensor": (False, True),
        "convert_to_numpy": (True, False),
        "normalize_embeddings": (False, True),
        "truncate_dim": (None, 4, 7, 1, 1000, 0, -3),
        "output_value": ("sentence_embedding", "token_embeddings", None, "attention_mask"),
        "precision": ("float32", "int8", "uint8", "binary", "ubinary", "int4", None),
        "prompt": (None, "query : ", "", "a" * 60),
        "prompt_name": (None, "query", "document", "unknown"),
        "show_progress_bar": (False, True, None),
        "device": (None, "cpu", "meta"),
        "chunk_size": (None, 3),
        "unknown": (None, 1),
    }
    for name, values in choices.items():
        rare = 0.03 if name in ("unknown", "chunk_size") else 0.2
        value = draw.one_of(name, values, rare)
        if value != values[0] or (type(value) is not type(values[0])):
            options[name] = value
    return options


def visible(out: Any, options: dict[str, Any]) -> Any:
    if isinstance(out, Raised):
        return out
    if options.get("output_value", "") is None:
        items = out if isinstance(out, list) else [out]
        return [with_mask(item) if isinstance(item, dict) else item for item in items]
    if options.get("precision") in ("int8", "uint8", "binary", "ubinary"):
        bits = "binary" in options["precision"]
        return [Steps(each, bits) for each in out] if isinstance(out, (list, tuple)) else Steps(out, bits)
    return out


def with_mask(item: dict[str, Any]) -> dict[str, Any]:
    tokens, mask = item.get("token_embeddings"), item.get("attention_mask")
    if isinstance(tokens, Tensor) and isinstance(mask, Tensor) and tokens.shape[:1] == mask.shape:
        return {**item, "token_embeddings": Tokens(tokens, mask)}
    return item


def used(draw: Draw, out: Any) -> Any:
    """What users do with a result."""
    how = draw.one_of("use", ("not at all", "view", "memoryview", "in place", "resize", "out"), p=0.3)
    with torch.inference_mode():
        if isinstance(out, Tensor) and out.is_floating_point():
            copied = {
                "view": lambda: out.view(-1).shape,
                "in place": lambda: out.mul_(2).shape,
                "resize": lambda: resized(out),
                "out": lambda: torch.add(torch.ones(3), 1, out=out).shape,
            }
            return draw.attempt(copied[how]) if how in copied else None
    if isinstance(out, np.ndarray):
        arrays = {
            "memoryview": lambda: len(memoryview(out).cast("B")),
            "view": lambda: out.view(np.uint8).shape,
            "in place": lambda: out.__imul__(2).shape,
            "resize": lambda: out.resize((1, 1), refcheck=False),
        }
        return draw.attempt(arrays[how]) if how in arrays else None
    return None


def resized(out: Tensor) -> int:
    """The memory is given away, and comes back with its numbers, as the result is compared later."""
    storage, numbers = out.untyped_storage(), out.clone()
    before = storage.nbytes()
    after = storage.resize_(0).nbytes()
    storage.resize_(before)
    out.copy_(numbers)
    return after


def similarities(draw: Draw, model: Any, out: Any) -> Any:
    if not draw.chance("similarity", 0.3) or isinstance(out, (Raised, list)) or not hasattr(out, "shape"):
        return None
    out = out.clone() if isinstance(out, Tensor) else out
    model.similarity_fn_name = draw.one_of("similarity function", ("cosine", "dot", "euclidean", "manhattan"))
    if re.search("int", str(out.dtype)):
        return draw.attempt(lambda: model.similarity(out, out).shape)
    return [draw.attempt(function, out, out) for function in (model.similarity, model.similarity_pairwise)]
