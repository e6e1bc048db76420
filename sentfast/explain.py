"""What will run for a model, said before anything runs."""

from __future__ import annotations

import importlib
import sys

from sentfast.report import REASONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from sentfast.integrations.versions import Version

_SCORE_OPERATORS = {"cosine": ("cos_sim", "cosine_similarity"), "dot": ("dot_score", "dot_similarity")}


class Row:
    """One module of the model, or its similarity function.

    Attributes:
        name: path of the module in the model; "similarity" for the similarity function.
        kind: class of the module, name of the function.
        operator: what runs, "" for the original code.
        backend: where it runs, "" for the original code.
        reason: reason code of the original code, "" if the operator runs.
        precision: of the encoder's products, "fp32", "bf16" or "fp16"; "" for the others.
        detail: what was found that the reason code stands for, where more can be said.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        operator: str,
        backend: str,
        reason: str,
        precision: str = "",
        detail: str = "",
    ):
        self.name, self.kind, self.operator, self.backend, self.reason = name, kind, operator, backend, reason
        self.precision, self.detail = precision, detail

    def __str__(self) -> str:
        what = f"original code: {REASONS[self.reason]}" if self.reason else f"{self.operator} ({self.backend})"
        precision = f" {self.precision}" if self.precision else ""
        detail = f": {self.detail}" if self.detail else ""
        code = f" [{self.reason}]" if self.reason else ""
        return f"{self.name:12} {self.kind:24} {what}{precision}{detail}{code}"


class Explanation:
    """Returned by :func:`explain`; prints as a table.

    Attributes:
        enabled: whether sentfast is switched on.
        rows: one per module, then the similarity function.
    """

    def __init__(self, enabled: bool, rows: tuple[Row, ...]):
        self.enabled, self.rows = enabled, rows

    def __str__(self) -> str:
        lines = [] if self.enabled else ["sentfast is switched off: the original code runs everywhere. If enabled:"]
        return "\n".join([*lines, *map(str, self.rows)])

    def to_dict(self) -> dict[str, Any]:
        """{"enabled": bool, "modules": [{...}]}, each with the attributes of :class:`Row`, ready for JSON."""
        return {"enabled": self.enabled, "modules": [vars(row).copy() for row in self.rows]}


def explain(model: Any) -> Explanation:
    """What runs for each module of a sentence-transformers model and for its similarity function; nothing is executed.

    The answer holds for the model's present dtype and device and for ordinary input: an attention mask of 0 and 1 or
    flattened input. A single call may still go to the original code; :func:`sentfast.report` counts those.

    Args:
        model: a SentenceTransformer, another module whose children are sentence-transformers' modules, or a model of
            transformers.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    import torch

    from sentfast import switch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    parameter = next(model.parameters(), torch.empty(0, device="cpu"))
    probe = torch.empty(1, dtype=parameter.dtype, device=parameter.device)
    version = _version()
    rows = list(_rows(version, "", model, probe))
    metric = getattr(model, "_similarity_fn_name", "")
    if metric != "":
        rows.append(_similarity_row(version, str(getattr(metric, "value", metric) or "cosine"), probe))
    return Explanation(switch.is_enabled(), tuple(rows))


def _version() -> Version | None:
    adapter = importlib.import_module("sentfast.integrations.sentence_transformers")
    return adapter.resolve(adapter.installed())


def _rows(version: Version | None, path: str, model: Any, probe: Any) -> Iterator[Row]:
    """The children, and theirs where they are modules of sentence-transformers too (Router)."""
    if _is_transformer(model) and not path:
        yield _encoder_row("model", model)
        return
    for name, module in model.named_children():
        inner = f"{path}{name}"
        if hasattr(module, "auto_model") or _is_transformer(module):
            yield _encoder_row(inner, module)
        elif type(module).__name__ in ("Router", "ModuleDict", "Sequential") and len(list(module.children())):
            yield from _rows(version, f"{inner}.", module, probe)
        else:
            yield _module_row(version, inner, module, probe)


def _is_transformer(module: Any) -> bool:
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


def _encoder_row(name: str, module: Any) -> Row:
    from sentfast.accelerate import base_models
    from sentfast.encoder import choice, encoder

    kind = type(module).__name__
    base = next(iter(base_models(module).values()), None)
    if base is None:
        return Row(name, kind, "", "", "SF119")
    if choice.is_off(base):
        return Row(name, kind, "", "", "SF118")
    refusal = encoder.refusal_of(base)
    if refusal is not None:
        return Row(name, kind, "", "", refusal.code, detail=refusal.detail)
    return _encoder(name, kind, base, choice.chosen(base) or "match")


def _encoder(name: str, kind: str, base: Any, precision: str) -> Row:
    from sentfast import registry
    from sentfast.encoder import encoder
    from sentfast.encoder.device import composed

    words = base.get_input_embeddings().weight
    # On a GPU the encoder is made of several operators; attention stands for them.
    operator = "varlen_attention" if composed(words.device) else "encoder"
    backend = registry.ops[operator].choose(words)[0]
    products = encoder.products(base, precision)
    missing = precision == "bf16" and products == "fp32"
    detail = "bf16 asked for, which these CPU kernels do not have" if missing else ""
    return Row(name, kind, "encoder", backend, "", products, detail)


def _module_row(version: Version | None, name: str, module: Any, probe: Any) -> Row:
    from sentfast.integrations import modules

    kind = type(module).__name__
    if version is None:
        return Row(name, kind, "", "", "SF111")
    operator, reason = "", "SF101"
    if _is(module, version.pooling, "Pooling"):
        operator, reason = "pool", modules.why_not_pooling(version, module, modules.pooling_modes(version, module))
    elif _is(module, version.normalize, "Normalize"):
        operator, reason = "l2_normalize", ""
    if operator and not reason and not _runs_patched(module):
        reason = "SF110"
    return _row(name, kind, operator, reason, probe)


def _similarity_row(version: Version | None, metric: str, probe: Any) -> Row:
    from sentfast.integrations import guards

    function, operator = _SCORE_OPERATORS.get(metric, (metric, ""))
    reason = "SF111" if version is None else guards.products(probe.device.type) if operator else "SF101"
    return _row("similarity", function, operator, reason, probe)


def _row(name: str, kind: str, operator: str, reason: str, probe: Any) -> Row:
    from sentfast import registry
    from sentfast.integrations import guards

    reason = reason or guards.tensor(probe)
    if reason:
        return Row(name, kind, "", "", reason)
    return Row(name, kind, operator, registry.ops[operator].choose(probe)[0], "")


def _is(module: Any, owner: str, name: str) -> bool:
    return any(cls.__module__ == owner and cls.__name__ == name for cls in type(module).__mro__)


def _runs_patched(module: Any) -> bool:
    """The class has not overridden ``forward``: the first one found is the one of sentence-transformers."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__name__ in ("Pooling", "Normalize") and owner.__module__.startswith("sentence_transformers.")
