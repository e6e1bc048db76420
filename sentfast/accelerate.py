"""Acceleration of a single model, asked for by name."""

from __future__ import annotations

from sentfast.report import REASONS, warn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(NotImplementedError):
    """The model has no part that the packed encoder covers."""


def accelerate(model: Model, precision: str = "match", padded_rows: str | None = None) -> Model:
    """Lets the transformers inside a model run packed, in ``model(**batch)`` too, and returns the same object.

    Names, parameters and saving stay as they are; a copy starts anew, without what was asked for here. The first call
    tries the encoder against the model's own code. Training runs packed as well. A call that the encoder does not take,
    such as one with `inputs_embeds`, runs the original code and is counted by :func:`sentfast.report`.

    One thing differs from transformers: in ``model(**batch)``, rows of `last_hidden_state` that the attention mask
    hides are 0 unless `padded_rows` says otherwise. They cost as much as real tokens, and what respects the mask, such
    as mean pooling, does not see them. A SentenceTransformer has them wherever one of its modules reads them, and so
    has every call that runs the original code.

    Args:
        model: a SentenceTransformer, one of its Transformer modules, or a model of transformers; one with a base
            model inside, such as BertForSequenceClassification, is accelerated there.
        precision: "match" computes in the model's dtype. "bf16" multiplies in bfloat16 and keeps sums, norms and
            softmax in float32; on a CPU without bfloat16 instructions it warns and computes as "match".
        padded_rows: "zeros", or "exact": the numbers of transformers, up to rounding, in the rows that the mask hides;
            batches that have such rows then compute in the model's dtype. None: "zeros", with a warning when the first
            batch has such rows.

    Raises:
        UnsupportedModelError: nothing in the model is covered; names each part and the reason.
        ValueError: precision or padded_rows is another word.
        TypeError: model is not a torch.nn.Module.
    """
    from sentfast import native
    from sentfast.encoder import choice, encoder
    from sentfast.integrations import transformers

    choice.check_precision(precision)
    choice.check_padded_rows(padded_rows)
    found = base_models(model)
    refused = {path: (base, encoder.refusal_of(base)) for path, base in found.items()}
    covered = [base for base, refusal in refused.values() if refusal is None]
    reasons = [
        f"{path or 'the model'} ({type(base).__name__}): {REASONS[refusal.code]}: {refusal.detail} [{refusal.code}]"
        for path, (base, refusal) in refused.items()
        if refusal is not None
    ]
    if not covered:
        reasons = reasons or ["there is no transformers model inside that runs in PyTorch [SF119]"]
        raise UnsupportedModelError(f"model: {type(model).__name__} cannot be accelerated: {'; '.join(reasons)}")
    for reason in reasons:
        warn(f"not accelerated: {reason}")
    if precision == "bf16" and any(_without_bf16(base) for base in covered):
        isa = f" ({native.cpu_isa()})" if native.cpu_loaded() else ""
        warn(f"precision 'bf16': the CPU kernels in use{isa} have no bfloat16 products; computing as 'match'")
    for base in covered:
        if choice.chosen(base) not in (None, precision):
            encoder.forget(base)
        choice.choose(base, precision, padded_rows)
        transformers.mark(base)
    return model


def restore(model: Model) -> Model:
    """Turns the packed encoder off for a model, also where ``import sentfast`` alone would use it, and returns it.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    from sentfast.encoder import choice, encoder
    from sentfast.integrations import transformers

    for base in base_models(model).values():
        choice.turn_off(base)
        transformers.unmark(base)
        encoder.forget(base)
    return model


def refresh(model: Model) -> Model:
    """Makes anew whatever the encoder holds as a copy of the model's parameters, and returns the model.

    Needed after weights were written to behind PyTorch's back (through ``.data``, NumPy, shared memory) where the
    encoder of an accelerated model holds matrices as copies: with ``precision="bf16"``, for models in half precision
    and on a GPU. On a CPU such an edit is found without it as well, by the next call of at least 4096 tokens, or by
    smaller ones with as many tokens in all, or by 256 calls, whatever comes first. Of a float32 model on a CPU, and of
    any that was not accelerated by name, every call there shows every edit.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    from sentfast.encoder import encoder

    for base in base_models(model).values():
        encoder.refresh(base)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether :func:`accelerate` has been called on the model, or on a part of it, and :func:`restore` not since."""
    from sentfast.encoder import choice

    return any(choice.chosen(base) is not None for base in base_models(model).values())


def precision_of(model: nn.Module) -> str:
    """What :func:`accelerate` asked for, as far as this device has it: "bf16" where products are in bfloat16 indeed.

    "match" where accelerate was not called, and on a CPU without bfloat16 products.
    """
    from sentfast.encoder import choice

    for base in base_models(model).values():
        precision = choice.chosen(base)
        if precision is not None:
            return "match" if precision == "bf16" and _without_bf16(base) else precision
    return "match"


def _without_bf16(base: nn.Module) -> bool:
    """The model is on the CPU, and the CPU's kernels in use have no bfloat16 products."""
    from sentfast.encoder.products import has_bf16

    return any(parameter.is_cpu for parameter in base.parameters()) and not has_bf16()


def base_models(model: Any) -> dict[str, nn.Module]:
    """The base models of transformers inside a model, by path; not those inside another."""
    import sys

    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return {}
    found: dict[str, nn.Module] = {}
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, library.PreTrainedModel) and not any(path.startswith(name) for name in outer):
            outer.append(f"{path}." if path else "")
            base = module.base_model
            inner = [path] if path else []
            found[".".join(inner if base is module else [*inner, module.base_model_prefix])] = base
    return found
