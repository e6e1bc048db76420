"""sentence-transformers with sentfast switched on gives the results of sentence-transformers, from our operators."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import sentence_transformers as st
import tokenizers
import torch
import transformers
from backends import BACKEND
from sentence_transformers import SentenceTransformer, losses, models, util
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator, InformationRetrievalEvaluator

import sentfast

VERSION = tuple(int(part) for part in st.__version__.split(".")[:2])
NEW = VERSION >= (6, 2)
ONE_FLAG_PER_MODE = VERSION < (5, 4)
# Modes whose result with left padding differs from our operator's.
if ONE_FLAG_PER_MODE:
    FIRST_COLUMN = {"cls", "max", "weightedmean"}
else:
    FIRST_COLUMN = set() if NEW else {"cls", "weightedmean"} if VERSION < (6, 0) else {"weightedmean"}
pytestmark = pytest.mark.usefixtures("switched_on")
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [f"w{i}" for i in range(60)] + ["query", "passage", ":"]
MODES = ["mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]
TEXTS = [" ".join(WORDS[(7 * i + 3 * j) % 60] for j in range(1 + (5 * i) % 13)) for i in range(12)]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def test_the_version_under_test_is_the_one_asked_for() -> None:
    assert st.__version__.startswith(os.environ.get("SENTFAST_TEST_ST", ""))


@contextmanager
def ran(*names: str, codes: dict[str, str] | None = None):
    """The block calls these operators on the expected backend, and falls back as `codes` (function -> code) says."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    for name in names:
        assert report.calls.get((name, BACKEND), 0) > 0, f"{name} did not run on {BACKEND}\n{report}"
    assert {backend for _, backend in report.calls} <= {BACKEND}, str(report)
    assert dict(report.fallbacks.keys()) == (codes or {}), str(report)


def assert_close(result, eager, exact, dtype=None):
    """At most twice the error of the original, plus some rounding errors of the dtype."""
    result, eager, exact = (torch.as_tensor(x).detach() for x in (result, eager, exact))
    assert result.dtype == eager.dtype and result.shape == eager.shape and result.device == eager.device
    eps = EPS[dtype or result.dtype]
    error = (result.double() - exact.double()).abs().max().item()
    error_of_eager = (eager.double() - exact.double()).abs().max().item()
    bound = 2 * error_of_eager + 4 * eps * exact.abs().max().item()
    assert error <= bound, f"error {error:.2e}, original {error_of_eager:.2e}, bound {bound:.2e}"


def save_encoder(folder, kind: str) -> str:
    vocabulary = {token: number for number, token in enumerate(SPECIAL + WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=48,
    )
    sizes = dict(
        vocab_size=len(vocabulary),
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    config, cls = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    }[kind]
    torch.manual_seed(0)
    path = str(folder / kind)
    cls(config(**sizes)).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: save_encoder(folder, kind) for kind in ("bert", "mpnet")}


def pooling(modes, include_prompt=True, dimension=40):
    modes = [modes] if isinstance(modes, str) else list(modes)
    if VERSION >= (5, 4):
        return models.Pooling(dimension, pooling_mode=tuple(modes), include_prompt=include_prompt)
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    names |= {"weightedmean": "weightedmean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
    flags = {f"pooling_mode_{name}": mode in modes for mode, name in names.items()}
    return models.Pooling(dimension, include_prompt=include_prompt, **flags)


def build(encoders, modes="mean", *, kind="bert", normalize=True, dense=False, include_prompt=True, **kwargs):
    torch.manual_seed(1)
    parts = [models.Transformer(encoders[kind], max_seq_length=32), pooling(modes, include_prompt)]
    if dense:
        parts.append(models.Dense(parts[1].pooling_output_dimension, 24))
    if normalize:
        parts.append(models.Normalize())
    return SentenceTransformer(modules=parts, device="cpu", **kwargs).eval()


# What encode runs: since 6.2 pooling and what follows it are part of the encoder's operator.
ENCODE = ("encoder",) if NEW else ("encoder", "pool", "l2_normalize")
LOOP = {"SentenceTransformer._inference": "SF104"} if NEW else {}


def check_encode(model, *expected, codes=None, **kwargs):
    kwargs = {"convert_to_tensor": True, "batch_size": 5, "show_progress_bar": False, **kwargs}
    with sentfast.disabled():
        eager = model.encode(TEXTS, **kwargs)
        exact = copy.deepcopy(model).double().encode(TEXTS, **kwargs)
    with ran(*expected, codes=codes):
        result = model.encode(TEXTS, **kwargs)
    assert_close(result, eager, exact)


# 5.1 in float16: `max` fills with -1e9, which is infinite there, and makes the modes that follow NaN.
@pytest.mark.parametrize(
    ("modes", "dtype"),
    [
        *((modes, torch.float32) for modes in (*MODES, ("mean", "max"), tuple(MODES))),
        *((modes, torch.bfloat16) for modes in (*MODES, tuple(MODES))),
        ("mean", torch.float16),
    ],
    ids=str,
)
def test_encode(encoders, modes, dtype):
    model = build(encoders, modes).to(dtype)
    if modes == "cls" and ONE_FLAG_PER_MODE:
        check_encode(model, "encoder", "l2_normalize", codes={"Pooling.forward": "SF117"})
    else:
        check_encode(model, *ENCODE)


@pytest.mark.parametrize("options", [{"kind": "mpnet"}, {"dense": True}, {"normalize": False}], ids=str)
def test_encode_other_models(encoders, options):
    names = [name for name in ENCODE if name != "l2_normalize" or options.get("normalize", True)]
    check_encode(build(encoders, "mean", **options), *names)


def test_encode_to_other_types(encoders):
    model = build(encoders)
    with sentfast.disabled():
        eager = [model.encode(TEXTS[0]), model.encode(TEXTS), model.encode(TEXTS, convert_to_numpy=False)]
    with ran(*ENCODE):
        result = [model.encode(TEXTS[0]), model.encode(TEXTS), model.encode(TEXTS, convert_to_numpy=False)]
    assert [type(x) for x in result] == [type(x) for x in eager]
    np.testing.assert_allclose(result[0], eager[0], atol=1e-6)
    np.testing.assert_allclose(result[1], eager[1], atol=1e-6)
    torch.testing.assert_close(torch.stack(result[2]), torch.stack(eager[2]))
    assert model.encode([]).shape == (0,) or len(model.encode([])) == 0


@pytest.mark.parametrize("modes", MODES)
def test_prompt_excluded(encoders, modes):
    model = build(encoders, modes, include_prompt=False, prompts={"query": "query : "})
    if NEW:
        check_encode(model, "encoder", prompt_name="query")
    else:
        code = "SF117" if modes == "cls" and ONE_FLAG_PER_MODE else "SF109"
        check_encode(model, "encoder", "l2_normalize", codes={"Pooling.forward": code}, prompt_name="query")


@pytest.mark.parametrize("modes", [*MODES, tuple(MODES)], ids=str)
def test_left_padding(encoders, modes):
    model = build(encoders, modes)
    model.tokenizer.padding_side = "left"
    codes = {**LOOP, "BertModel.forward": "SF104"}
    if not FIRST_COLUMN.intersection([modes] if isinstance(modes, str) else modes):
        check_encode(model, "pool", codes=codes)
    else:
        code = "SF117" if modes == "cls" and ONE_FLAG_PER_MODE else "SF109"
        check_encode(model, codes={**codes, "Pooling.forward": code})


@pytest.mark.parametrize("modes", [*MODES, tuple(MODES)], ids=str)
def test_rows_without_tokens(modes):
    """An empty row and a row shorter than the prompt, as the installed version treats them."""
    module = pooling(modes, include_prompt=False, dimension=8)
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    for prompt in ({}, {"prompt_length": 3}):
        with sentfast.disabled():
            eager = module({"token_embeddings": x.clone(), "attention_mask": mask.clone(), **prompt})
        result = module({"token_embeddings": x.clone(), "attention_mask": mask.clone(), **prompt})
        torch.testing.assert_close(result["sentence_embedding"], eager["sentence_embedding"])
        assert torch.equal(result["attention_mask"], eager["attention_mask"])


def operands(dtype, n=7, m=5, d=33):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, m)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("metric", "name"), [("cosine", "cosine_similarity"), ("dot", "dot_similarity")])
def test_similarity(encoders, metric, name, dtype):
    model = build(encoders, similarity_fn_name=metric)
    a, b = operands(dtype)
    with sentfast.disabled():
        eager, exact = model.similarity(a, b), model.similarity(a.double(), b.double())
    with ran(name):
        result = model.similarity(a, b)
    assert_close(result, eager, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_pairwise(encoders, metric, dtype):
    model = build(encoders, similarity_fn_name=metric)
    a, b = operands(dtype, m=7)
    with sentfast.disabled():
        eager, exact = model.similarity_pairwise(a, b), model.similarity_pairwise(a.double(), b.double())
    with ran("pairwise_similarity"):
        result = model.similarity_pairwise(a, b)
    assert_close(result, eager, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pairwise_angle(dtype):
    a, b = operands(dtype, m=7, d=34)
    with sentfast.disabled():
        eager, exact = util.pairwise_angle_sim(a, b), util.pairwise_angle_sim(a.double(), b.double())
    with ran("pairwise_similarity") if NEW else ran(codes={"pairwise_angle_sim": "SF109"}):
        result = util.pairwise_angle_sim(a, b)
    assert_close(result, eager, exact, dtype)


def forms():
    a, b = operands(torch.float32)
    return {
        "numpy": (a.numpy(), b.numpy()),
        "list of lists": (a.tolist(), b.tolist()),
        "list of arrays": (list(a.numpy()), list(b.numpy())),
        "one vector": (a[0], b),
        "one vector as list": (a[0].tolist(), b[0].tolist()),
        "strided": (a[::2, 1:], b.t().contiguous().t()[:, 1:]),
    }


@pytest.mark.parametrize("form", forms())
def test_similarity_of_other_forms(form):
    a, b = forms()[form]
    with sentfast.disabled():
        eager = util.cos_sim(a, b), util.dot_score(a, b)
    with ran("cosine_similarity", "dot_similarity"):
        result = util.cos_sim(a, b), util.dot_score(a, b)
    torch.testing.assert_close(result, eager, atol=1e-5, rtol=1e-5)


def training_gradients(model, loss, labels):
    features = [{**model.tokenize(TEXTS[i : i + 4])} for i in (0, 4)]
    model.zero_grad()
    value = loss(features, labels)
    value.backward()
    return torch.cat([value.detach().reshape(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("modes", ["mean", tuple(MODES)], ids=str)
@pytest.mark.parametrize("loss", ["MultipleNegativesRankingLoss", "CosineSimilarityLoss"])
def test_training_step(encoders, loss, modes):
    model = build(encoders, modes).train()
    labels = torch.tensor([0.1, 0.9, 0.4, 0.6]) if loss == "CosineSimilarityLoss" else None
    cls = getattr(losses, loss)
    with sentfast.disabled():
        eager = training_gradients(model, cls(model), labels)
        exact_model = copy.deepcopy(model).double()
        exact = training_gradients(exact_model, cls(exact_model), labels if labels is None else labels.double())
    scores = "contrastive_loss" if loss == "MultipleNegativesRankingLoss" else None
    names = ["pool", "pool_backward", "l2_normalize", "l2_normalize_backward", *([scores] if scores else [])]
    encoder = ("varlen_attention", "dropout_add_layer_norm", "bias_activation")
    with ran(*names, *encoder, *(f"{name}_backward" for name in encoder)):
        result = training_gradients(model, cls(model), labels)
    assert_close(result, eager, exact)


def test_search_and_mining(encoders):
    model = build(encoders)
    corpus, queries = operands(torch.float32, n=60, m=6)
    with sentfast.disabled():
        hits = util.semantic_search(queries, corpus, top_k=5)
        pairs = util.paraphrase_mining(model, TEXTS)
    with ran("search_topk"):
        ours = util.semantic_search(queries, corpus, top_k=5)
    with ran(*ENCODE):
        our_pairs = util.paraphrase_mining(model, TEXTS)
    assert [[hit["corpus_id"] for hit in row] for row in ours] == [[hit["corpus_id"] for hit in row] for row in hits]
    scores = [[hit["score"] for hit in row] for row in ours]
    np.testing.assert_allclose(scores, [[hit["score"] for hit in row] for row in hits], atol=1e-6)
    assert [pair[1:] for pair in our_pairs] == [pair[1:] for pair in pairs]
    np.testing.assert_allclose([pair[0] for pair in our_pairs], [pair[0] for pair in pairs], atol=1e-6)


def test_evaluators(encoders):
    model = build(encoders)
    similarity = EmbeddingSimilarityEvaluator(TEXTS[:6], TEXTS[6:], [0.1, 0.9, 0.3, 0.5, 0.2, 0.7], name="s")
    corpus = {str(i): text for i, text in enumerate(TEXTS)}
    queries = {"a": TEXTS[3] + " w1", "b": TEXTS[9]}
    retrieval = InformationRetrievalEvaluator(queries, corpus, {"a": {"3"}, "b": {"9", "2"}}, name="r")
    with sentfast.disabled():
        eager = {**similarity(model), **retrieval(model)}
    with ran(*ENCODE, "pairwise_similarity", "search_topk"):
        result = {**similarity(model), **retrieval(model)}
    assert result.keys() == eager.keys()
    np.testing.assert_allclose(list(result.values()), list(eager.values()), atol=1e-6)


class Tagged(torch.Tensor):
    pass


def refused_similarities():
    a, b = operands(torch.float32)
    return {
        "float64": ("SF102", a.double(), b.double()),
        "integer": ("SF102", a.long(), b.long()),
        "mixed": ("SF102", a, b.double()),
        "sparse": ("SF105", a.to_sparse(), b.to_sparse()),
        "subclass": ("SF107", a.as_subclass(Tagged), b.as_subclass(Tagged)),
        "columns": ("SF107", a, b[:, :5]),
        "empty": ("SF107", a[:0], b),
        "three dimensions": ("SF107", a[None], b[None]),
        "meta": ("SF103", a.to("meta"), b.to("meta")),
    }


@pytest.mark.parametrize("case", refused_similarities())
def test_similarity_left_to_the_original(case):
    code, a, b = refused_similarities()[case]

    def outcome():
        try:
            result = util.cos_sim(a, b)
        except Exception as error:
            return type(error), str(error)
        return type(result), result.dtype, result.device, result.tolist() if result.device.type == "cpu" else ""

    with sentfast.disabled():
        expected = outcome()
    with ran(codes={"cos_sim": code}):
        assert outcome() == expected


def refused_poolings():
    x, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    return {
        "float mask": ("mean", "SF104", {"attention_mask": mask.float()}),
        "mask to broadcast": ("mean", "SF104", {"attention_mask": mask[:1]}),
        "float64": ("mean", "SF102", {"token_embeddings": x.double(), "attention_mask": mask}),
        "weights": ("mean", "SF106", {"attention_mask": mask, "token_weights_sum": torch.ones(2)}),
        "cls": (("cls", "mean"), "SF106", {"attention_mask": mask, "cls_token_embeddings": torch.ones(2, 6)}),
        "subclass": ("mean", "SF107", {"token_embeddings": x.as_subclass(Tagged), "attention_mask": mask}),
        "no mask that fits": ("mean", "SF104", {"attention_mask": None}),
    }


@pytest.mark.parametrize("case", refused_poolings())
def test_pooling_left_to_the_original(case):
    modes, code, features = refused_poolings()[case]
    torch.manual_seed(0)
    features = {"token_embeddings": torch.randn(2, 4, 6), **features}
    module = pooling(modes, dimension=6)

    def outcome():
        try:
            return module(dict(features))["sentence_embedding"].tolist()
        except Exception as error:
            return type(error), str(error)

    with sentfast.disabled():
        expected = outcome()
    with ran(codes={"Pooling.forward": code}):
        assert outcome() == expected


def test_overridden_methods_run(encoders):
    class Doubled(models.Pooling):
        def forward(self, features):
            features = super().forward(features)
            features["sentence_embedding"] = features["sentence_embedding"] * 2
            return features

    features = {"token_embeddings": torch.ones(1, 3, 6), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with ran("pool"):
        assert Doubled(6)(features)["sentence_embedding"].eq(2).all()


def in_vmap(a, b):
    """The result, or the error: some versions of PyTorch have no rule for what the original does."""
    try:
        return torch.func.vmap(util.cos_sim)(a[None], b[None])
    except RuntimeError as error:
        return error


def test_tracing_and_transforms():
    a, b = operands(torch.float32)
    with ran(codes={"cos_sim": "SF115"}):
        traced = torch.jit.trace(util.cos_sim, (a, b), check_trace=False)
        mapped = in_vmap(a, b)
    with sentfast.disabled():
        stock = in_vmap(a, b)
    assert type(mapped) is type(stock)
    if isinstance(stock, torch.Tensor):
        assert torch.equal(mapped, stock)
    torch.testing.assert_close(traced(a, b), util.cos_sim(a, b))


@pytest.mark.skipif(ONE_FLAG_PER_MODE, reason="flattened input since 5.4")
@pytest.mark.parametrize("modes", [*MODES, tuple(MODES)], ids=str)
def test_flattened_input(modes):
    module = pooling(modes, include_prompt=False, dimension=8)
    torch.manual_seed(0)
    features = {"token_embeddings": torch.randn(1, 9, 8), "cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
    for prompt in ({}, {"prompt_length": 2}) if NEW else ({},):
        with sentfast.disabled():
            eager = module({**features, **prompt})["sentence_embedding"]
        with ran("pool"):
            result = module({**features, **prompt})["sentence_embedding"]
        torch.testing.assert_close(result, eager)
    wide = {**features, "cu_seq_lens_q": features["cu_seq_lens_q"].long()}
    with ran(codes={"Pooling.forward": "SF104"}):
        torch.testing.assert_close(module(wide)["sentence_embedding"], module(features | wide)["sentence_embedding"])
    grad = {**features, "token_embeddings": features["token_embeddings"].requires_grad_()}
    with ran(codes={"Pooling.forward": "SF109"} if "max" in modes else {}):
        module(grad)["sentence_embedding"].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtypes(dtype):
    a, b = operands(dtype)
    modes = ("mean", "weightedmean", "max")
    features = {"token_embeddings": torch.randn(2, 4, 6).to(dtype), "attention_mask": torch.ones(2, 4, dtype=torch.int)}

    def everything():
        return (
            util.cos_sim(a, b),
            util.dot_score(a, b),
            util.pairwise_cos_sim(a[:5], b),
            util.normalize_embeddings(a),
            pooling(modes, dimension=6)(dict(features))["sentence_embedding"],
        )

    with torch.autocast("cpu", torch.bfloat16):
        with sentfast.disabled():
            eager = everything()
        with ran("cosine_similarity", "dot_similarity", "pairwise_similarity", "l2_normalize", "pool"):
            result = everything()
    assert [x.dtype for x in result] == [x.dtype for x in eager]
    torch.testing.assert_close(result, eager, atol=0.1, rtol=0.05)


def test_compile(monkeypatch):
    a, b = (x.requires_grad_() for x in operands(torch.float32, m=7))
    module = pooling("mean", dimension=33)
    x, mask = torch.randn(3, 5, 33), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    seen = set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def scores(x, mask):
        pooled = module({"token_embeddings": x, "attention_mask": mask})["sentence_embedding"]
        return util.cos_sim(pooled, x[0]), util.pairwise_dot_score(x[0], x[1]), util.normalize_embeddings(pooled)

    def loss(a, b):
        return util.cos_sim(a, b).square().sum()

    torch._dynamo.reset()
    warned = []
    monkeypatch.setattr(torch._dynamo.utils, "warn_once", warned.append)
    expected = scores(x, mask)
    torch.testing.assert_close(torch.compile(scores, fullgraph=True, backend=backend)(x, mask), expected)
    assert not warned
    if BACKEND == "cpu":
        for name in ("pool", "cosine_similarity", "pairwise_similarity", "l2_normalize"):
            assert f"sentfast.{name}.default" in seen
    gradient = torch.autograd.grad(loss(a, b), (a, b))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b)
    torch.testing.assert_close(torch.autograd.grad(compiled, (a, b)), gradient)


def test_saved_files_are_the_same(encoders, tmp_path):
    model = build(encoders, dense=True)
    model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "on"))
    sentfast.disable()
    model.save_pretrained(str(tmp_path / "off"))
    sentfast.enable()
    on, off = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "on", tmp_path / "off")
    )
    assert on == off and len(on) > 5
    reloaded = SentenceTransformer(str(tmp_path / "on"), device="cpu")
    np.testing.assert_allclose(reloaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


def test_pickles_load_without_sentfast(tmp_path):
    path = tmp_path / "pickle"
    path.write_bytes(pickle.dumps([util.cos_sim, pooling("mean")]))
    code = f"""
import pickle, sys
function, module = pickle.load(open({str(path)!r}, "rb"))
assert not any(name.startswith("sentfast") for name in sys.modules)
assert function([[1.0, 0.0]], [[2.0, 0.0]]).item() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "SENTFAST_DISABLE": "1"})


def test_explain(encoders):
    model = build(encoders, dense=True)
    with ran():
        explanation = sentfast.explain(model)
    rows = [(row["kind"], row["operator"], row["backend"], row["reason"]) for row in explanation.to_dict()["modules"]]
    assert rows == [
        ("Transformer", "encoder", BACKEND, ""),
        ("Pooling", "pool", BACKEND, ""),
        ("Dense", "", "", "SF101"),
        ("Normalize", "l2_normalize", BACKEND, ""),
        ("cos_sim", "cosine_similarity", BACKEND, ""),
    ]
    assert "SF101" in str(explanation) and BACKEND in str(explanation)
    assert {row.reason for row in sentfast.explain(copy.deepcopy(model).double()).rows} == {"SF101", "SF102"}
    with sentfast.disabled():
        assert "switched off" in str(sentfast.explain(model))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        sentfast.explain("model")
