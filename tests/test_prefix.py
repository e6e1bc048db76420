"""The beginning of a text that decides its tokens: cut where that is certain, and the tokens stay the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from encode_cases import needs_fused
from tiny_models import LETTERS, SPECIAL, WORDS, save_tokenizer
from tokenizers import normalizers, pre_tokenizers

pytestmark = needs_fused

# Removed, joined, split, turned into several characters or taken apart by the normaliser; tokens that are looked for in
# the text itself, whole and broken; spaces of many kinds.
PIECES = [
    *LETTERS,
    *WORDS,
    *SPECIAL,
    "[MASK",
    "x" * 101,
    "ß",
    "İ",
    "ñ",
    "한",
    "🙂",
    "中中",
    "\u0301",
    "\u0327",
    "\u200b",
]
PIECES += ["\x1c", "\x00", "\ufffd", "\u200d", "'", "-"]
SPACES = [" "] * 12 + ["", "", "  ", "\t", "\n", "\u00a0", "\u3000", "\x1c", "\x85", " \u0301", "\u200b \u200b"]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def drawn(draw, pieces, count):
    return "".join(draw.choice(pieces) + draw.choice(SPACES) for _ in range(count))


def tokenizer(fast, max_length):
    from sentfast.integrations.tokenize import Tokenizer

    return Tokenizer(fast, max_length, None)


def taken(ours, texts, monkeypatch):
    """The tokens, and every text that the library was given."""
    given, whole = [], ours._encode_whole
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_encode_whole", lambda to, texts: given.extend(texts) or whole(to, texts))
        return ours(texts), given


ADDED = {"zz": {"single_word": True}, "<mask>": {"lstrip": True}, "q!": {"rstrip": True}}


@pytest.mark.parametrize("added", [{}, ADDED], ids=["no added tokens", "added tokens"])
def test_tokens_are_those_of_the_whole_text(fast, monkeypatch, added):
    draw = random.Random(torch.initial_seed())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=fast._tokenizer, pad_token="[PAD]")
    for content, options in added.items():
        fast.add_tokens([tokenizers.AddedToken(content, **options)])
    pieces = PIECES + [*added, "a" + "".join(added)] * 3
    texts = [drawn(draw, pieces, draw.choice([0, 3, 20, 60, 150])) for _ in range(150)]
    texts += ["a " * 400, "\u200b " * 400 + "b", "中" * 400, "a" * 400, "[SEP] " * 400]
    for max_length in (3, draw.randrange(4, 30), 128):
        ours = tokenizer(fast, max_length)
        found, given = taken(ours, texts, monkeypatch)
        ours._words = 0
        whole, everything = taken(ours, texts, monkeypatch)
        np.testing.assert_array_equal(found.lengths, whole.lengths)
        np.testing.assert_array_equal(found.ids, whole.ids)
        assert everything == texts
        assert "a " * (max_length - 2) in given  # cut
        assert "\u200b " * (max_length - 2) in given and texts[151] in given  # cut in vain
        assert texts[152] in given and texts[153] in given  # without a space


def left(fast):
    fast.truncation_side = "left"


def space_in_a_token(fast):
    fast.add_tokens(["new york"])


def space_from_the_normaliser(fast):
    fast.add_tokens(["中"])


def other_words(fast):
    fast._tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def other_normaliser(fast):
    fast._tokenizer.normalizer = normalizers.NFKC()


def no_limit(fast):
    fast.model_max_length = 10**30


@pytest.mark.parametrize(
    "change", [left, space_in_a_token, space_from_the_normaliser, other_words, other_normaliser, no_limit]
)
def test_where_nothing_is_certain_nothing_is_cut(tmp_path, monkeypatch, change):
    save_tokenizer(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    change(fast)
    texts = ["new york " * 40, "中 中 " * 40]
    _, given = taken(tokenizer(fast, None), texts, monkeypatch)
    assert given == texts


def test_pairs_stay_whole(fast, monkeypatch):
    pairs = [("a " * 100, "b " * 100), ["c " * 100, "d"]]
    _, given = taken(tokenizer(fast, 9), pairs, monkeypatch)
    assert given == pairs


@pytest.mark.parametrize("rest", ["\ud800", "é \ud800", "x" * 500 + "\udfff"])
def test_half_a_character_is_an_error_behind_the_cut_too(fast, rest):
    with pytest.raises(TypeError, match="must be str"):
        tokenizer(fast, 9)(["a " * 100 + rest])
