"""The tokenizer of BERT in our own code for plain texts (``wordpiece.h``); the tokenizers library takes the others.

Many times as fast as the library, which matters for small models and where texts are cut after a few tokens. Its
table of pieces costs as much as tokenising some hundred texts, so it is made when a tokenizer has done as many.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from sentfast import native

# Tokens that a tokenizer makes by itself before its table is worth making.
WORTH = 16384
_SAMPLES = 8


class Table(NamedTuple):
    """The compiled tokenizer, and the special tokens around a single text."""

    pieces: Any
    before: list[int]
    after: list[int]

    def __call__(self, texts: list, most: int | None) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids of all texts one after the other, at most `most` each, and their numbers: -1 for a text left out.

        None: so few tokens are wanted that the special ones do not fit.
        """
        room = 2**62 if most is None else most - len(self.before) - len(self.after)
        return self.pieces(texts, self.before, self.after, room) if room > 0 else None


class _Known:
    """What is remembered of one tokenizer of transformers."""

    def __init__(self, mark: tuple):
        self.mark = mark
        self.tokens = 0
        self.table: Table | None = None
        self.made = False


_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def find(owner: Any, tokenizer: tokenizers.Tokenizer) -> Table | None:
    """The table of `tokenizer`, which `owner` works with, if it fits one and has one by now. One thread at a time."""
    known = _known.get(owner)
    if known is None or known.mark != _mark(tokenizer):
        known = _known[owner] = _Known(_mark(tokenizer))
    if known.tokens < WORTH:
        return None
    if not known.made:
        known.table, known.made = _make(tokenizer), True
    return known.table


def count(owner: Any, tokens: int) -> None:
    """The tokenizers library has made so many."""
    known = _known.get(owner)
    if known is not None:
        known.tokens += tokens


def _mark(tokenizer: tokenizers.Tokenizer) -> tuple:
    """Changes where the tokenizer does, but for a vocabulary that was exchanged for one alike in size and samples."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    samples = [tokenizer.id_to_token(size * i // _SAMPLES) for i in range(_SAMPLES)]
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)
    return size, *samples, *map(repr, parts), tokenizer.get_vocab_size()


def _make(tokenizer: tokenizers.Tokenizer) -> Table | None:
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if type(model) is not models.WordPiece or type(normalizer) is not normalizers.BertNormalizer:
        return None
    if type(tokenizer.pre_tokenizer) is not pre_tokenizers.BertPreTokenizer:
        return None
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    unknown = model.token_to_id(model.unk_token)
    if native.state.cpu is None or unknown is None or model.continuing_subword_prefix != "##":
        return None
    if not all(token and token.isascii() and token.isprintable() and " " not in token for token in added):
        return None
    around = _around(tokenizer)
    if around is None:
        return None
    vocabulary = json.loads(model.__getstate__())["vocab"]
    pieces = native.state.cpu.WordPiece(
        list(vocabulary.items()), added, unknown, model.max_input_chars_per_word, normalizer.lowercase
    )
    return Table(pieces, *around)


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """The ids that come before and after those of a text; None if its own are not one piece of type 0."""
    shell = tokenizers.Tokenizer(tokenizer.model)
    shell.normalizer, shell.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    own = shell.encode("a b").ids
    if tokenizer.post_processor is not None:
        shell.post_processor = tokenizer.post_processor
    whole = shell.encode("a b")
    special = np.array(whole.special_tokens_mask)
    inside = np.flatnonzero(special == 0)
    if any(whole.type_ids) or len(inside) != len(own) or len(own) == 0:
        return None
    first, last = int(inside[0]), int(inside[-1]) + 1
    if whole.ids[first:last] != own:
        return None
    return whole.ids[:first], whole.ids[last:]
