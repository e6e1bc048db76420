"""Token ids, by our own code or by the tokenizers library, are those of the model's tokenizer."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import tokenizers
import transformers
from backends import BACKEND
from tiny_models import LETTERS, build, save_base, texts

from sentfast.integrations import tokenize, wordpiece

needs_native = pytest.mark.skipif(BACKEND != "cpu", reason="the compiled CPU kernels are not loaded")
# Of every kind that the two divide between them: letters, punctuation, white space, control characters, accents,
# characters that stand alone, and those that make an added token.
ALPHABET = (
    LETTERS + "ABCDE .,:?'-_[]<>#\t\n\r" + "\x00\x0b\x7f\x85\xa0éßİ中я🙂\u0301\u200b\u2010\u2014\u2019\u2026\u2028"
)
SPECIAL = ["[CLS]", "[unk]", "x[MASK]y", "<extra>", "EXTRA", "", " ", "a" * 100, "a" * 101, "##a", "a\u0301", ".\u0301"]
COUNT = 3000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build(save_base(tmp_path_factory.mktemp("model"), "bert"))[0].processor


@pytest.fixture
def own(tokenizer, monkeypatch):
    """A tokenizer that nothing is known of, whose table is made at once."""
    monkeypatch.setattr(wordpiece, "WORTH", 0)
    return copy.deepcopy(tokenizer)


def random_texts(count: int) -> list[str]:
    draw = random.Random()
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(12))) for _ in range(count)] + texts(50, seed=draw.random())


def expected(tokenizer, inputs, max_length):
    return tokenizer(inputs, truncation=True, max_length=max_length)["input_ids"]


def ids_of(found):
    return [row.tolist() for row in np.split(found.ids, found.lengths.cumsum()[:-1])]


@needs_native
@pytest.mark.parametrize("max_length", [3, 4, 9, 40])
def test_our_ids_are_those_of_the_library(own, max_length):
    inputs = SPECIAL + random_texts(COUNT)
    table = tokenize.Tokenizer(own, max_length, None)._table
    assert table is not None
    _, lengths = table(inputs, max_length)
    assert 0.1 * len(inputs) < (lengths < 0).sum() < 0.9 * len(inputs)
    assert ids_of(tokenize.Tokenizer(own, max_length, None)(inputs)) == expected(own, inputs, max_length)


@needs_native
def test_texts_of_both_kinds_and_pairs_in_one_call(own):
    own.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = [("a b", "c"), "the query", "中", ["d", "e é"], "in.", ""]
    found = tokenize.Tokenizer(own, None, "weather : ")(inputs)
    rows = [own(["weather : " + x] if isinstance(x, str) else [["weather : " + x[0], x[1]]]) for x in inputs]
    assert ids_of(found) == [row["input_ids"][0] for row in rows]
    assert found.types is not None and found.types.tolist() == [t for row in rows for t in row["token_type_ids"][0]]


@needs_native
def test_new_added_tokens_and_another_normaliser_are_seen(own):
    inputs = [f"a {x}" for x in SPECIAL] + random_texts(300)
    assert tokenize.Tokenizer(own, 40, None)._table is not None
    own.add_tokens(["<extra>", tokenizers.AddedToken("extra", normalized=True)])
    assert ids_of(tokenize.Tokenizer(own, 40, None)(inputs)) == expected(own, inputs, 40)
    own.backend_tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    assert ids_of(tokenize.Tokenizer(own, 40, None)(inputs)) == expected(own, inputs, 40)


def _set(**parts):
    def change(tokenizer):
        for name, part in parts.items():
            setattr(tokenizer.backend_tokenizer, name, part)

    return change


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        _set(normalizer=tokenizers.normalizers.Lowercase()),
        _set(pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()),
        _set(model=tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        _set(model=tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]", continuing_subword_prefix="@")),
        lambda tokenizer: tokenizer.add_tokens(["two words"]),
        lambda tokenizer: tokenizer.add_tokens(["é"]),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    ],
)
def test_other_tokenizers_are_left_to_the_library(own, change):
    change(own)
    made = tokenize.Tokenizer(own, 9, None)
    assert made._table is None
    inputs = [*SPECIAL, *random_texts(50), "two words é"]
    if type(own.backend_tokenizer.model).__name__ == "WordPiece" and own.backend_tokenizer.get_vocab_size(False) > 2:
        assert ids_of(made(inputs)) == expected(own, inputs, 9)


def test_the_table_is_made_when_it_is_worth_it(tokenizer, monkeypatch):
    own = copy.deepcopy(tokenizer)
    monkeypatch.setattr(wordpiece, "WORTH", 100)
    found = []
    for _ in range(6):
        made = tokenize.Tokenizer(own, 40, None)
        found.append(made._table is not None)
        made(["a b c"] * 5)  # 25 tokens
    assert found == [False] * 4 + [BACKEND == "cpu"] * 2


def test_a_tokenizer_without_a_template(own):
    own.backend_tokenizer.post_processor = None
    made = tokenize.Tokenizer(own, 9, None)
    inputs = ["a b", "the query"]
    assert ids_of(made(inputs)) == expected(own, inputs, 9)
    assert isinstance(own, transformers.PreTrainedTokenizerFast)
