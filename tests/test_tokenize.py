"""Texts to ids: those of the tokenizer as it is now, in bounded pieces; its state is left as the original leaves it."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from encode_cases import needs_fused
from tiny_models import LETTERS, WORDS, save_tokenizer
from tokenizers import normalizers, pre_tokenizers

import sentfast

pytestmark = [needs_fused, pytest.mark.usefixtures("switched_on")]


@pytest.fixture
def draw():
    return random.Random(torch.initial_seed())


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """As RoBERTa's: every byte is a token, and no text can be cut before it is tokenised."""
    vocabulary = {
        name: i
        for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **names)


def word_piece(folder) -> transformers.PreTrainedTokenizerFast:
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def drawn_texts(draw, count, words=()):
    sizes = [0, 1, 3, 8, 30, 200]
    pieces = [*LETTERS, *WORDS, *words]
    return [" ".join(draw.choices(pieces, k=draw.choice(sizes))) for _ in range(count)]


def expected(fast, texts, max_length=None):
    return fast(texts, padding=True, truncation="longest_first", max_length=max_length, padding_side="right")


def same(fast, tokens, texts, max_length=None):
    stock = expected(fast, texts, max_length)
    mask = np.array(stock["attention_mask"]).astype(bool)
    np.testing.assert_array_equal(tokens.lengths, mask.sum(1))
    np.testing.assert_array_equal(tokens.ids, np.array(stock["input_ids"])[mask])


def test_pieces_are_bounded(draw, monkeypatch, tmp_path):
    from sentfast.integrations import tokenize

    for fast in (byte_level(), word_piece(tmp_path)):
        most, threads = draw.randrange(50, 900), draw.choice([1, 2, 5])
        monkeypatch.setattr(tokenize, "_PIECE_CHARACTERS", most)
        monkeypatch.setattr(tokenize, "_WINDOW_CHARACTERS", draw.randrange(100, 9000))
        monkeypatch.setattr(tokenize, "_threads", lambda n=threads: n)
        texts = drawn_texts(draw, draw.randrange(5, 400))
        ours = tokenize.Tokenizer(fast, None, None)
        given, whole = [], ours._encode_whole
        noted = functools.partial(lambda given, whole, to, some: given.append(some) or whole(to, some), given, whole)
        monkeypatch.setattr(ours, "_encode_whole", noted)
        found = list(ours.windows(texts, itertools.chain([7], itertools.repeat(50))))
        windows = [window for window in found if window is not None]
        assert len(found) - len(windows) >= len(windows)  # a place to stop before each
        same(fast, tokenize._join([tokens for _, tokens in windows]), texts)
        assert [start for start, _ in windows] == np.cumsum([0, *(len(t.lengths) for _, t in windows)])[:-1].tolist()
        for some in given:
            many = len(some) > tokenize._LONG_TEXTS * threads
            assert not many or sum(map(len, some)) <= most * threads


def change_nothing(fast, draw):
    pass


def add_tokens(fast, draw):
    fast.add_tokens([f"new{draw.randrange(10**6)}" for _ in range(draw.choice([1, 300]))])


def add_behind_its_back(fast, draw):
    fast._tokenizer.add_tokens([tokenizers.AddedToken(draw.choice(LETTERS), single_word=draw.random() < 0.5)])


def other_flags(fast, draw):
    fast._tokenizer.add_tokens(
        [tokenizers.AddedToken("extra7", lstrip=draw.random() < 0.5, rstrip=draw.random() < 0.5)]
    )


def special(fast, draw):
    fast.split_special_tokens = draw.random() < 0.5


def other_normalizer(fast, draw):
    fast._tokenizer.normalizer = draw.choice([normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])


def other_words(fast, draw):
    found = [pre_tokenizers.ByteLevel(add_prefix_space=draw.random() < 0.5), pre_tokenizers.ByteLevel(use_regex=False)]
    fast._tokenizer.pre_tokenizer = draw.choice(found)


def other_model(fast, draw):
    known = fast._tokenizer.get_vocab(with_added_tokens=False)
    names, numbers = list(known), list(known.values())
    draw.shuffle(numbers)
    fast._tokenizer.model = tokenizers.models.BPE(dict(zip(names, numbers, strict=True)), [], unk_token="<unk>")


def other_side(fast, draw):
    fast.truncation_side = draw.choice(["left", "right"])


CHANGES = [change_nothing, add_tokens, add_behind_its_back, other_flags, special, other_normalizer, other_words]
CHANGES += [other_model, other_side]


def test_a_kept_copy_is_the_tokenizer_as_it_is_now(draw, monkeypatch):
    from sentfast.integrations import shells, tokenize

    copies, copy = [], shells._copy
    monkeypatch.setattr(shells, "_copy", lambda *args: copies.append(1) or copy(*args))
    fast, done = with_many_tokens(), []
    for _ in range(25):
        change = draw.choice(CHANGES)
        change(fast, draw)
        done.append(change.__name__)
        before = len(copies)
        for _ in range(2):
            texts = drawn_texts(draw, draw.choice([1, 3, 9]), ["extra7", "extra250", "new1", "</s>", "É", "X"])
            length = draw.choice([None, 5, 13])
            try:
                same(fast, tokenize.Tokenizer(fast, length, None)(texts), texts, length)
            except shells.NoCopyError:
                assert moved_tokens(fast), done
                fast, done = with_many_tokens(), []
                break
            except AssertionError as error:
                raise AssertionError(f"after {done}") from error
            assert len(copies) <= before + 1, done
    assert len(copies) < 50


def with_many_tokens():
    fast = byte_level()
    fast.add_tokens([f"extra{i}" for i in range(300)])
    return fast


def moved_tokens(fast) -> dict[str, int]:
    """Added tokens that the model, put there later, has under another number."""
    added, known = fast.added_tokens_encoder, fast._tokenizer.model
    return {name: i for name, i in added.items() if known.token_to_id(name) not in (i, None)}


def test_a_tokenizer_without_a_copy_is_left_to_the_original(draw, makers):
    from sentfast.integrations import shells

    model = makers["bert"]()
    fast, texts = model.tokenizer, drawn_texts(draw, 40)
    known = fast._tokenizer.get_vocab(with_added_tokens=False)
    fast.add_tokens(LETTERS[:3])
    others = dict(zip(known, [*list(known.values())[1:], 0], strict=True))
    fast._tokenizer.model = tokenizers.models.WordPiece(others, unk_token=fast.unk_token)
    assert moved_tokens(fast)
    with pytest.raises(shells.NoCopyError):
        shells.Shell(fast)
    with sentfast.disabled():
        eager = model.encode(texts)
    sentfast.report(reset=True)
    np.testing.assert_allclose(model.encode(texts), eager, atol=1e-5)
    assert ("SentenceTransformer._inference", "SF110") in sentfast.report().fallbacks


def test_the_state_that_is_left_is_the_original_s(draw, makers):
    model = makers["bert"](prompts={"query": "the query: "})
    fast = model.tokenizer
    for _ in range(6):
        texts = drawn_texts(draw, draw.choice([1, 3, 40, 90]))
        arguments = draw.choice([{}, {"prompt_name": "query"}, {"batch_size": 7}])
        states = []
        for off in (True, False):
            fast._tokenizer.enable_truncation(draw.randrange(3, 9))
            fast._tokenizer.enable_padding(length=draw.randrange(3, 9))
            with sentfast.disabled() if off else nullcontext():
                model.encode(texts, **arguments)
            states.append((fast._tokenizer.padding, fast._tokenizer.truncation, fast._tokenizer.encode_special_tokens))
        assert states[0] == states[1]


def items(draw, count, error_at):
    for i in range(count):
        if i == error_at:
            raise KeyError(i)
        if draw.random() < 0.5:
            yield None
        yield i


def test_the_thread_that_works_ahead_ends(draw):
    from sentfast.integrations.ahead import ahead

    for _ in range(60):
        count, most = draw.randrange(0, 12), draw.randrange(1, 4)
        error_at, stop_at = draw.choice([None, draw.randrange(12)]), draw.choice([None, draw.randrange(12)])
        made, failed = [], False
        generator = ahead(items(random.Random(draw.random()), count, error_at), most)
        try:
            for item in generator:
                made.append(item)
                if item == stop_at:
                    break
        except KeyError as error:
            failed = True
            assert error.args == (error_at,)
        generator.close()
        last = min(x for x in (count, error_at, None if stop_at is None else stop_at + 1) if x is not None)
        assert made == list(range(last))
        stopped = stop_at is not None and stop_at < min(count, count if error_at is None else error_at)
        assert failed == (error_at is not None and error_at < count and not stopped)
    assert_no_thread_works_ahead()


def test_the_thread_that_works_ahead_ends_whatever_interrupts_its_reader(monkeypatch):
    """A signal may come between any two steps, also where the reader is about to say that it stops."""
    from sentfast.integrations.ahead import ahead

    def interrupted(self):
        raise KeyboardInterrupt

    for taken in range(3):
        generator = ahead(iter(range(100)))
        for _ in range(taken + 1):
            next(generator)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Event, "set", interrupted)
            generator.close()
    assert_no_thread_works_ahead()


def assert_no_thread_works_ahead():
    deadline = time.monotonic() + 5
    while any(thread.name == "sentfast-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
