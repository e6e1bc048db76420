"""Rows that the attention mask hides: whoever reads them gets the original's numbers, and where nobody does, zeros."""

from __future__ import annotations

import copy
import random

import encoders
import pytest
import torch
from accuracy import assert_accurate
from sentence_transformers import SentenceTransformer, models
from tiny_models import HIDDEN, VERSION, build, pooling, texts

import sentfast
from sentfast.integrations import hidden_rows

pytestmark = [pytest.mark.filterwarnings("ignore")]
needs_multi_vector = pytest.mark.skipif(VERSION < (6, 2), reason="MultiVectorEncoder came later")


@pytest.fixture
def draw() -> random.Random:
    return random.Random(int(torch.randint(2**31, ())))


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings(), torch.enable_grad():
        yield


def three(call, model, reads):
    """What `reads` makes of the call by ours, stock and stock in float64."""
    sentfast.report(reset=True)
    ours = reads(call(model))
    report = sentfast.report()
    with sentfast.disabled():
        return report, ours, reads(call(model)), reads(call(copy.deepcopy(model).double()))


def same(call, model, reads, size=1.0):
    report, ours, eager, exact = three(call, model, reads)
    assert ours.dtype == eager.dtype and ours.requires_grad == eager.requires_grad
    assert_accurate(ours.detach(), eager, exact, size=size)
    return report


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_second_derivatives_of_eager_attention(kind: str, draw: random.Random) -> None:
    options = {} if kind == "mpnet" else {"attn_implementation": "eager"}
    made = encoders.model(kind, *encoders.drawn_size(), **options, **NO_DROPOUT).train()
    sentfast.accelerate(made, padded_rows="exact")
    inputs = drawn_batch(draw, kind)

    def second(output):
        loss = output[0].square().sum()
        parameters = [p for p in made.parameters() if p.ndim == 2]
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first if x is not None), parameters[0])[0]

    ours = second(made(**inputs))
    with sentfast.disabled():
        stock = second(made(**inputs))
    torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-3 * stock.abs().max().item())


# ---- plain models of transformers ----

# By the names of all architectures: what drops cannot be compared.
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)


def drawn_batch(draw: random.Random, model_type: str) -> dict[str, torch.Tensor]:
    longest = draw.randint(2, 40)
    # The windows of the small ModernBERT reach 4 tokens far.
    shortest = max(1, longest - 4) if model_type == "modernbert" else 1
    lengths = [draw.randint(shortest, longest) for _ in range(draw.randint(1, 5))]
    batch = encoders.batch([longest, *lengths, shortest])
    if model_type in encoders.WITH_TOKEN_TYPES and draw.random() < 0.5:
        batch["token_type_ids"] = torch.randint(0, 2, batch["input_ids"].shape)
    return batch


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_exact_rows_of_a_plain_model(model_type, draw):
    hidden, heads = encoders.drawn_size()
    implementations = ["sdpa", "eager"] if encoders.class_of(model_type)._supports_sdpa else ["eager"]
    options = {} if model_type == "mpnet" else {"attn_implementation": draw.choice(implementations)}
    made = encoders.model(model_type, hidden, heads, **options, **NO_DROPOUT)
    model = sentfast.accelerate(made, padded_rows="exact").train(draw.random() < 0.5)
    batch = drawn_batch(draw, model_type)
    with torch.set_grad_enabled(draw.random() < 0.5):
        report = same(lambda model: model(**batch), model, lambda output: output[0], size=4 * hidden**0.5)
        state = torch.get_rng_state()
        model(**batch)
    assert torch.equal(torch.get_rng_state(), state), "a random number was drawn where nothing drops"
    assert not report.fallbacks and ("dropout_add_layer_norm", encoders.BACKEND) in report.calls, report


@pytest.mark.parametrize("model_type", ["roberta", "mpnet", "modernbert"])
def test_exact_rows_as_on_a_gpu(model_type, draw, on_cpu):
    model = sentfast.accelerate(encoders.model(model_type), padded_rows="exact")
    batch = drawn_batch(draw, model_type)
    with torch.no_grad():
        report = same(lambda model: model(**batch), model, lambda output: output[0], size=24.0)
    assert not report.fallbacks and ("dropout_add_layer_norm", encoders.BACKEND) in report.calls, report


def test_forms_of_a_call_agree(draw):
    """As transformers' own tests compare them: tuple against object, embeddings against ids."""
    model = sentfast.accelerate(encoders.model("bert"), padded_rows="exact").eval()
    batch = drawn_batch(draw, "distilbert")
    with torch.no_grad():
        result = model(**batch)
        as_tuple = model(**batch, return_dict=False)
        ids = batch.pop("input_ids")
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), **batch)
    assert torch.equal(result[0], as_tuple[0]) and torch.equal(result.pooler_output, as_tuple[1])
    torch.testing.assert_close(result[0], embedded[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_zeros_are_not_written_where_the_original_runs(model_type, draw):
    model, batch = sentfast.accelerate(encoders.model(model_type), padded_rows="zeros"), encoders.batch([7, 2])
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), "input_ids": None}
    with torch.no_grad():
        with encoders.ran(f"{type(model).__name__}.forward", "SF107"):
            result = model(**embedded)[0]
        torch.testing.assert_close(result, encoders.stock(model, **embedded)[0], atol=0, rtol=0)
        assert result[batch["attention_mask"] == 0].any()
        assert not model(**batch)[0][batch["attention_mask"] == 0].any()


def test_a_window_that_sees_no_token_runs_the_original(draw):
    model = sentfast.accelerate(encoders.model("modernbert"), padded_rows="exact").eval()
    batch = encoders.batch([draw.randint(8, 30), 1])
    with torch.no_grad():
        sentfast.report(reset=True)
        result = model(**batch)[0]
        assert sentfast.report().fallbacks == {("ModernBertModel.forward", "SF130"): 1}
        assert torch.equal(result, encoders.stock(model, **batch)[0])


@pytest.mark.parametrize("said", [None, "zeros"])
def test_zeros_are_told_once_unless_asked_for(said, draw, recwarn, monkeypatch):
    monkeypatch.setattr(hidden_rows, "_warned", False)
    model = sentfast.accelerate(encoders.model("bert"), padded_rows=said).eval()
    full, padded = encoders.batch([draw.randint(2, 9)] * 2), encoders.batch([draw.randint(2, 9), 1])
    sentfast.report(reset=True)

    def told():
        return [str(w.message) for w in recwarn.list if w.category is sentfast.SentfastWarning]

    with torch.no_grad():
        model(**full)
        assert not told()
        for _ in range(2):
            result = model(**padded)[0]
    assert len(told()) == (0 if said else 1)
    assert not told() or "padded_rows" in told()[0]
    assert not result[padded["attention_mask"] == 0].any()


def test_another_word_is_an_error():
    with pytest.raises(ValueError, match="padded_rows: expected one of .* got 'ones'"):
        sentfast.accelerate(encoders.model("bert"), padded_rows="ones")


def test_base_model_that_nobody_accelerated_by_name(path, draw):
    """The model around it has let it run packed."""
    model = build(path)
    features = model.tokenize(texts(9, draw.randrange(1000)))
    model(dict(features))
    inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
    base = model[0].auto_model
    same(lambda base: base(**inputs), base, lambda output: output[0])
    sentfast.accelerate(model, padded_rows="zeros")
    hidden = base(**inputs)[0][features["attention_mask"] == 0]
    assert len(hidden) and not hidden.any()
    same(lambda model: model[0](dict(features)), model, lambda output: output["token_embeddings"])


# ---- models of sentence-transformers ----


class Neighbours(torch.nn.Module):
    """A module as a user writes it, that mixes a row with the one before it."""

    def forward(self, features):
        x = features["token_embeddings"]
        features["token_embeddings"] = x + x.roll(1, dims=1)
        return features


class AfterPooling(torch.nn.Module):
    def forward(self, features):
        features["sentence_embedding"] = features["sentence_embedding"] + features["token_embeddings"].sum(1)
        return features


class OwnPooling(models.Pooling):
    def forward(self, features):
        features["sentence_embedding"] = features["token_embeddings"].mean(1)
        return features


def dense(activation):
    made = models.Dense(HIDDEN, HIDDEN, activation_function=activation)
    made.module_input_name = made.module_output_name = "token_embeddings"
    return made


READERS = {
    "cnn": lambda draw: [models.CNN(HIDDEN, HIDDEN // 2, kernel_sizes=[1, draw.choice([3, 5])])],
    "own": lambda draw: [Neighbours()],
}
if VERSION >= (6, 2):
    READERS["softmax over the rows"] = lambda draw: [dense(torch.nn.Softmax(dim=1))]


def with_modules(path, modules, modes=("mean",)):
    torch.manual_seed(1)
    return SentenceTransformer(modules=[models.Transformer(path), *modules, pooling(modes)], device="cpu").eval()


def strings(draw: random.Random) -> list[str]:
    return [*texts(draw.randint(2, 12), draw.randrange(1000)), "the weather", "a" * 20]


def embedding(features):
    return features["sentence_embedding"]


@pytest.mark.parametrize("kind", READERS)
def test_modules_that_read_them(path, kind, draw):
    model, inputs = with_modules(path, READERS[kind](draw)), strings(draw)
    same(lambda model: model(model.tokenize(inputs)), model, embedding)
    same(lambda model: torch.from_numpy(model.encode(inputs)), model, lambda x: x)


def test_modules_that_read_them_get_their_gradient(path, draw):
    model, inputs = with_modules(path, [Neighbours()]).train(), strings(draw)

    def gradient(model):
        model.zero_grad()
        model(model.tokenize(inputs))["sentence_embedding"].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    same(gradient, model, lambda x: x, size=100.0)


@pytest.mark.parametrize("module", [AfterPooling, OwnPooling])
def test_own_modules_at_the_end(path, module, draw):
    last = AfterPooling() if module is AfterPooling else OwnPooling(HIDDEN)
    model = build(path, last) if module is AfterPooling else with_modules(path, [])
    if module is OwnPooling:
        model[1] = last
    inputs = strings(draw)
    same(lambda model: model(model.tokenize(inputs)), model, embedding, size=100.0)


def listener(model, where, seen):
    hooked = {
        "model": lambda: model,
        "transformer": lambda: model[0],
        "base": lambda: model[0].auto_model,
        "pooler": lambda: model[0].auto_model.pooler,
        "pooling": lambda: model[1],
    }[where]()

    def before(module, arguments):
        x = arguments[0]
        if isinstance(x, torch.Tensor) or "token_embeddings" in x:
            seen.append(x if isinstance(x, torch.Tensor) else x["token_embeddings"])

    def after(module, arguments, output):
        seen.append(output[0] if where == "base" else output["token_embeddings"])

    return hooked.register_forward_pre_hook(before) if where == "pooler" else hooked.register_forward_hook(after)


# From 5.4 on the base model's ``forward`` is called without its hooks.
WHERE = ["model", "transformer", "pooler", "pooling"] + (["base"] if VERSION < (5, 4) else [])


@pytest.mark.parametrize("where", WHERE)
def test_hooks_see_them(path, where, draw):
    model, inputs, seen = build(path), strings(draw), []
    model(model.tokenize(inputs))
    listener(model, where, seen)
    same(lambda model: model(model.tokenize(inputs)), model, lambda features: seen[-1])


@pytest.mark.parametrize("output_value", [None, "token_embeddings"])
def test_encode_returns_them(path, output_value, draw):
    model, inputs = build(path), strings(draw)
    found = model.encode(inputs, output_value=output_value)
    with sentfast.disabled():
        stock = model.encode(inputs, output_value=output_value)
    for ours, theirs in zip(found, stock, strict=True):
        if output_value is None:
            assert ours.keys() == theirs.keys()
            ours, theirs = ours["token_embeddings"], theirs["token_embeddings"]
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_nobody_reads_them_in_ordinary_models(path, draw):
    """So they are not computed."""
    tail = draw.choice([[], [models.Normalize()], [models.Dense(HIDDEN, 8)]])
    model = build(path, *tail)
    features = model.tokenize(["the weather", "a"])
    sentfast.report(reset=True)
    hidden = model(features)["token_embeddings"][features["attention_mask"] == 0]
    assert len(hidden) and not hidden.any()
    assert not sentfast.report().fallbacks


def test_routes(path, draw):
    """A route that leaves the rows to the Pooling behind it, one that has its own, and one that reads them."""
    leaving, reading = [models.Transformer(path), pooling()], [models.Transformer(path), Neighbours()]
    shared = draw.random() < 0.5
    for query, read in ((leaving[: 2 - shared], False), (reading if shared else [*reading, pooling()], True)):
        routes = {"query": query, "document": leaving[: 2 - shared]}
        modules = [models.Router(routes, default_route="document"), *([pooling()] if shared else [models.Normalize()])]
        model = SentenceTransformer(modules=modules, device="cpu").eval()
        features = model.tokenize(["the weather", "a"])
        hidden = model(features, task="document")["token_embeddings"][features["attention_mask"] == 0]
        assert len(hidden) and bool(hidden.any()) == read


# ---- query expansion ----


def multi_vector(path, draw, expansion):
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(draw.randrange(1000))
    tokens = "token_embeddings"
    last = Dense(HIDDEN, 16, bias=False, activation_function=None, module_input_name=tokens)
    body = Transformer(path, query_expansion=expansion)
    modules = [body, last, Normalize(module_input_name=tokens), MultiVectorMask()]
    return MultiVectorEncoder(modules=modules, device="cpu").eval()


@needs_multi_vector
@pytest.mark.parametrize("strategy", ["fixed", "min"])
@pytest.mark.parametrize("attend", [False, True])
def test_query_expansion(path, strategy, attend, draw):
    expansion = {"strategy": strategy, "attend": attend, "length": draw.randint(8, 32)}
    model = multi_vector(path, draw, expansion)
    queries, documents = ["the weather", "a query", *texts(4, draw.randrange(1000))], strings(draw)

    def scores(model):
        return model.similarity(model.encode_query(queries), model.encode_document(documents))

    same(scores, model, lambda x: x, size=float(expansion["length"]))
    report = same(lambda model: torch.cat(model.encode_query(queries)), model, lambda x: x)
    assert not report.fallbacks, report


@needs_multi_vector
def test_query_expansion_in_training(path, draw):
    model = multi_vector(path, draw, {"strategy": "fixed", "length": draw.randint(8, 32)}).train()
    from sentence_transformers.multi_vector_encoder import losses

    loss_of = losses.MultiVectorMultipleNegativesRankingLoss

    def gradient(model):
        features = [
            {**model.preprocess(["the weather", "a", "query"], task="query"), "task": "query"},
            {**model.preprocess(["b c d", "in the", "e"], task="document"), "task": "document"},
        ]
        model.zero_grad()
        loss_of(model)(features, None).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    same(gradient, model, lambda x: x, size=10.0)
