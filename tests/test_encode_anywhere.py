"""`encode` among threads and processes, its errors and interrupts, and the models that it leaves to the original."""

from __future__ import annotations

import multiprocessing
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from backends import BACKEND
from encode_cases import FUSED, KINDS, PROMPTS, TEXTS, check, needs_fused, needs_native, ran
from process_settings import threads
from sentence_transformers import SentenceTransformer, models
from tiny_models import HIDDEN, VERSION, build, texts

import sentfast
from sentfast import registry

pytestmark = pytest.mark.usefixtures("switched_on")

# ---- the same bits, whatever is around a text ------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("kind", [*KINDS, "gelu"])
def test_bits_do_not_depend_on_the_batch(makers, paths, kind):
    if kind == "gelu":
        model = build(paths["bert"], models.Dense(HIDDEN, 21, activation_function=torch.nn.GELU()), models.Normalize())
    else:
        model = makers[kind]()
    expected = model.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    with ran("encoder"):
        for number in (1, 2, 3):
            with threads(number):
                assert np.array_equal(model.encode([TEXTS[i] for i in order])[np.argsort(order)], expected)
                for batch_size in (1, 2, 7):
                    assert np.array_equal(model.encode(TEXTS, batch_size=batch_size), expected)
                for text, row in zip(TEXTS, expected, strict=True):
                    assert np.array_equal(model.encode(text), row)
                assert np.array_equal(model.encode(texts(50, seed=9) + TEXTS)[50:], expected)


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
    start = threading.Barrier(2)

    def work(model):
        start.wait()
        with registry.use_backend(BACKEND):
            return [bits(model) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, pair)) == [[one] * 10 for one in expected]


def _child(queue, model, backend):
    with registry.use_backend(backend):
        queue.put(bits(model))


@pytest.mark.parametrize("method", ["fork"])
def test_process_after_use(makers, method):
    with threads(1):  # PyTorch's own threads do not outlive a fork
        model = makers["bert"]()
        expected = bits(model)
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=_child, args=(queue, model, BACKEND))
        process.start()
        process.join(100)
        assert process.exitcode == 0
        assert queue.get() == expected


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
    with threads(1):  # as in the workers
        expected = [model.encode(TEXTS[i : i + 3]) for i in range(6)]
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
    with sentfast.disabled():
        stock = model.encode(TEXTS, prompt_name="query")
    expected = model.encode(TEXTS, prompt_name="query")
    assert not np.array_equal(stock, expected)  # the bits below tell that the workers ran accelerated
    sentfast.accelerate(model)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    workers = list(pool["processes"])
    try:
        assert len(workers) == 2
        assert np.array_equal(model.encode(TEXTS, prompt_name="query", pool=pool, chunk_size=4), expected)
        assert np.array_equal(model.encode_multi_process(TEXTS, pool, prompt_name="query", chunk_size=9), expected)
        tokens = model.encode(TEXTS[:3], pool=pool, output_value="token_embeddings")
        torch.testing.assert_close(tokens, model.encode(TEXTS[:3], output_value="token_embeddings"))
        if FUSED:  # 5.1 waits for ever
            with pytest.raises(ValueError, match="Unsupported input type: int"):
                model.encode(["a", 3], pool=pool)
    finally:
        model.stop_multi_process_pool(pool)
    assert not multiprocessing.active_children()


def test_list_of_devices(makers, backend_of_workers):
    model = makers["bert"]()
    result = model.encode(TEXTS, device=["cpu", "cpu"], convert_to_tensor=True, chunk_size=5)
    assert torch.equal(result, model.encode(TEXTS, convert_to_tensor=True))
    assert not multiprocessing.active_children()


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
    model.encode("before the first one, the encoder is tried")
    owner, name = (Tokenizer, "_tokens") if place == "tokenizer" else (Encoder, "run")
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


EVERY_ROW = {"product", "bias_activation", "dropout_add_layer_norm"}  # the steps where hidden rows are read


class _Forward(SentenceTransformer):
    """It might read hidden rows."""

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
    encoder = EVERY_ROW if cls is _Forward else {"encoder"}
    check(model, TEXTS, codes={"SF110"} if FUSED else set(), fused=False, encoder=encoder)
    rows = model.encode(TEXTS)
    assert (rows == (7 if cls is _Forward else rows[0])).all()


def test_overridden_encode_runs(paths):
    assert build(paths["bert"], cls=_Encode).encode(TEXTS) == "mine"


def disturb_hook(model):
    """On the Pooling, it may read all that goes in."""
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


def disturb_quantise(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model[0].auto_model, {torch.nn.Linear}, torch.qint8, inplace=True)


@needs_fused
@pytest.mark.parametrize(
    ("disturb", "codes", "operators"),
    [
        (disturb_hook, {"SF120"}, {*EVERY_ROW, "pool"}),
        (disturb_instance, {"SF110"}, {*EVERY_ROW, "pool"}),
        (disturb_restore, {"SF118"}, {"pool"}),
        (disturb_dtype, {"SF102"}, set()),
        (disturb_quantise, {"SF108"}, {"pool"}),
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


@needs_fused
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_adapters_of_a_wrapped_model(makers, kind):
    """LoRA as peft wraps a base model: the encoder runs inside the wrapper, and once unloaded for all of `encode`."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = makers[kind]()
    before = model.encode(TEXTS)
    config = peft.LoraConfig(target_modules=["query", "q", "intermediate.dense"], r=4, init_lora_weights=False)
    wrapped = model[0].model = peft.get_peft_model(model[0].auto_model, config)
    for change in (lambda: None, wrapped.merge_adapter, wrapped.unmerge_adapter):
        change()
        with sentfast.disabled():
            eager = model.encode(TEXTS)
        sentfast.report(reset=True)
        np.testing.assert_allclose(model.encode(TEXTS), eager, atol=1e-5)
        report = sentfast.report()
        assert {"encoder", "pool"} <= {name for name, _ in report.calls}
        assert {code for _, code in report.fallbacks} == {"SF123"}
        assert np.abs(eager - before).max() > 1e-3
    model[0].model = wrapped.merge_and_unload()
    check(model, TEXTS)
    assert np.abs(model.encode(TEXTS) - eager).max() < 1e-4


@needs_fused
def test_adapters_of_the_model_itself(makers):
    """LoRA as ``add_adapter`` puts it into the layers of a model, switched off and on and taken out again."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = makers["bert"]()
    check(model, TEXTS)
    before = model.encode(TEXTS)
    model.add_adapter(peft.LoraConfig(target_modules=["query", "intermediate.dense"], r=4, init_lora_weights=False))
    model.eval()
    for on in (True, False, True):
        (model.enable_adapters if on else model.disable_adapters)()
        check(model, TEXTS)
        assert (np.abs(model.encode(TEXTS) - before).max() > 1e-3) == on
    model.delete_adapter("default")  # leaves the layers of the adapter where they are
    check(model, TEXTS)
