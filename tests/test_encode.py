"""`encode` on the packed encoder gives what sentence-transformers gives, for every argument and from every thread."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from backends import BACKEND
from sentence_transformers import SentenceTransformer, models
from tiny_models import HIDDEN, VERSION, build, save_base, texts

import sentfast
from sentfast import registry

pytestmark = pytest.mark.usefixtures("switched_on")
FUSED = VERSION >= (6, 2)  # before, `encode` is one piece, and the encoder runs inside its loop
TEXTS = texts(23)
PAIRS = list(zip(TEXTS[:8], TEXTS[8:16], strict=True))
PROMPTS = {"query": "query : ", "passage": "the passage: ", "empty": ""}

needs_fused = pytest.mark.skipif(not FUSED, reason="encode has no loop of its own before 6.2")
needs_native = pytest.mark.skipif(BACKEND != "cpu", reason="the compiled CPU kernels are not loaded")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_base(folder, kind) for kind in ("bert", "mpnet")}


KINDS = ("bert", "mpnet", "xtremedistil")


@pytest.fixture(scope="module")
def makers(paths):
    """The three forms of the project's models: mean; mean + Normalize; mean + Dense of tanh, short texts."""

    def distil(**kwargs):
        model = build(paths["bert"], models.Dense(HIDDEN, 16), **kwargs)
        model.max_seq_length = 16
        return model

    return {
        "bert": lambda **kwargs: build(paths["bert"], **kwargs),
        "mpnet": lambda **kwargs: build(paths["mpnet"], models.Normalize(), **kwargs),
        "xtremedistil": distil,
    }


@contextmanager
def ran(*operators: str, codes: set[str] = frozenset(), fused: bool = FUSED):
    """The block calls these operators on the expected backend, and falls back for these reasons and no other."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    names = {name for name, _ in report.calls}
    assert {backend for _, backend in report.calls} <= {BACKEND}, str(report)
    assert set(operators) <= names, f"{set(operators) - names} did not run\n{report}"
    assert {code for _, code in report.fallbacks} == codes, str(report)
    if fused and "encoder" in operators:
        assert "pool" not in names, f"pooling ran by itself\n{report}"


def check(model, inputs, *operators, method="encode", codes=frozenset(), fused=FUSED, **kwargs):
    """Ours against stock and against stock in float64."""
    with sentfast.disabled():
        eager = getattr(model, method)(inputs, **kwargs)
        exact = getattr(copy.deepcopy(model).double(), method)(inputs, **kwargs)
    with ran("encoder", *operators, codes=codes, fused=fused):
        result = getattr(model, method)(inputs, **kwargs)
    assert type(result) is type(eager)
    if isinstance(result, list):
        assert [x.shape for x in result] == [x.shape for x in eager]
        result, eager, exact = (torch.cat([x.flatten() for x in each]) for each in (result, eager, exact))
    result, eager, exact = (torch.as_tensor(x) for x in (result, eager, exact))
    assert result.dtype == eager.dtype and result.device == eager.device
    assert result.is_inference() == eager.is_inference()
    # Stock's own error in a small sum may be nil by chance; the vectors have rows of about this size.
    assert_accurate(result, eager, exact, size=1.0)


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
    with ran("encoder", codes={"SF107"} if FUSED else set(), fused=False):
        result = model.encode(TEXTS[:5], output_value=None)
    assert [list(x) for x in result] == [list(x) for x in eager]
    for ours, theirs in zip(result, eager, strict=True):
        for name, value in theirs.items():
            if not isinstance(value, torch.Tensor):
                assert ours[name] == value
            elif name == "token_embeddings":  # what stands in padded positions has no meaning
                used = theirs["attention_mask"].bool()
                torch.testing.assert_close(ours[name][used], value[used], atol=1e-5, rtol=1e-5)
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


@pytest.mark.parametrize("kind", KINDS)
def test_forward(makers, kind):
    """model(features) keeps every feature and its padding."""
    model = makers[kind]()
    tokenize = model.preprocess if VERSION >= (5, 4) else model.tokenize
    with torch.no_grad():
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
    with recorded(monkeypatch) as calls:
        check(makers["bert"](), TEXTS * 10)
    assert len(calls) > 10 and max(len(ids) for ids, _, _ in calls) <= 100
    lengths = [np.diff(ends) for _, ends, _ in calls]
    assert all((np.diff(batch) <= 0).all() for batch in lengths)


@needs_fused
def test_progress_bar(makers, capsys):
    model = makers["bert"]()
    for arguments in ({}, {"batch_size": 5}):
        shown = []
        for context in (sentfast.disabled(), nullcontext()):
            with context:
                model.encode(TEXTS * 9, show_progress_bar=True, **arguments)
            shown.append(capsys.readouterr().err.strip().rpartition("\r")[2].partition("[")[0])
        assert shown[0] == shown[1] and "Batches" in shown[0]
    model.encode(TEXTS)
    assert capsys.readouterr().err == ""


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


# ---- the same bits, whatever is around a text ------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("kind", [*KINDS, "gelu"])
def test_bits_do_not_depend_on_the_batch(makers, paths, kind):
    if kind == "gelu":
        model = build(paths["bert"], models.Dense(HIDDEN, 21, activation_function=torch.nn.GELU()), models.Normalize())
    else:
        model = makers[kind]()
    threads = torch.get_num_threads()
    expected = model.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    try:
        with ran("encoder"):
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert np.array_equal(model.encode([TEXTS[i] for i in order])[np.argsort(order)], expected)
                for batch_size in (1, 2, 7):
                    assert np.array_equal(model.encode(TEXTS, batch_size=batch_size), expected)
                for text, row in zip(TEXTS, expected, strict=True):
                    assert np.array_equal(model.encode(text), row)
                assert np.array_equal(model.encode(texts(50, seed=9) + TEXTS)[50:], expected)
    finally:
        torch.set_num_threads(threads)


def bits(model, inputs=TEXTS):
    return model.encode(inputs).tobytes()


@needs_fused
def test_eight_threads_with_one_model(makers):
    model = makers["mpnet"](prompts=PROMPTS)
    inputs = [TEXTS, TEXTS[:3], TEXTS[4], TEXTS * 5]
    expected = [model.encode(each).tobytes() for each in inputs]
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        found = []
        for i in range(12):
            with registry.use_backend(BACKEND):
                found.append(model.encode(inputs[(i + number) % 4]).tobytes() == expected[(i + number) % 4])
        return all(found)

    with ran("encoder"), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


def test_two_models_at_once(makers):
    pair = [makers["bert"](), makers["mpnet"]()]
    expected = [bits(model) for model in pair]
    for _ in range(3):
        assert [bits(model) for model in pair] == expected


def _child(queue, model, backend):
    with registry.use_backend(backend):
        queue.put(bits(model))


@pytest.mark.parametrize("method", ["fork"])
def test_process_after_use(makers, method):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own threads do not outlive a fork
    try:
        model = makers["bert"]()
        expected = bits(model)
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=_child, args=(queue, model, BACKEND))
        process.start()
        process.join(100)
        assert process.exitcode == 0
        assert queue.get() == expected
    finally:
        torch.set_num_threads(threads)


class _Dataset(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with registry.use_backend(BACKEND):
            return self.model.encode(TEXTS[i : i + 3], convert_to_tensor=True).clone()


def test_data_loader_workers(makers):
    model = makers["bert"]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    expected = [model.encode(TEXTS[i : i + 3]) for i in range(6)]
    torch.set_num_threads(threads)
    loader = torch.utils.data.DataLoader(_Dataset(model), batch_size=None, num_workers=2, timeout=60)
    for result, row in zip(loader, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), row)


# ---- several processes -----------------------------------------------------------------------------------------


@pytest.fixture
def backend_of_workers(monkeypatch):
    """Worker processes read it from their environment."""
    if BACKEND == "reference":
        monkeypatch.setenv("SENTFAST_BACKEND", BACKEND)


def test_pool(makers, backend_of_workers):
    model = makers["mpnet"](prompts=PROMPTS)
    expected = model.encode(TEXTS, prompt_name="query")
    sentfast.accelerate(model)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        assert np.array_equal(model.encode(TEXTS, prompt_name="query", pool=pool, chunk_size=4), expected)
        tokens = model.encode(TEXTS[:3], pool=pool, output_value="token_embeddings")
        torch.testing.assert_close(tokens, model.encode(TEXTS[:3], output_value="token_embeddings"))
        if FUSED:  # 5.1 waits for ever
            with pytest.raises(ValueError, match="Unsupported input type: int"):
                model.encode(["a", 3], pool=pool)
    finally:
        model.stop_multi_process_pool(pool)


def test_list_of_devices(makers, backend_of_workers):
    model = makers["bert"]()
    result = model.encode(TEXTS, device=["cpu"], convert_to_tensor=True)
    assert torch.equal(result, model.encode(TEXTS, convert_to_tensor=True))


def test_a_worker_process_runs_accelerated(makers):
    from sentfast.integrations import workers

    model = makers["bert"]()
    name = "_multi_process_worker" if VERSION >= (5, 4) else "_encode_multi_process_worker"
    target = getattr(SentenceTransformer, name)
    assert target.func is workers.run and target.args[0] is SentenceTransformer
    with sentfast.disabled():
        assert getattr(SentenceTransformer, name).__module__.startswith("sentence_transformers.")
    sentfast.restore(model)
    with workers.choices_noted(None, model):
        target = getattr(SentenceTransformer, name)
    assert list(target.args[2].values()) == [""]
    sentfast.accelerate(model, "bf16")
    with workers.choices_noted(None, model):
        assert list(getattr(SentenceTransformer, name).args[2].values()) == ["bf16"]


# ---- errors, interrupts, and models that are not ours ------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [["a", 3], [None], ["a", ("b", 1)], [("a", "b", "c")], 3, ["\ud800"], ["a"] * 700 + ["\ud800"]],
    ids=["number", "None", "pair with a number", "three", "one number", "surrogate", "surrogate late"],
)
def test_errors_are_those_of_the_original(makers, inputs):
    model = makers["bert"]()
    with sentfast.disabled(), pytest.raises(Exception) as eager:
        model.encode(inputs)
    with pytest.raises(eager.type) as ours:
        model.encode(inputs)
    assert type(ours.value) is eager.type
    assert not [t for t in threading.enumerate() if t.name == "sentfast-ahead"]


@needs_fused
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["tokenizer", "encoder"])
def test_interrupt(makers, monkeypatch, place, error):
    from sentfast.encoder import Encoder
    from sentfast.integrations.tokenize import Tokenizer

    model = makers["bert"]()
    owner, name = (Tokenizer, "__call__") if place == "tokenizer" else (Encoder, "run")
    original, calls = getattr(owner, name), []

    def failing(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise error("stop")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(error, match="stop"):
            model.encode(TEXTS * 300, batch_size=100)
    assert not [t for t in threading.enumerate() if t.name == "sentfast-ahead"]
    check(model, TEXTS)


class _Forward(SentenceTransformer):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out["sentence_embedding"] = out["sentence_embedding"] * 0 + 7
        return out


class _Tokenize(SentenceTransformer):
    def tokenize(self, texts, **kwargs):
        return super().tokenize(["w"] * len(texts), **kwargs)

    preprocess = tokenize if VERSION < (5, 4) else lambda self, inputs, **kw: super().preprocess(["w"] * len(inputs))


class _Encode(SentenceTransformer):
    def encode(self, *args, **kwargs):
        return "mine"


@pytest.mark.parametrize("cls", [_Forward, _Tokenize])
def test_overridden_methods_run(paths, cls):
    model = build(paths["bert"], cls=cls)
    check(model, TEXTS, codes={"SF110"} if FUSED else set(), fused=False)
    rows = model.encode(TEXTS)
    assert (rows == (7 if cls is _Forward else rows[0])).all()


def test_overridden_encode_runs(paths):
    assert build(paths["bert"], cls=_Encode).encode(TEXTS) == "mine"


def disturb_hook(model):
    model[1].register_forward_hook(
        lambda module, args, out: {**out, "sentence_embedding": out["sentence_embedding"] * 3}
    )


def disturb_instance(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: {"sentence_embedding": forward(*args, **kwargs)["sentence_embedding"] * 2}


def disturb_restore(model):
    sentfast.restore(model)


def disturb_dtype(model):
    model.double()


@needs_fused
@pytest.mark.parametrize(
    ("disturb", "codes", "operators"),
    [
        (disturb_hook, {"SF120"}, {"encoder", "pool"}),
        (disturb_instance, {"SF110"}, {"encoder", "pool"}),
        (disturb_restore, {"SF118"}, {"pool"}),
        (disturb_dtype, {"SF102"}, set()),
    ],
)
def test_models_that_the_loop_leaves_to_the_original(makers, disturb, codes, operators):
    model = makers["bert"]()
    disturb(model)
    with sentfast.disabled():
        eager = model.encode(TEXTS)
    sentfast.report(reset=True)
    result = model.encode(TEXTS)
    report = sentfast.report()
    np.testing.assert_allclose(result, eager, atol=1e-5)
    assert {code for (site, code) in report.fallbacks if site == "SentenceTransformer._inference"} == codes
    assert {name for name, _ in report.calls} - {"pack_panels"} == operators


def test_text_longer_than_the_position_table(makers):
    model = makers["bert"]()
    model.max_seq_length = 1000
    errors = []
    for context in (sentfast.disabled(), nullcontext()):
        with context, pytest.raises(Exception) as error:
            model.encode(["a " * 500, "b"])
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_weights_that_change_are_seen(makers):
    model = makers["bert"]()
    check(model, TEXTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    check(model, TEXTS)
    check(model.to(torch.bfloat16).float(), TEXTS)
