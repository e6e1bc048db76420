"""`encode` on the packed encoder gives what sentence-transformers gives, for every input and argument."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import tokenizers
import torch
from encode_cases import FUSED, KINDS, PAIRS, PROMPTS, TEXTS, check, needs_fused, ran
from sentence_transformers import SentenceTransformer, models
from tiny_models import HIDDEN, VERSION, build, texts

import sentfast

pytestmark = pytest.mark.usefixtures("switched_on")

ARGUMENTS = {
    "nothing": {},
    "prompt": {"prompt": "weather: "},
    "prompt name": {"prompt_name": "query"},
    "empty prompt": {"prompt_name": "empty"},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "batches of 1": {"batch_size": 1},
    "batches of 7": {"batch_size": 7},
    "progress bar": {"show_progress_bar": True},
    "normalized": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 11},
    "truncated and normalized": {"truncate_dim": 11, "normalize_embeddings": True},
    "device": {"device": "cpu"},
    "tokens": {"output_value": "token_embeddings"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(makers, kind, case):
    arguments = ARGUMENTS[case]
    model = makers[kind](prompts=PROMPTS)
    codes = {"SF107"} if FUSED and case == "tokens" else set()
    check(model, TEXTS, codes=codes, fused=FUSED and not codes, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_all_outputs(makers, kind):
    model = makers[kind]()
    with sentfast.disabled():
        eager = model.encode(TEXTS[:5], output_value=None)
    # Rows that the mask hides are returned too, so the base model runs as steps.
    with ran("dropout_add_layer_norm", codes={"SF107"} if FUSED else set(), fused=False):
        result = model.encode(TEXTS[:5], output_value=None)
    assert [list(x) for x in result] == [list(x) for x in eager]
    for ours, theirs in zip(result, eager, strict=True):
        for name, value in theirs.items():
            if not isinstance(value, torch.Tensor):
                assert ours[name] == value
            else:
                torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precision(makers, precision):
    model = makers["mpnet"]()
    with sentfast.disabled():
        eager = model.encode(TEXTS, precision=precision)
    with ran("encoder"):
        result = model.encode(TEXTS, precision=precision)
    assert type(result) is type(eager) and result.dtype == eager.dtype and result.shape == eager.shape
    if "binary" in precision:
        difference = np.unpackbits(result.view(np.uint8) ^ eager.view(np.uint8)).mean()
        assert difference < 0.005  # the sign of a number next to 0
    else:
        step = 1e-5 if precision == "float32" else 1
        assert np.abs(result.astype(float) - eager.astype(float)).max() <= step


INPUTS = {
    "one text": TEXTS[5],
    "no character": "",
    "tuple": tuple(TEXTS[:9]),
    "array": np.array(TEXTS[:9]),
    "array of objects": np.array(TEXTS[:9], dtype=object),
    "one in a list": TEXTS[5:6],
    "pairs": PAIRS,
    "pairs as lists": [list(pair) for pair in PAIRS],
    "texts of one length": ["a b c"] * 9,
}


@pytest.mark.parametrize("form", INPUTS)
def test_inputs(makers, form):
    if form.startswith("array") and VERSION < (5, 4):
        pytest.skip("not an input of this version")
    check(makers["bert"](prompts=PROMPTS), INPUTS[form])
    if VERSION >= (5, 4) or "pairs" not in form:
        check(makers["mpnet"](prompts=PROMPTS), INPUTS[form], prompt_name="query")


@needs_fused
@pytest.mark.parametrize("form", ["texts", "pairs"])
def test_many_texts(makers, monkeypatch, form):
    """More than are tokenised at once: several windows, several pieces of each, made ahead in a thread."""
    from sentfast.integrations import encode, tokenize

    for module, name, number in ((encode, "_FIRST_WINDOW", 20), (encode, "_WINDOW", 50), (tokenize, "_PIECE", 16)):
        monkeypatch.setattr(module, name, number)
    inputs = TEXTS * 6 if form == "texts" else PAIRS * 15 + TEXTS
    check(makers["bert"](), inputs)
    check(makers["bert"](), inputs, show_progress_bar=True, batch_size=9)


@pytest.mark.parametrize("arguments", [{}, {"convert_to_tensor": True}, {"convert_to_numpy": False}], ids=str)
def test_no_input(makers, arguments):
    model = makers["bert"]()
    with sentfast.disabled():
        eager = model.encode([], **arguments)
    result = model.encode([], **arguments)
    assert type(result) is type(eager) and len(result) == 0
    assert getattr(result, "dtype", None) == getattr(eager, "dtype", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_query_and_document(makers, kind, include_prompt):
    model = makers[kind](prompts=PROMPTS, include_prompt=include_prompt)
    model.default_prompt_name = "passage"
    old = not include_prompt and not FUSED  # prompt exclusion of 5.1 is its own
    for method in ("encode_query", "encode_document", "encode"):
        check(model, TEXTS, method=method, codes={"SF109"} if old else set())


def test_router(paths):
    if VERSION < (5, 4):
        pytest.skip("another way to build a Router")
    routes = {}
    for task, kind in (("query", "bert"), ("document", "mpnet")):
        parts = build(paths[kind], models.Normalize())
        routes[task] = list(parts.children())
    model = SentenceTransformer(modules=[models.Router(routes)], device="cpu")
    for method in ("encode_query", "encode_document"):
        check(model, TEXTS, method=method, codes={"SF101"}, fused=False)


def tails():
    yield "layer norm", [models.LayerNorm(2 * HIDDEN)]
    yield "dropout", [models.Dropout(0.5), models.Normalize()]
    yield "gelu", [models.Dense(2 * HIDDEN, 7, activation_function=torch.nn.GELU())]
    yield "two dense", [models.Dense(2 * HIDDEN, 24, bias=False), models.Dense(24, 9), models.Normalize()]
    if VERSION >= (5, 7):
        yield "residual", [models.Dense(2 * HIDDEN, 24, use_residual=True), models.Normalize()]


@pytest.mark.parametrize("name", [name for name, _ in tails()])
def test_several_modes_and_modules_behind(paths, name):
    model = build(paths["bert"], *dict(tails())[name], modes=("cls", "mean"))
    model.train()  # encode ends that
    check(model, TEXTS, normalize_embeddings=True)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("modes", [("max",), ("lasttoken",), ("cls",), ("mean", "max", "cls", "lasttoken")], ids=str)
def test_modes(paths, modes):
    codes = {"SF117"} if modes == ("cls",) and VERSION < (5, 4) else set()
    check(build(paths["mpnet"], modes=modes), TEXTS, codes=codes)


@pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_forward(makers, kind, without_gradient):
    """model(features) keeps every feature and its padding."""
    model = makers[kind]()
    tokenize = model.preprocess if VERSION >= (5, 4) else model.tokenize
    with without_gradient():
        with sentfast.disabled():
            eager = model(tokenize(TEXTS[:6]))
        with ran("encoder", "pool", fused=False):
            result = model(tokenize(TEXTS[:6]))
    assert list(result) == list(eager)
    torch.testing.assert_close(result["sentence_embedding"], eager["sentence_embedding"], atol=1e-5, rtol=1e-5)
    assert result["token_embeddings"].shape == eager["token_embeddings"].shape


# ---- what encode hands to the encoder --------------------------------------------------------------------------


@contextmanager
def recorded(monkeypatch):
    """The (ids, cu_seqlens, types) of every call of the encoder."""
    from sentfast.encoder import Encoder

    calls, run = [], Encoder.run

    def record(self, ids, cu_seqlens, *, token_type_ids=None, **kwargs):
        calls.append((ids.numpy().copy(), cu_seqlens.numpy().copy(), token_type_ids))
        return run(self, ids, cu_seqlens, token_type_ids=token_type_ids, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "run", record)
        yield calls


@needs_fused
@pytest.mark.parametrize("form", ["texts", "pairs", "prompt", "short", "no limit"])
def test_token_ids_are_those_of_the_model(makers, monkeypatch, form):
    model = makers["bert"]()
    model.encode("before the first one, the encoder is tried")
    inputs = PAIRS if form == "pairs" else [text for text in texts(300, seed=3) if form != "no limit" or len(text) < 40]
    if form == "short":
        model.max_seq_length = 7
    if form == "no limit":
        model.max_seq_length = 10**30
    prompt = "weather :" if form == "prompt" else None
    for text in inputs[:60]:
        features = model.preprocess([text], prompt=prompt)
        with recorded(monkeypatch) as calls:
            model.encode([text], prompt=prompt)
        ((ids, cu_seqlens, types),) = calls
        assert ids.tolist() == features["input_ids"][0].tolist() and cu_seqlens.tolist() == [0, len(ids)]
        expected = features["token_type_ids"][0].tolist() if "token_type_ids" in features else [0] * len(ids)
        assert (types.tolist() if types is not None else [0] * len(ids)) == expected
    with recorded(monkeypatch) as calls:
        model.encode(inputs, prompt=prompt)
    packed = [tuple(ids[a:b]) for ids, ends, _ in calls for a, b in itertools.pairwise(ends)]
    singles = [tuple(model.preprocess([text], prompt=prompt)["input_ids"][0].tolist()) for text in inputs]
    assert sorted(packed) == sorted(singles)


@needs_fused
def test_batch_size_is_an_upper_bound_where_it_is_given(makers, monkeypatch):
    model = makers["bert"]()
    calls = {
        "default": lambda: model.encode(TEXTS * 8),
        "default of a query": lambda: model.encode_query(TEXTS * 8),
        "given": lambda: model.encode(TEXTS * 8, batch_size=7),
        "given by position": lambda: model.encode(TEXTS * 8, None, None, 7),
        "given to a query": lambda: model.encode_query(TEXTS * 8, batch_size=7),
        "given to a document": lambda: model.encode_document(TEXTS * 8, None, None, 7),
    }
    for name, call in calls.items():
        with recorded(monkeypatch) as seen:
            call()
        most = max(len(ends) - 1 for _, ends, _ in seen)
        assert (most <= 7) if "given" in name else (most > 32), name


@needs_fused
def test_tokens_per_batch_are_bounded(makers, monkeypatch):
    from sentfast.integrations import encode

    monkeypatch.setattr(encode, "TOKENS", 100)
    model = makers["bert"]()
    model.encode("before the first one, the encoder is tried")
    with recorded(monkeypatch) as calls:
        check(model, TEXTS * 10)
    assert len(calls) > 10 and max(len(ids) for ids, _, _ in calls) <= 100
    lengths = [np.diff(ends) for _, ends, _ in calls]
    assert all((np.diff(batch) <= 0).all() for batch in lengths)


@needs_fused
@pytest.mark.parametrize("style", [{}, {"ascii": True, "unit": "batch"}])
def test_progress_bar(style, makers, capsys, monkeypatch):
    """Also one that somebody has put in the place of sentence-transformers' own."""
    model = makers["bert"]()
    home = sys.modules[SentenceTransformer.__module__]
    monkeypatch.setattr(home, "trange", functools.partial(home.trange, **style) if style else home.trange)
    for arguments in ({}, {"batch_size": 5}):
        shown = []
        for context in (sentfast.disabled(), ran("encoder")):
            with context:
                model.encode(TEXTS * 9, show_progress_bar=True, **arguments)
            shown.append(capsys.readouterr().err.strip().rpartition("\r")[2].partition("[")[0])
        assert shown[0] == shown[1] and "Batches" in shown[0]
    model.encode(TEXTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_counted_as_in_the_original(include_prompt, makers):
    """It remembers how long a prompt is, whatever is changed about the model later."""
    mappings = []
    for context in (sentfast.disabled(), nullcontext()):
        model = makers["bert"](prompts=PROMPTS, include_prompt=include_prompt)
        with context:
            model.encode(TEXTS, prompt_name="query")
        mappings.append(model[0]._prompt_length_mapping)
    assert mappings[0] == mappings[1] != {}


class _Shouting:
    def normalize(self, text):
        text.uppercase()
        text.lowercase()


@needs_fused
@pytest.mark.parametrize("count", [1, 7, 90])
def test_a_normalizer_written_in_python(count, makers):
    """It has no text form by which two could be compared, which matters where there are many added tokens."""
    model = makers["bert"]()
    model.tokenizer.add_tokens([f"word{i}" for i in range(250)])
    model[0].auto_model.resize_token_embeddings(len(model.tokenizer))
    model.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Normalizer.custom(_Shouting())
    texts = list(itertools.islice(itertools.cycle(TEXTS), count))
    with sentfast.disabled():
        expected = model.encode(texts)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)


@needs_fused
def test_the_tokenizer_is_left_as_the_original_leaves_it(paths, tmp_path):
    original = build(paths["bert"], models.Dense(HIDDEN, 16))
    states, files = [], []
    for name, context in (("off", sentfast.disabled()), ("on", nullcontext())):
        model = copy.deepcopy(original)
        before = model.tokenizer.backend_tokenizer.to_str()
        with context:
            model.encode(TEXTS)
            model.save_pretrained(str(tmp_path / name))
        states.append(model.tokenizer.backend_tokenizer.to_str())
        assert json.loads(before)["truncation"]["max_length"] == 9
        folder = tmp_path / name
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert states[0] == states[1]
    assert files[0] == files[1] and len(files[0]) > 5


@pytest.mark.parametrize("place", ["transformer", "base model", "pooler", "pooling"])
def test_encode_evaluates_modules_that_came_later(place, makers):
    """As the original's ``self.eval()`` in every call."""
    model = makers["bert"]()
    model.encode(TEXTS[:2])
    base = model[0].auto_model
    places = {"transformer": model[0], "base model": base, "pooler": base.pooler, "pooling": model[1]}
    places[place].other = torch.nn.Sequential(torch.nn.Dropout(0.5))
    model.encode(TEXTS[:2])
    assert not any(module.training for module in model.modules())
    places[place].other[0].train()
    model.encode(TEXTS[:2])
    assert not any(module.training for module in model.modules())
