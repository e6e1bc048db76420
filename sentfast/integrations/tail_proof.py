"""What a model does behind its encoder, against its own modules on a few tokens, before `encode` runs it fused.

Once for each model, and again when a setting of these modules, or what their code looks up, has changed.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from sentfast import private, switch, weak
from sentfast.encoder import Encoder, watch
from sentfast.encoder.structure import unmarked
from sentfast.encoder.verify import ALLOWED, difference, example, twin
from sentfast.integrations import originals
from sentfast.report import uncounted, warn

_LENGTHS = (5, 2, 3)
_PROMPT = 1
# Where these jump, a rounding decides: an example says nothing.
_JUMPS = (nn.Hardshrink, nn.Threshold)


class _Proof:
    """What was found for some modules in a row, and what it was found for."""

    def __init__(self, epoch: int, parts: list[nn.Module], reason: str):
        self._epoch, self._parts, self.reason = epoch, parts, reason
        tables: list[tuple[dict, Any, tuple[str, ...], Any]] = []
        for part in parts:
            for module in part.modules():
                keys = tuple(name for name in list(vars(module)) if name != "training")
                tables.append((vars(module), module, keys, True))
                tables.append((module._modules, None, tuple(module._modules), True))
        self._settings = watch.modes(tables)

    def holds(self, epoch: int, parts: list[nn.Module]) -> bool:
        same = epoch == self._epoch and len(parts) == len(self._parts)
        return same and all(map(operator.is_, parts, self._parts)) and self._settings.same()


_proofs: weak.Table[_Proof] = weak.Table()


def why_not(model: nn.Module, found: Any, epoch: int) -> str:
    """The reason code why a pipeline may not stand for the modules; epoch: changes with what their code looks up."""
    parts: list[Any] = list(model._modules.values())[1:]
    known = _proofs.get(model)
    if known is None or not known.holds(epoch, parts):
        known = _proofs[model] = _Proof(epoch, parts, _prove(found, parts))
    return known.reason


def _prove(found: Any, parts: list[Any]) -> str:
    if not isinstance(found.encoder, Encoder):  # runs Pooling's and Normalize's own replacements
        steps = ((unmarked(type(part).forward), part) for part in parts)
        return next(filter(None, (originals.why_not(forward, (part,)) for forward, part in steps)), "")
    if any(type(module) in _JUMPS for part in parts for module in part.modules()):
        return ""
    with uncounted(), private.InferenceMode(False), torch.no_grad(), private.WithoutAutocast():
        try:
            result, expected = _both(found, parts)
        except Exception:  # the original has its own error for the caller
            return "SF129"
    worst, allowed = difference(result, expected), ALLOWED[expected.dtype]
    if worst <= allowed:
        return ""
    names = ", ".join(type(part).__name__ for part in parts)
    where = "largest difference by the largest number of the original"
    warn(f"{names} run their own code in encode: {where}: {worst:.2g}, allowed {allowed:g} [SF129]")
    return "SF129"


def _both(found: Any, parts: list[Any]) -> tuple[Tensor, Tensor]:
    """On the same token embeddings, which the first layer makes."""
    encoder = found.encoder.first_layer()
    lengths = [min(n, encoder.max_length) for n in _LENGTHS]
    ids, ends, types, _ = example(encoder.tables, lengths, None)
    skipped = _PROMPT if found.excludes_prompt else 0
    result = encoder.run(
        ids, ends, token_type_ids=types, modes=found.modes, prompt_length=skipped, normalize=found.normalizes
    )
    mask = torch.arange(max(lengths), device="cpu") < torch.tensor(lengths, device="cpu").unsqueeze(1)
    features: Any = {
        "token_embeddings": encoder.run(ids, ends, token_type_ids=types, padded_length=max(lengths)),
        "attention_mask": mask.long(),
    }
    if skipped:
        features["prompt_length"] = skipped
    for part in parts:
        features = switch.run_original(type(part).forward, twin(part), features)
    return found.run_tail(result), features["sentence_embedding"]
