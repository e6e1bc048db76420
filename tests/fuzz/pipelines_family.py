"""Drawn pipelines of sentence-transformers, called as modules: `model(features)` once and again, in every mode."""

from __future__ import annotations

from typing import Any

import pipelines
import torch
from compare import Drawn, Sized, Tokens
from draw import Draw, Raised
from models_family import context, of_parameters
from torch import Tensor


def case(draw: Draw) -> dict[str, Any]:
    dropout = draw.one_of("dropout", (0.0, 0.1), p=0.1)
    model = pipelines.sentence_transformer(draw, dropout)
    training = draw.chance("training mode", 0.3)
    model.train(training)
    prompt = draw.one_of("prompt", (None, "query : "), p=0.2)
    features = model.preprocess(pipelines.texts(draw, "texts", draw.one_of("count", (3, 1, 2, 8, 14))), prompt=prompt)
    hooks = hooked(draw, model)
    seen: dict[str, Any] = {"preprocessed": dict(features)}
    with context(draw):
        for turn in range(draw.integer("calls with the same features", 1, 3)):
            out = draw.attempt(model, features)
            seen[f"output {turn}"] = out if isinstance(out, Raised) else visible(out)
            seen[f"same object {turn}"] = out is features
    if not isinstance(out, Raised):
        seen["repeats to the bit"] = repeats(draw, model, features, dropout if training else 0.0)
        seen["gradients"] = gradients(draw, model, out)
    seen["hooks"] = hooks
    seen["modes"] = [module.training for module in model.modules()]
    return masked(seen, drawn=bool(dropout) and training)


def masked(seen: dict[str, Any], drawn: bool) -> dict[str, Any]:
    return {name: Drawn(value) if drawn else value for name, value in seen.items()}


def visible(features: Any) -> dict[str, Any]:
    """Every feature; token embeddings with their mask."""
    mask = features.get("attention_mask")
    seen = dict(features)
    if isinstance(mask, Tensor) and "token_embeddings" in seen:
        seen["token_embeddings"] = Tokens(seen["token_embeddings"], mask)
    return seen


def hooked(draw: Draw, model: Any) -> list[str]:
    """Hooks that users register, on a module drawn from all; they note that they were called, and with what."""
    called: list[str] = []
    for kind in draw.some_of("hooks", ("forward", "forward_pre", "full_backward"), p=0.06):
        modules = list(model.named_modules())
        name, module = modules[draw.integer("hooked module", 0, 200) % len(modules)]

        def hook(*arguments: Any, name: str = name, kind: str = kind) -> None:
            called.append(f"{kind} {name} {len(arguments)}")

        getattr(module, f"register_{kind}_hook")(hook)
    return called


def repeats(draw: Draw, model: Any, features: Any, dropout: float) -> Any:
    """Two more calls: whether they give the same bits, as stock's do."""
    if dropout or not draw.chance("two more calls", 0.3):
        return None
    results = [draw.attempt(lambda: model(features)["sentence_embedding"]) for _ in range(2)]
    if any(isinstance(result, Raised) for result in results):
        return None
    return torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


def gradients(draw: Draw, model: Any, out: Any) -> Any:
    embedding = out.get("sentence_embedding")
    if embedding is None or not embedding.requires_grad:
        return "no gradient"
    if not draw.chance("backward", 0.5):
        return None
    if draw.chance("in place before backward", 0.1):
        changed = draw.attempt(lambda: embedding.mul_(2.0))
        if isinstance(changed, Raised):
            return changed
    loss = (embedding * draw.normal("weights of the loss", *embedding.shape).to(embedding.dtype)).sum()
    if draw.chance("create_graph", 0.1):
        return double_backward(draw, model, loss)
    error = draw.attempt(loss.backward, retain_graph=draw.chance("retain_graph", 0.1))
    return error if isinstance(error, Raised) else of_parameters(model)


def double_backward(draw: Draw, model: Any, loss: Tensor) -> Any:
    """A gradient penalty on one parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    chosen = parameters[draw.integer("parameter", 0, 100) % len(parameters)]
    first = draw.attempt(torch.autograd.grad, loss, chosen, create_graph=True, allow_unused=True)
    if isinstance(first, Raised) or first[0] is None:
        return first
    if not first[0].requires_grad:
        return "a constant"
    error = draw.attempt(first[0].square().sum().backward)
    found = error if isinstance(error, Raised) else of_parameters(model)
    return {"first": Sized(first[0].detach(), first[0].abs().max().item()), "second": found}
