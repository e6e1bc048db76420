"""Texts to packed token ids: those that the tokenizer of a sentence-transformers model gives, without padding.

A fast tokenizer keeps padding and truncation as state and refuses to change it while another thread uses it. So a call
with more than a few texts works with a copy of its own (``shells.py``): the parts (vocabulary, normaliser, ...) are
shared, only the shell around them is new. A few short texts are taken one by one by the tokenizer itself, in the state
that sentence-transformers gives it: padding leaves a single text as it is.

Texts are handed to the tokenizer in pieces. Python answers a signal only between two of them, and the encodings of a
piece are held until its tokens are taken, so a piece is bounded by texts and by characters.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from sentfast import locks
from sentfast.integrations import layers, prefix, shells

# A tokenizer class that overrides one of these may give other ids.
_STEPS = (
    "__call__",
    "_encode_plus",
    "_convert_encoding",
    "_get_padding_truncation_strategies",
    "set_truncation_and_padding",
)
# What a tokenizer with several languages has, to be called before each text.
_SWITCH = "_switch_to_input_mode"
_NEEDED = {"input_ids", "attention_mask"}  # without a mask the original attends to padding
_FEATURES = {*_NEEDED, "token_type_ids"}
# So few texts are done before the tokenizer's own threads have woken up.
_FEW = 4
# Characters of the texts that the tokenizer itself takes: a few milliseconds, for which no other thread can have it.
_SHORT = 1 << 13
# Texts tokenised at a time: enough for the tokenizer's own threads, few enough that their encodings stay small.
_PIECE = 512
# Characters tokenised at a time for each of those threads: about a tenth of a second.
_PIECE_CHARACTERS = 1 << 17
# Long texts of a piece for each of those threads, at least, so that all have much the same work; and of any piece at
# most so many, as in a batch of sentence-transformers.
_LONG_TEXTS, _MOST_LONG_TEXTS = 2, 32
# A window ends with this number of characters, as long texts leave few tokens for their time.
_WINDOW_CHARACTERS = 1 << 22

# Around what changes the state of a tokenizer.
_shared_state = locks.new()


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
    if not _standard(type(tokenizer)) or not vars(tokenizer).keys().isdisjoint((*_STEPS, _SWITCH)):
        return "SF110"
    if type(tokenizer._tokenizer) is not tokenizers.Tokenizer:
        return "SF110"
    names = set(tokenizer.model_input_names)
    return "" if _NEEDED <= names <= _FEATURES else "SF101"


def _standard(cls: type) -> bool:
    own = all(getattr(cls, step) is getattr(TokenizersBackend, step) for step in _STEPS)
    return own and not hasattr(cls, _SWITCH) and not layers.any_foreign(TokenizersBackend, _STEPS)


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
    """What one call needs to tokenise, without padding.

    The tokenizer of the model is left with the padding and truncation that sentence-transformers gives it in every
    call, because they are saved with the model.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, prompt: str | None):
        self._tokenizer = tokenizer
        self._original: tokenizers.Tokenizer = tokenizer._tokenizer
        padding, truncation, most, _ = tokenizer._get_padding_truncation_strategies(
            padding=True, truncation="longest_first", max_length=max_length
        )
        self._strategies = padding, truncation, most
        self._side = tokenizer.truncation_side
        self._most = 0 if truncation.value == "do_not_truncate" else most
        self._with_types = "token_type_ids" in tokenizer.model_input_names
        self._prompt = prompt or ""
        self._words: int | None = None

    def __call__(self, texts: list) -> Tokens:
        if len(texts) <= _FEW and sum(map(_characters, texts)) + len(texts) * len(self._prompt) <= _SHORT:
            found = self._in_place(texts)
            if found is not None:
                return found
        with self._shell() as backend:
            return _join([tokens for tokens, _ in self._pieces(backend, texts)])

    def windows(self, texts: list, sizes: Iterator[int]) -> Iterator[tuple[int, Tokens] | None]:
        """(number of the first text, tokens) for as many texts at a time as `sizes` says, or fewer if they are long.

        None where the work may be stopped.
        """
        start = 0
        with self._shell() as backend:
            while start < len(texts):
                pieces, count, characters = [], 0, 0
                for tokens, size in self._pieces(backend, texts[start : start + next(sizes)]):
                    yield None
                    pieces.append(tokens)
                    count, characters = count + len(tokens.lengths), characters + size
                    if characters >= _WINDOW_CHARACTERS:
                        break
                yield start, _join(pieces)
                start += count

    def _in_place(self, texts: list) -> Tokens | None:
        """None if somebody else is using the tokenizer."""
        original = self._original
        with _shared_state:
            if not self._set_state():
                return None
            state = original.truncation, original.padding
            found = next(self._pieces(original, texts))[0]
            return found if (original.truncation, original.padding) == state else None

    def _shell(self) -> shells.Shell:
        with _shared_state:
            self._set_state()
            shell = shells.Shell(self._tokenizer)
        shell.backend.encode_special_tokens = self._tokenizer.split_special_tokens
        if self._most:
            strategy = self._strategies[1].value
            shell.backend.enable_truncation(self._most, stride=0, strategy=strategy, direction=self._side)
        else:
            shell.backend.no_truncation()
        return shell

    def _set_state(self) -> bool:
        """What sentence-transformers does to the tokenizer before each batch; whether nobody else was using it."""
        tokenizer, original = self._tokenizer, self._original
        try:
            tokenizer.set_truncation_and_padding(*self._strategies, 0, None, None)
            if original.encode_special_tokens != tokenizer.split_special_tokens:
                original.encode_special_tokens = tokenizer.split_special_tokens
        except RuntimeError:
            return False
        return True

    def _pieces(self, backend: tokenizers.Tokenizer, texts: list) -> Iterator[tuple[Tokens, int]]:
        """Tokens of some texts after the other, and the characters that they took."""
        for start in range(0, len(texts), _PIECE):
            whole = texts[start : start + _PIECE]
            if self._prompt:
                whole = [_prepend(self._prompt, text) for text in whole]
            begun = self._beginnings(backend, whole)
            for part, characters in _bounded(begun):
                yield self._tokens(backend, whole[part], begun[part]), characters

    def _beginnings(self, backend: tokenizers.Tokenizer, texts: list) -> list:
        """Of each text as much as is enough."""
        long = [prefix.long(text, self._most) for text in texts] if self._most else []
        if not any(long):
            return texts
        if self._words is None:
            self._words = prefix.most_words(backend, self._most, self._side)
        if not self._words:
            return texts
        return [prefix.beginning(text, self._words) if cut else text for text, cut in zip(texts, long, strict=True)]

    def _tokens(self, backend: tokenizers.Tokenizer, texts: list, begun: list) -> Tokens:
        encodings = self._encode(backend, texts, begun)
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

    def _encode(self, backend: tokenizers.Tokenizer, texts: list, begun: list) -> list[tokenizers.Encoding]:
        encodings = self._encode_whole(backend, begun)
        if begun is texts:
            return encodings
        # Words that the normaliser leaves nothing of give no token.
        short = [i for i, found in enumerate(encodings) if begun[i] is not texts[i] and len(found) < self._most]
        again = [texts[i] for i in short]
        for part, _ in _bounded(again):
            for i, whole in zip(short[part], self._encode_whole(backend, again[part]), strict=True):
                encodings[i] = whole
        return encodings

    def _encode_whole(self, backend: tokenizers.Tokenizer, texts: list) -> list[tokenizers.Encoding]:
        if len(texts) <= _FEW:
            return [self._encode_one(backend, text) for text in texts]
        return backend.encode_batch_fast(texts)

    def _encode_one(self, backend: tokenizers.Tokenizer, text: Any) -> tokenizers.Encoding:
        return backend.encode(text) if isinstance(text, str) else backend.encode(*text)


def _threads() -> int:
    """Of the tokenizers library."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bounded(texts: list) -> Iterator[tuple[slice, int]]:
    """The texts as pieces that take no longer than a signal may wait, and the characters of each."""
    sizes = list(map(_characters, texts))
    threads = _threads()
    least, most = min(_LONG_TEXTS * threads, _MOST_LONG_TEXTS), _PIECE_CHARACTERS * threads
    first, characters = 0, 0
    for i, size in enumerate(sizes):
        if characters + size > most and i - first >= least:
            yield slice(first, i), characters
            first, characters = i, 0
        characters += size
    if texts:
        yield slice(first, len(texts)), characters


def _characters(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


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
