"""Private copies of tokenizers: the parts are shared, padding and truncation are the copy's own.

Adding thousands of tokens to a copy takes tens of milliseconds, so such a copy is kept for the next call. What is kept
is used by one call at a time, and only while the tokenizer's added tokens and its normaliser, with which they are
looked up, are as they were. All other parts are those that the tokenizer has now.

Some tokenizers have no copy: one whose model was replaced by one with other numbers keeps the old numbers of its added
tokens, which the library gives to no other.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import tokenizers

from sentfast import weak

# From so many added tokens on, making a copy costs more than looking whether a kept one is still right.
_MANY = 200
_MOST_KEPT = 8


class NoCopyError(Exception):
    """A copy of this tokenizer would give other numbers, or cannot be made."""


class _Kept(NamedTuple):
    original: tokenizers.Tokenizer
    added: dict[int, tokenizers.AddedToken]
    normalizer: bytes
    backend: tokenizers.Tokenizer


_kept: weak.Table[deque[_Kept]] = weak.Table()


class Shell:
    """Gives a copy of the tokenizer of transformers, without padding, to whom enters it, and keeps it afterwards."""

    def __init__(self, tokenizer: Any):
        original = tokenizer._tokenizer
        added = original.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._made: _Kept | None = None
        if len(added) < _MANY:
            self.backend = _copy(original, added)
            return
        normalizer = _state(original.normalizer)
        self._made = _taken(tokenizer, original, added, normalizer)
        if self._made is None:
            self._made = _Kept(original, added, normalizer, _copy(original, added))
        self.backend = self._made.backend
        for part in ("model", "pre_tokenizer", "post_processor"):
            setattr(self.backend, part, getattr(original, part))

    def __enter__(self) -> tokenizers.Tokenizer:
        return self.backend

    def __exit__(self, kind: Any, *rest: Any) -> None:
        # After an error a thread may still be using it.
        if kind is None and self._made is not None:
            _kept.setdefault(self._tokenizer, deque(maxlen=_MOST_KEPT)).append(self._made)


def _state(normalizer: Any) -> bytes:
    if normalizer is None:
        return b""
    try:
        return normalizer.__getstate__()
    except Exception as error:  # as below
        raise NoCopyError from error


def _taken(
    tokenizer: Any, original: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken], normalizer: bytes
) -> _Kept | None:
    """A kept copy, which is then kept no longer; the others that are no longer right are dropped."""
    kept = _kept.get(tokenizer, ())
    while kept:
        try:
            found = kept.pop()  # type: ignore[union-attr]
        except IndexError:  # another thread was faster
            return None
        if found.original is original and found.added == added and found.normalizer == normalizer:
            return found
    return None


def _copy(original: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer(original.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        setattr(copy, part, getattr(original, part))
    copy.add_tokens([added[number] for number in sorted(added)])
    if copy.get_added_tokens_decoder() == added:
        return copy
    try:  # numbers with gaps
        copy = tokenizers.Tokenizer.from_str(original.to_str())
    except Exception as error:  # the library's own class for all: parts written in Python have no text form
        raise NoCopyError from error
    if copy.get_added_tokens_decoder() != added:
        raise NoCopyError
    copy.no_padding()
    return copy
