"""The packed encoder on the CPU.

Float32 products read the model's own matrices. What is made of parameters otherwise is compared with them: every byte
of what is small at every call, and by shares matrices that were packed, because bfloat16 was asked for or the model is
in half precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sentfast import locks, private
from sentfast.encoder import arguments, choice
from sentfast.encoder.parts import Parts
from sentfast.encoder.weights import Sources, pack
from sentfast.ops.encoder import encoder as operator
from sentfast.reference import POOLING_MODES, Embedding, Layer

# A call of so many tokens compares all packed matrices with the model's; a smaller one a share, so that an edit is seen
# after that many tokens, or so many calls, at the latest.
ALL_AT = 4096
MOST_CALLS = 256

# Python answers a signal only between two calls of the operator. So a batch is cut into pieces: for each thread so many
# multiply-adds, about half a second, but at least the tokens that the operator takes through the layers together. More
# and shorter pieces cost time, because at the end of each a thread may wait for the others.
PIECE = 1 << 35
LEAST_TOKENS = 384

_lock = locks.new()


class Encoder:
    """Runs a model's layers over packed sequences. Made by :func:`encoder_of`.

    Holds the layers of the model.

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
        products = (x for layer in parts.layers for x in (*layer.qkv, layer.output, layer.up, layer.down))
        self._multiply_adds = sum(x.weight.numel() for x in products)  # of a token
        self._words = parts.words.weight.detach()
        self._parts, self._compute_dtype = parts, compute_dtype
        self._pack()
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
        large = self._packed.large.bytes
        if large and not large.same(max(input_ids.shape[0] / ALL_AT, 1 / MOST_CALLS)):
            self.refresh()
        types = token_type_ids if self.tables.token_types else None
        of_tokens = input_ids, types, position_ids
        result = [POOLING_MODES.index(mode) for mode in modes], prompt_length, normalize, padded_length
        most = max(LEAST_TOKENS, PIECE // self._multiply_adds) * torch.get_num_threads()
        if input_ids.shape[0] <= most:
            return self._operator(*of_tokens, cu_seqlens, *result)
        ends = cu_seqlens.numpy()
        found = []
        for piece in pieces(ends, most):
            first, last = int(ends[piece.start]), int(ends[piece.stop])
            tokens = (None if x is None else x[first:last] for x in of_tokens)
            found.append(self._operator(*tokens, cu_seqlens[piece.start : piece.stop + 1] - first, *result))
        return torch.cat(found)

    def _operator(self, input_ids, token_type_ids, position_ids, cu_seqlens, *result) -> Tensor:
        heads, activation, windows, pre_norm, gated = self._form
        return operator(
            self._words,
            input_ids,
            cu_seqlens,
            token_type_ids,
            position_ids,
            self._packed.tensors,
            heads,
            activation,
            windows,
            pre_norm,
            gated,
            self.tables.position_offset,
            self._eps,
            *result,
        )

    def first_layer(self) -> Encoder:
        """The same up to its first layer: an example of what comes behind the layers, in little time."""
        made = copy.copy(self)
        tensors = self._packed.tensors[: len(Embedding._fields) + len(Layer._fields)]
        made._packed = self._packed._replace(tensors=tensors, large=Sources())
        heads, activation, windows, pre_norm, gated = self._form
        made._form = heads, activation, windows[:1], pre_norm, gated
        return made

    def current(self, whole: bool = False) -> bool:
        """Nothing has changed of the `whole` model, else nothing small, nor what PyTorch counts changes of.

        :meth:`run` looks at a share of the rest.
        """
        packed = self._packed
        same = packed.small.bytes.same(1.0) and packed.written.same()
        return same and (not whole or not packed.large.bytes or packed.large.bytes.same(1.0))

    def refresh(self) -> None:
        """Packs anew what is a copy."""
        with private.InferenceMode(False), torch.no_grad():
            self._pack()

    def _pack(self) -> None:
        # One thread after the other, and told at once: no copy stands beside the bytes of another.
        with _lock:
            self._packed = pack(self._parts, self._compute_dtype)


def pieces(ends: np.ndarray, most: int) -> Iterator[slice]:
    """Whole sequences of at most so many tokens together, or one; of much the same size."""
    total, count, first = int(ends[-1]), len(ends) - 1, 0
    while first < count:
        left = total - int(ends[first])
        wanted = int(ends[first]) + left / -(-left // most) if left else total
        last = int(ends.searchsorted(wanted, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield slice(first, last)
        first = last
