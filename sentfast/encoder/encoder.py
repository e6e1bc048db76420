"""The packed encoder of one model: found in a side table, checked at every call, packed again when weights change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sentfast import locks, native, private, weak
from sentfast.encoder import adapters, choice
from sentfast.encoder.architecture import architecture_of
from sentfast.encoder.composed import Composed
from sentfast.encoder.device import composed
from sentfast.encoder.examine import ATTENTION_IMPLEMENTATIONS, Parts, Refusal, examine
from sentfast.encoder.on_cpu import Encoder
from sentfast.encoder.products import compute_dtype, why_not_bfloat16
from sentfast.encoder.structure import State, Structure, global_hooks, has_hooks
from sentfast.encoder.verify import try_encoders, try_steps
from sentfast.integrations import guards

_STEPS = "steps"


class _Entry:
    """What is known of one model."""

    def __init__(self, model: nn.Module):
        self.cls = type(model)
        self.structure = Structure(model)
        self.found = examine(model)
        if isinstance(self.found, Parts) and self.structure.foreign:
            self.found = Refusal("SF110", self.structure.foreign)
        self.state = self._state()
        self.switches = self._switches()
        if self.state is not None:
            self.found = examine(model)  # again: another thread may write to a buffer before its bytes are noted
        self.encoders: dict[torch.dtype, Encoder | Composed] = {}
        self.verified: dict[Any, Refusal | None] = {}  # by what was tried: products of a dtype, or the steps

    def current(self, model: nn.Module) -> bool:
        """Nothing but the values of a covered model's parameters can have changed."""
        same = type(model) is self.cls and self.structure.same(model)
        return same and (self.state is not None or (self.structure.same_kinds() and self.structure.same_forms()))

    def same_values(self) -> bool:
        """Tensors are where they were, and adapters as they were."""
        assert self.state is not None
        return self.state.same() and self.switches == self._switches()

    def _state(self) -> State | None:
        covered = isinstance(self.found, Parts)
        return State(self.structure.parameters, self.structure.buffers) if covered else None

    def _switches(self) -> list[tuple[Any, ...]]:
        return adapters.switches(self.found.adapted) if isinstance(self.found, Parts) and self.found.adapted else []

    def with_new_weights(self) -> _Entry:
        twin = copy.copy(self)
        twin.state, twin.switches, twin.encoders = self._state(), self._switches(), {}
        return twin


_table: weak.Table[_Entry] = weak.Table()
_lock = locks.new()


def _entry(model: nn.Module) -> _Entry:
    entry = _table.get(model)
    if entry is not None and entry.current(model):
        return entry
    with _lock:
        entry = _table.get(model)
        if entry is None or not entry.current(model):
            entry = _Entry(model)
            _table[model] = entry
        return entry


def _renewed(model: nn.Module) -> _Entry:
    """Examined anew after a change of dtype, device, form or buffers; nothing packed if only memory has changed."""
    with _lock:
        entry = _entry(model)
        if entry.state is not None and not entry.same_values():
            renewed = entry.with_new_weights()  # first, so that no edit comes between
            only_moved = entry.structure.same_kinds() and entry.structure.same_forms() and entry.state.same_buffers()
            entry = renewed if only_moved else _Entry(model)
            _table[model] = entry
        return entry


def encoder_of(model: nn.Module, precision: str = "match", *, inside: bool = False) -> Encoder | Composed | str:
    """The encoder that computes what ``model(...)`` would compute now, or the reason code why there is none.

    Args:
        model: a base model of transformers, such as BertModel.
        precision: "match", the model's dtype, or "bf16" (where the kernels in use have bfloat16 products).
        inside: the call comes from the model's own ``forward``, so hooks on the model itself run anyway.
    """
    found = encoder_or_parts(model, precision, inside=inside, trains=False)
    assert not isinstance(found, Parts)
    return found


def encoder_or_parts(
    model: nn.Module, precision: str = "match", *, inside: bool = False, trains: bool = True, steps: bool = False
) -> Encoder | Composed | Parts | str:
    """As :func:`encoder_of`, but if it `trains` the model's parts where they have to run as steps.

    That is with a gradient, with active dropout, with LoRA adapters for which no matrix stands, and where `steps` says.
    """
    choice.check_precision(precision)
    entry = _covered(model, inside)
    if isinstance(entry, str):
        return entry
    # In training every step changes the weights, which need not be looked at.
    trained = entry.structure.drops() or (torch.is_grad_enabled() and entry.structure.requires_grad())
    if trained or steps:
        return _parts(model, entry, trained) if trains else "SF122"
    if isinstance(entry.found, Parts) and not _foldable(entry.found):
        return _parts(model, entry, trained) if trains else "SF108"
    if not entry.same_values():
        entry = _renewed(model)
    if isinstance(entry.found, Refusal):
        return entry.found.code
    kind = entry.found.device.type
    reason = guards.products(kind) or why_not_bfloat16(entry.found)
    if reason:
        return reason
    if torch.is_autocast_enabled(kind):
        if not _fits_autocast(entry.found):
            return "SF116"
        dtype = torch.get_autocast_dtype(kind)
        dtype = compute_dtype(entry.found, "bf16") if kind == "cpu" else dtype
    else:
        dtype = compute_dtype(entry.found, precision)
    encoder = entry.encoders.get(dtype)
    if encoder is None:
        return _packed(model, entry, dtype)
    # Whoever has not asked for copies is owed what a model without them gives.
    if not encoder.current(whole=choice.chosen(model) is None):
        encoder.refresh()
    return encoder


def _foldable(parts: Parts) -> bool:
    """Whether plain matrices stand for all layers. In half precision their rounding would be added to PEFT's."""
    if not parts.adapted:
        return True
    on_cpu_in_full = parts.dtype == torch.float32 and not composed(parts.device)
    return on_cpu_in_full and all(adapters.terms(module) is not None for module in parts.adapted)


def _parts(model: nn.Module, entry: _Entry, trained: bool) -> Parts | str:
    same = entry.structure.same_kinds() and entry.structure.same_forms()
    if not (same and entry.state is not None and entry.state.same_buffers()):
        entry = _renewed(model)
    if isinstance(entry.found, Refusal):
        return entry.found.code
    if entry.structure.hooked_backward():
        return "SF120"
    kind = entry.found.device.type
    if torch.is_autocast_enabled(kind) and not _fits_autocast(entry.found):
        return "SF116"
    if trained and composed(entry.found.device):
        # Some optimisers write to the weights where neither version nor address tells. On the CPU the values are looked
        # at; here a training step is reason enough to pack them again.
        entry.encoders = {}
    return guards.products(kind) or _why_not_steps(model, entry) or entry.found


def _covered(model: nn.Module, inside: bool) -> _Entry | str:
    if architecture_of(type(model)) is None:
        return "SF123"
    if choice.is_off(model):
        return "SF118"
    reason = _reason_now(model, inside)
    if reason:
        return reason
    entry = _entry(model)
    if isinstance(entry.found, Refusal):
        return entry.found.code
    return "SF120" if entry.structure.hooked() else entry


def _fits_autocast(parts: Parts) -> bool:
    """Whether autocast asks for what we do: products in a half precision that we have, all else in float32."""
    kind = parts.device.type
    halves = (torch.bfloat16,) if kind == "cpu" else (torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype(kind) in halves and parts.dtype == torch.float32


def _packed(model: nn.Module, entry: _Entry, dtype: torch.dtype) -> Encoder | Composed | str:
    """A new encoder, if it agrees with the original code."""
    known = entry.verified.get(dtype)
    if known is not None:  # without making it again
        return known.code
    with _lock, private.InferenceMode(False), torch.no_grad():
        if dtype not in entry.encoders:
            assert isinstance(entry.found, Parts)
            made = _made(entry.found, dtype)
            if dtype not in entry.verified:
                # In float32 as well, for what roundings would hide.
                plain = dtype != entry.found.dtype == torch.float32
                tried = [made, _made(entry.found, torch.float32)] if plain else [made]
                entry.verified[dtype] = try_encoders(model, entry.found, tried)
            refusal = entry.verified[dtype]
            if refusal is not None:
                return refusal.code
            entry.encoders[dtype] = made
        return entry.encoders[dtype]


def _why_not_steps(model: nn.Module, entry: _Entry) -> str:
    """Whether the steps that a training runs agree with the original code."""
    if _STEPS not in entry.verified:
        with _lock:
            entry.verified[_STEPS] = try_steps(model)
    refusal = entry.verified[_STEPS]
    return "" if refusal is None else refusal.code


def _made(parts: Parts, dtype: torch.dtype) -> Encoder | Composed:
    return Composed(parts, dtype) if composed(parts.device) else Encoder(parts, dtype)


def _reason_now(model: nn.Module, inside: bool) -> str:
    """What can be said against this call without looking at the model's parts."""
    if torch.compiler.is_compiling():
        return "SF127"
    own: dict[str, Any] = vars(model)
    if global_hooks():
        return "SF120"
    if not inside:
        if own.get("_compiled_call_impl") is not None:
            return "SF127"
        if "forward" in own:
            return "SF110"
        if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and has_hooks([own]):
            return "SF120"
    config = vars(own["config"]) if "config" in own else {}
    if config.get("_attn_implementation_internal") not in ATTENTION_IMPLEMENTATIONS:
        return "SF124"
    if config.get("is_decoder") or config.get("is_causal"):
        return "SF125"
    if config.get("_output_attentions") or config.get("output_hidden_states"):
        return "SF121"
    # A replica of nn.DataParallel has no parameters, only tensors that stand for them.
    return "SF114" if "_is_replica" in own else ""


def refusal_of(model: nn.Module) -> Refusal | None:
    """Why the model cannot be accelerated, as far as that does not depend on the single call. Runs nothing."""
    entry = _renewed(model)
    found = entry.found
    if isinstance(found, Refusal):
        return found
    tried = next((refusal for refusal in entry.verified.values() if refusal is not None), None)
    if tried is not None:
        return tried
    if not _foldable(found):
        return Refusal(
            "SF108", "LoRA adapters in half precision, on a GPU or in a form that no plain matrix stands for"
        )
    own = vars(model)
    implementation = vars(own["config"]).get("_attn_implementation_internal")
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        return Refusal("SF124", repr(implementation))
    if "forward" in own:
        return Refusal("SF110", "the forward of the model itself was replaced")
    if own.get("_compiled_call_impl") is not None:
        return Refusal("SF127", "the model was compiled")
    hooked = [module for module in _entry(model).structure.inner if has_hooks([vars(module)])]
    if hooked:
        return Refusal("SF120", f"on a {type(hooked[0]).__name__}")
    if why_not_bfloat16(found):
        return Refusal("SF131", "PyTorch multiplies bfloat16 in AMX tiles here")
    reason = guards.products(found.device.type)
    why = native.why_no_cpu() if found.device.type == "cpu" else native.why_no_triton(found.device.type)
    why = why or "SENTFAST_CPU_ISA asks for them"
    return Refusal(reason, why) if reason else None


def products(model: nn.Module, precision: str) -> str:
    """In what a covered model multiplies: "fp32", "bf16" or, on a GPU, "fp16"."""
    found = _renewed(model).found
    assert isinstance(found, Parts)
    return choice.precision_name(compute_dtype(found, precision))


def refresh(model: nn.Module) -> None:
    """Makes anew whatever is a copy of the model's parameters."""
    with _lock:
        entry = _table.get(model)
        if entry is not None:
            entry.encoders = {}


def forget(model: nn.Module) -> None:
    """Drops the packed weights."""
    with _lock:
        _table.pop(model, None)
