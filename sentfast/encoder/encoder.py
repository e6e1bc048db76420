"""The packed encoder of one model: found in a side table, checked at every call, packed again when weights change."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sentfast import native
from sentfast.encoder import adapters, arguments, choice
from sentfast.encoder.architecture import architecture_of
from sentfast.encoder.composed import Composed
from sentfast.encoder.device import composed
from sentfast.encoder.examine import ATTENTION_IMPLEMENTATIONS, Parts, Refusal, examine
from sentfast.encoder.structure import State, Structure, global_hooks, has_hooks
from sentfast.encoder.weights import can_stay, large, pack
from sentfast.integrations import guards
from sentfast.ops.encoder import encoder as operator
from sentfast.reference import POOLING_MODES

# Groups computed with the matrices of a small model as they are, before they are put into panels: each group turns
# every matrix anew, and packing takes as long as panels save in some twenty. A query is one group; a batch has one for
# so many tokens, kGroupTokensInRows of csrc/cpu/encoder_batch.h.
AS_THEY_ARE = 20
GROUP = 384


class Encoder:
    """Runs a model's layers over packed sequences. Made by :func:`encoder_of`.

    Holds tensors of the model, and its layers until they are packed.

    Attributes:
        architecture: model type of transformers.
        hidden_size: width of the result.
        tables: sizes of the embedding tables.
        precision: "fp32" or "bf16": in what the products are computed.
        dtype: that of the result.
        device: where the model is, and the result.
    """

    def __init__(self, parts: Parts, compute_dtype: torch.dtype):
        self.architecture = parts.architecture.model_type
        self.hidden_size = parts.hidden_size
        self.tables = parts.tables
        self.precision = choice.precision_name(compute_dtype)
        self.dtype, self.device = parts.dtype, parts.device
        self._words = parts.words.weight.detach().contiguous()
        self._weights = pack(parts, compute_dtype, True)
        self._to_pack = parts if can_stay(parts, compute_dtype) and not large(parts) else None
        self._groups = 0
        windows = list(parts.windows) if any(window >= 0 for window in parts.windows) else []
        self._form = (parts.heads, parts.activation, windows, parts.architecture.pre_norm, parts.architecture.gated)
        self._eps = parts.eps

    @property
    def max_length(self) -> int:
        return self.tables.max_length

    def run(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        modes: Sequence[str] = (),
        prompt_length: int = 0,
        normalize: bool = False,
        padded_length: int = 0,
        checked: bool = False,
    ) -> Tensor:
        """Token embeddings or pooled vectors of packed sequences.

        Args:
            input_ids: int32 [T] on the CPU.
            cu_seqlens: int32 [B + 1], where each sequence starts, and T.
            token_type_ids: int32 [T]; None: all 0.
            position_ids: int32 [T]; None: as the model counts them.
            modes: pooling modes (``reference.POOLING_MODES``), side by side in the result.
            prompt_length: tokens at the start of each sequence that pooling leaves out.
            normalize: pooled vectors have length 1.
            padded_length: without modes, the length to which the result is padded.
            checked: the arguments are those of :func:`pack_padded`, which has looked at them.

        Returns:
            [B, len(modes) * H] with modes, [B, padded_length, H] with padded_length, else [T, H].

        Raises:
            IndexError: an id, token type or position is outside its table.
            ValueError: an argument has another dtype, shape or device, or a sequence is too long.
        """
        if not checked:
            arguments.check(self.tables, input_ids, cu_seqlens, token_type_ids, position_ids, modes, padded_length)
        if position_ids is None and self.tables.has_padding(input_ids):
            position_ids = self.tables.count_positions(input_ids, cu_seqlens)
        if self._to_pack is not None:
            self._pack_if_worth(input_ids.shape[0])
        heads, activation, windows, pre_norm, gated = self._form
        return operator(
            self._words,
            input_ids,
            cu_seqlens,
            token_type_ids if self.tables.token_types else None,
            position_ids,
            self._weights,
            heads,
            activation,
            windows,
            pre_norm,
            gated,
            self.tables.position_offset,
            self._eps,
            [POOLING_MODES.index(mode) for mode in modes],
            prompt_length,
            normalize,
            padded_length,
        )

    def _pack_if_worth(self, tokens: int) -> None:
        """The bits of a result are the same before and after."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            self._groups += -(-tokens // GROUP)
            if self._to_pack is not None and self._groups > AS_THEY_ARE:
                self._weights, self._to_pack = pack(self._to_pack, torch.float32), None


class _Entry:
    """What is known of one model."""

    def __init__(self, model: nn.Module):
        self.structure = Structure(model)
        self.found = examine(model)
        self.state = State(self.structure.parameters) if isinstance(self.found, Parts) else None
        self.switches = self._switches()
        self.encoders: dict[torch.dtype, Encoder | Composed] = {}

    def current(self) -> bool:
        """Nothing but the values of a covered model's parameters can have changed."""
        if not (self.structure.same_parts() and self.structure.same_code()):
            return False
        return self.state is not None or self.structure.same_kinds()

    def same_values(self) -> bool:
        """What a covered model's layers compute with."""
        assert self.state is not None
        return self.state.current() and self.switches == self._switches()

    def _switches(self) -> list[tuple[Any, ...]]:
        return adapters.switches(self.found.adapted) if isinstance(self.found, Parts) and self.found.adapted else []

    def with_new_weights(self) -> _Entry:
        twin = copy.copy(self)
        twin.state, twin.switches, twin.encoders = State(self.structure.parameters), self._switches(), {}
        return twin

    def keeps_weights(self, newer: _Entry) -> bool:
        """Only attributes have changed: the packed weights stay good."""
        return self.state is not None and newer.state is not None and self.structure.same_parts() and self.same_values()


_table: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread may have held it at the fork.
os.register_at_fork(after_in_child=_new_lock)


def _entry(model: nn.Module) -> _Entry:
    entry = _table.get(model)
    if entry is not None and entry.current():
        return entry
    with _lock:
        entry = _table.get(model)
        if entry is not None and entry.current():
            return entry
        new = _Entry(model)
        if entry is not None and entry.keeps_weights(new):
            new.encoders = entry.encoders
        _table[model] = new
        return new


def _renewed(model: nn.Module) -> _Entry:
    """After a change of dtype or device examined anew, after one of values with nothing packed."""
    with _lock:
        entry = _entry(model)
        if entry.state is not None and not entry.same_values():
            entry = entry.with_new_weights() if entry.structure.same_kinds() else _Entry(model)
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
    model: nn.Module, precision: str = "match", *, inside: bool = False, trains: bool = True
) -> Encoder | Composed | Parts | str:
    """As :func:`encoder_of`, but if it `trains` the model's parts where they have to run as steps.

    That is with a gradient, with active dropout, and with LoRA adapters for which no matrix stands.
    """
    choice.check_precision(precision)
    entry = _covered(model, inside)
    if isinstance(entry, str):
        return entry
    # In training every step changes the weights, which need not be looked at.
    if entry.structure.drops() or (torch.is_grad_enabled() and entry.structure.requires_grad()):
        return _parts(model, entry) if trains else "SF122"
    if isinstance(entry.found, Parts) and not _foldable(entry.found):
        return _parts(model, entry) if trains else "SF108"
    if not entry.same_values():
        entry = _renewed(model)
    if isinstance(entry.found, Refusal):
        return entry.found.code
    kind = entry.found.device.type
    reason = guards.device(kind)
    if reason:
        return reason
    if torch.is_autocast_enabled(kind):
        if not _fits_autocast(entry.found):
            return "SF116"
        dtype = torch.get_autocast_dtype(kind)
        dtype = _compute_dtype(entry.found, "bf16") if kind == "cpu" else dtype
    else:
        dtype = _compute_dtype(entry.found, precision)
    encoder = entry.encoders.get(dtype)
    return _packed(entry, dtype) if encoder is None else encoder


def _foldable(parts: Parts) -> bool:
    """Whether plain matrices stand for all layers. In half precision their rounding would be added to PEFT's."""
    if not parts.adapted:
        return True
    on_cpu_in_full = parts.dtype == torch.float32 and not composed(parts.device)
    return on_cpu_in_full and all(adapters.terms(module) is not None for module in parts.adapted)


def _parts(model: nn.Module, entry: _Entry) -> Parts | str:
    if not entry.structure.same_kinds():
        entry = _renewed(model)
    if isinstance(entry.found, Refusal):
        return entry.found.code
    if entry.structure.hooked_backward():
        return "SF120"
    kind = entry.found.device.type
    if torch.is_autocast_enabled(kind) and not _fits_autocast(entry.found):
        return "SF116"
    if composed(entry.found.device):
        # Some optimisers write to the weights where neither version nor address tells. On the CPU the values are looked
        # at; here a training step is reason enough to pack them again.
        entry.encoders = {}
    return guards.device(kind) or entry.found


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


def _packed(entry: _Entry, dtype: torch.dtype) -> Encoder | Composed:
    with _lock, torch.inference_mode(False), torch.no_grad():
        if dtype not in entry.encoders:
            assert isinstance(entry.found, Parts)
            new = Composed if composed(entry.found.device) else Encoder
            entry.encoders[dtype] = new(entry.found, dtype)
        return entry.encoders[dtype]


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
        if has_hooks([own]):
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
    """Why the model cannot be accelerated, as far as that does not depend on the single call. Packs nothing."""
    found = _renewed(model).found
    if isinstance(found, Refusal):
        return found
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
    reason = guards.device(found.device.type)
    why = native.why_no_cpu() if found.device.type == "cpu" else native.why_no_triton(found.device.type)
    return Refusal(reason, why) if reason else None


def products(model: nn.Module, precision: str) -> str:
    """In what a covered model multiplies: "fp32", "bf16" or, on a GPU, "fp16"."""
    found = _renewed(model).found
    assert isinstance(found, Parts)
    return choice.precision_name(_compute_dtype(found, precision))


def _compute_dtype(parts: Parts, precision: str) -> torch.dtype:
    """On a GPU the model's dtype, or bfloat16 if that is asked for.

    On the CPU bfloat16 where that is asked for, the CPU has it, and the columns come in pairs, as its panels hold them.
    """
    if composed(parts.device):
        return torch.bfloat16 if precision == "bf16" and parts.dtype == torch.float32 else parts.dtype
    asked = precision == "bf16" or parts.dtype == torch.bfloat16
    pairs = all(layer.down.in_features % 2 == 0 for layer in parts.layers)
    return torch.bfloat16 if asked and pairs and has_bf16() else torch.float32


def has_bf16() -> bool:
    """Whether the CPU kernels in use multiply bfloat16."""
    return native.state.cpu is not None and native.state.cpu.isa() == "avx512_bf16"


def forget(model: nn.Module) -> None:
    """Drops the packed weights."""
    with _lock:
        _table.pop(model, None)
