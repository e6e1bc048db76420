"""Acceleration of a single model, asked for by name."""

from __future__ import annotations

from sentfast.report import REASONS, logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(NotImplementedError):
    """The model has no part that the packed encoder covers."""


def accelerate(model: Model, precision: str = "match") -> Model:
    """Lets the transformers inside a model run packed, in ``model(**batch)`` too, and returns the same object.

    Names, parameters, saving and copying stay as they are. The first call packs the weights; a call after they have
    changed packs them again. A call that the encoder does not take, such as one that needs a gradient, runs the
    original code and is counted by :func:`sentfast.report`.

    Args:
        model: a SentenceTransformer, one of its Transformer modules, or a model of transformers; one with a base
            model inside, such as BertForSequenceClassification, is accelerated there.
        precision: "match" computes in the model's dtype. "bf16" multiplies in bfloat16 and keeps sums, norms and
            softmax in float32; on a CPU without bfloat16 instructions it warns and computes as "match".

    Raises:
        UnsupportedModelError: nothing in the model is covered; names each part and the reason.
        ValueError: precision is another word.
        TypeError: model is not a torch.nn.Module.
    """
    from sentfast.encoder import choice, encoder
    from sentfast.integrations import transformers

    choice.check_precision(precision)
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
        logger.warning("not accelerated: %s", reason)
    on_cpu = any(parameter.is_cpu for base in covered for parameter in base.parameters())
    if precision == "bf16" and on_cpu and not encoder.has_bf16():
        logger.warning("precision 'bf16': the CPU kernels in use have no bfloat16 products; computing as 'match'")
    for base in covered:
        if choice.chosen(base) not in (None, precision):
            encoder.forget(base)
        choice.choose(base, precision)
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


def is_accelerated(model: nn.Module) -> bool:
    """Whether :func:`accelerate` has been called on the model, or on a part of it, and :func:`restore` not since."""
    from sentfast.encoder import choice

    return any(choice.chosen(base) is not None for base in base_models(model).values())


def precision_of(model: nn.Module) -> str:
    """The precision that :func:`accelerate` asked for, "match" where it was not called."""
    from sentfast.encoder import choice

    chosen = (choice.chosen(base) for base in base_models(model).values())
    return next((precision for precision in chosen if precision is not None), "match")


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
