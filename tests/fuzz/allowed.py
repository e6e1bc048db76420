"""Differences from stock that docs/reasons.md documents, each as narrow as it can be: a name, the reason, a test.

The test gets what was drawn and the text of one difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Allowance(NamedTuple):
    reason: str
    applies: Callable[[dict[str, Any], str], bool]


# Warnings that say nothing about a result: PyTorch mentions an algorithm, or gives a warning once in a process.
_HARMLESS = re.compile(
    "^warning: .*(deterministic|TypedStorage|Sparse CSR tensor support|Sparse invariant checks"
    "|use_cache=True` is incompatible with gradient checkpointing|None of the inputs have requires_grad=True"
    "|do not obey the gradient layout contract)"
)

ALLOWED = {
    "harmless warning": Allowance(
        "A warning about the algorithm that PyTorch itself would have run.",
        lambda drawn, text: bool(_HARMLESS.match(text)),
    ),
    "a backward hook without a gradient": Allowance(
        "PyTorch's remark that such a hook wants tensors; it is not called in either case.",
        lambda drawn, text: (
            "hooks" in drawn and text.startswith("warning: only stock: UserWarning: For backward hooks to be called")
        ),
    ),
    "told of hidden rows": Allowance(
        "Whoever calls an accelerated base model with padding is told once that its padded rows are 0.",
        lambda drawn, text: text.startswith("warning: only ours: SentfastWarning: sentfast: last_hidden_state is 0"),
    ),
    "told of a changed model": Allowance(
        "Somebody has changed what the model computes, so its own code runs, and a warning says so.",
        lambda drawn, text: (
            any(name.endswith("edit") for name in drawn)
            and re.match(
                r"warning: only ours: SentfastWarning: sentfast: \w+ runs its own code: "
                r"(largest|the original code does not run: )",
                text,
            )
            is not None
        ),
    ),
    "held by a graph": Allowance(
        "PyTorch does not exchange a tensor that a graph holds, and stock's holds more of them.",
        lambda drawn, text: re.search("edit: gave NoneType None; stock: raised .*Expected use_count", text) is not None,
    ),
    "told of a foreign patch": Allowance(
        "Switched off or on again while others have patched the same place, sentfast leaves it alone and says so.",
        lambda drawn, text: (
            bool({"off", "on"} & {drawn[name] for name in drawn if name.endswith("step")})
            and re.search("SentfastWarning: .* left as it is", text) is not None
        ),
    ),
    "dropout of its own": Allowance(
        "Our masks are a function of one random number for each forward pass; stock draws one for each element.",
        lambda drawn, text: (
            bool(drawn.get("dropout") and drawn.get("training mode"))
            and text.startswith("generator: the state of torch")
        ),
    ),
    "more second derivatives": Allowance(
        "PyTorch's fused attention has no second derivative; ours has one.",
        lambda drawn, text: (
            "create_graph" in drawn
            and text.startswith("gradients['second']: gave")
            and "_scaled_dot_product_flash_attention_for_cpu_backward is not implemented" in text
        ),
    ),
    "gradients of a row of zeros": Allowance(
        "The norm of a zero vector has no second derivative: PyTorch's is NaN, ours 0. Tokens that are not in use get a"
        " gradient of 0 too, where PyTorch multiplies NaN by 0.",
        lambda drawn, text: (
            ("create_graph" in drawn or drawn.get("mask") == "empty row" or "exclude prompt" in drawn)
            and re.match(r"gradients?\[\d\]: .* differ in inf or NaN; at .* -?0\.0, stock has nan$", text) is not None
        ),
    ),
    "distance beyond the range": Allowance(
        "A search computes in float64, where the originals' sums of squares overflow.",
        lambda drawn, text: (
            "large" in (drawn.get("spoilt queries"), drawn.get("spoilt corpus"))
            and re.search(r"differ in inf or NaN; at .*stock has (-?inf|nan)$", text) is not None
        ),
    ),
    "zero in float16": Allowance(
        "In float16 PyTorch's epsilons are 0, so it gives NaN for the unit vector of zeros and the mean of nothing.",
        lambda drawn, text: (
            drawn.get("dtype") is torch.float16
            and re.search(r"differ in inf or NaN; at .*, stock has nan$", text) is not None
            and (
                drawn.get("mask") == "empty row"
                or "exclude prompt" in drawn  # may leave no token
                or text.startswith("step")  # a loss of such embeddings
                or re.search(r" -?(0\.0|inf), stock has nan$", text) is not None
            )
        ),
    ),
    "the last of the largest": Allowance(
        "In half precision several numbers are as large as the last that stays of the largest.",
        lambda drawn, text: (
            drawn.get("dtype") in (torch.float16, torch.bfloat16)
            and ("max_active_dims" in drawn or "sparse autoencoder" in drawn)
            and text.startswith("embeddings: error")
        ),
    ),
    "weights in a mask": Allowance(
        "An attention mask counts as 0 or not 0. sentence-transformers multiplies by it.",
        lambda drawn, text: (
            drawn.get("mask") == "twos" and re.match(r"(features|gradient|output).*: error", text) is not None
        ),
    ),
}


def ignore(pattern: str) -> None:
    """Lets a person look at what is left without the differences that match."""
    if pattern:
        ALLOWED["ignored"] = Allowance("Asked for.", lambda drawn, text: re.search(pattern, text) is not None)


def sort(drawn: dict[str, Any], differences: list[str]) -> tuple[list[str], list[str]]:
    """The names of the exceptions that applied, and the differences that none of them covers."""
    names, remaining = [], []
    for text in differences:
        found = next((name for name, each in ALLOWED.items() if each.applies(drawn, text)), None)
        if found is None:
            remaining.append(text)
        else:
            names.append(found)
    return names, remaining
