"""Texts to packed token ids: those that the tokenizer of a sentence-transformers model gives, without padding.

A fast tokenizer keeps padding and truncation as state and refuses to change it while another thread uses it. So a call
works with a copy of its own: the parts (vocabulary, normaliser, ...) are shared, only the shell around them is new.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from sentfast.integrations import prefix

# A tokenizer class that overrides one of these may give other ids.
_STEPS = (
    "__call__",
    "_encode_plus",
    "_convert_encoding",
    "_get_padding_truncation_strategies",
    "set_truncation_and_padding",
)
_FEATURES = {"input_ids", "attention_mask", "token_type_ids"}
# So few texts are done before the tokenizer's own threads have woken up.
_FEW = 4
# Texts tokenised at a time: enough for the tokenizer's own threads, few enough that their encodings stay small.
_PIECE = 512

_shared_state = threading.Lock()


def _renew_lock() -> None:
    global _shared_state
    _shared_state = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Tokens(NamedTuple):
    """Token ids of some texts, one text after the other.

    Attributes:
        ids: int32 [T].
        types: int32 [T]; None if all are 0.
        lengths: int64 [B].
    """

    ids: np.ndarray
    types: np.ndarray | None
    lengths: np.ndarray


def why_not(tokenizer: Any) -> str:
    """What can be said against this tokenizer before it has seen a text."""
    if not isinstance(tokenizer, TokenizersBackend):
        return "SF101"
    if not _standard(type(tokenizer)) or not vars(tokenizer).keys().isdisjoint(_STEPS):
        return "SF110"
    return "" if _FEATURES.issuperset(tokenizer.model_input_names) else "SF101"


def _standard(cls: type) -> bool:
    return all(getattr(cls, step) is getattr(TokenizersBackend, step) for step in _STEPS)


def why_not_texts(texts: list) -> str:
    """Texts are strings and pairs of strings."""
    kinds = set(map(type, texts))
    if kinds <= {str}:
        return ""
    return "" if all(isinstance(text, str) or _is_pair(text) for text in texts) else "SF107"


def _is_pair(text: Any) -> bool:
    return isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)


def prompt_length(transformer: Any, prompt: str) -> int:
    """The tokens of the prompt as sentence-transformers counts them; it remembers the number."""
    with _shared_state:
        return transformer._get_prompt_length(prompt) or 0


class Tokenizer:
    """What one call needs to tokenise: a private copy of `tokenizer`, without padding.

    The original is left with the padding and truncation that sentence-transformers gives it in every call, because
    they are saved with the model.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, prompt: str | None):
        strategies = tokenizer._get_padding_truncation_strategies(
            padding=True, truncation="longest_first", max_length=max_length
        )
        padding, truncation, most, _ = strategies
        original = tokenizer._tokenizer
        with _shared_state:
            try:
                tokenizer.set_truncation_and_padding(padding, truncation, most, 0, None, None)
                if original.encode_special_tokens != tokenizer.split_special_tokens:
                    original.encode_special_tokens = tokenizer.split_special_tokens
            except RuntimeError:  # another thread is tokenising with it; the copy does not depend on it
                pass
            self._backend = _copy(original)
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        self._most, self._side = 0, tokenizer.truncation_side
        if truncation.value != "do_not_truncate":
            self._backend.enable_truncation(most, stride=0, strategy=truncation.value, direction=self._side)
            self._most = most
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        self._prompt = prompt

    def __call__(self, texts: list) -> Tokens:
        if self._prompt:
            texts = [_prepend(self._prompt, text) for text in texts]
        encodings = self._encode(texts)
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = _flat(rows, lengths)
        if not self._with_types:
            return Tokens(ids, None, lengths)
        # The types of a single text depend on its template alone, so that of one text tells for all.
        pairs = any(type(text) is not str for text in texts)
        if not pairs and not any(encodings[int(lengths.argmax())].type_ids):
            return Tokens(ids, None, lengths)
        return Tokens(ids, _flat([encoding.type_ids for encoding in encodings], lengths), lengths)

    @functools.cached_property
    def _words(self) -> int:
        return prefix.most_words(self._backend, self._most, self._side)

    def _encode(self, texts: list) -> list[tokenizers.Encoding]:
        long = [prefix.long(text, self._most) for text in texts] if self._most else []
        if not any(long) or not self._words:
            return self._encode_whole(texts)
        begun = [prefix.beginning(text, self._words) if cut else text for text, cut in zip(texts, long, strict=True)]
        encodings = self._encode_whole(begun)
        # Words that the normaliser leaves nothing of give no token.
        short = [i for i, found in enumerate(encodings) if begun[i] is not texts[i] and len(found) < self._most]
        for i, whole in zip(short, self._encode_whole([texts[i] for i in short]), strict=True):
            encodings[i] = whole
        return encodings

    def _encode_whole(self, texts: list) -> list[tokenizers.Encoding]:
        if len(texts) <= _FEW:
            return [self._encode_one(text) for text in texts]
        return self._backend.encode_batch_fast(texts)

    def _encode_one(self, text: Any) -> tokenizers.Encoding:
        return self._backend.encode(text) if isinstance(text, str) else self._backend.encode(*text)

    def windows(self, texts: list, sizes: Iterator[int]) -> Iterator[tuple[int, Tokens]]:
        """(number of the first text, tokens) for as many texts at a time as `sizes` says."""
        start = 0
        while start < len(texts):
            stop = start + next(sizes)
            pieces = [self(texts[i : min(i + _PIECE, stop)]) for i in range(start, min(stop, len(texts)), _PIECE)]
            yield start, _join(pieces)
            start = stop


def _copy(original: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer(original.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        setattr(copy, part, getattr(original, part))
    added = original.get_added_tokens_decoder()
    copy.add_tokens([added[number] for number in sorted(added)])
    if copy.get_added_tokens_decoder() != added:  # numbers with gaps
        copy = tokenizers.Tokenizer.from_str(original.to_str())
    return copy


def _prepend(prompt: str, text: Any) -> Any:
    return prompt + text if isinstance(text, str) else [prompt + text[0], text[1]]


def _flat(rows: list[list[int]], lengths: np.ndarray) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))


def _join(pieces: list[Tokens]) -> Tokens:
    if len(pieces) == 1:
        return pieces[0]
    ids = np.concatenate([piece.ids for piece in pieces])
    types = None
    if any(piece.types is not None for piece in pieces):
        types = np.concatenate([np.zeros_like(piece.ids) if piece.types is None else piece.types for piece in pieces])
    return Tokens(ids, types, np.concatenate([piece.lengths for piece in pieces]))
