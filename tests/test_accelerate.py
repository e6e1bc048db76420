"""accelerate, restore, and ``model(**batch)``: the outputs of transformers, or its own code with a reason."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from types import SimpleNamespace

import encoders
import pytest
import torch
import transformers
from accuracy import assert_accurate
from encoders import BACKEND, ran, stock
from sentence_transformers import SentenceTransformer, models
from torch import nn

import sentfast
from sentfast import native, switch
from sentfast.encoder import encoder_of, products
from sentfast.integrations import transformers as adapter

LENGTHS = [5, 1, 12]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


def check(model, inputs, *args, **kwargs):
    """The same type and fields as the original; padding is 0, the rest within the rule of accuracy."""
    expected = stock(model, *args, **inputs, **kwargs)
    with ran():
        result = model(*args, **inputs, **kwargs)
    assert type(result) is type(expected)
    if not isinstance(result, tuple):
        assert list(result.keys()) == list(expected.keys())
        result, expected = result.to_tuple(), expected.to_tuple()
    assert [x.shape for x in result] == [x.shape for x in expected]
    assert [x.dtype for x in result] == [x.dtype for x in expected]
    assert not any(x.requires_grad for x in result)
    used = inputs["attention_mask"].bool()
    assert_accurate(result[0][used], expected[0][used], encoders.exact(model, inputs))
    assert not result[0][~used].any()
    for first, second in zip(result[1:], expected[1:], strict=True):
        torch.testing.assert_close(first, second)
    return result


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_outputs(model_type):
    model, inputs = encoders.model(model_type), encoders.batch(LENGTHS)
    assert sentfast.accelerate(model) is model and sentfast.is_accelerated(model)
    check(model, inputs)
    check(model, inputs, return_dict=True)
    result = check(model, inputs, return_dict=False)
    assert len(result) == (2 if hasattr(model, "pooler") else 1)
    check(model, inputs, output_attentions=False, output_hidden_states=None)


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_without_pooler(model_type):
    model, inputs = encoders.model(model_type, pooler=False), encoders.batch(LENGTHS)
    sentfast.accelerate(model)
    check(model, inputs)
    with ran(f"{type(model).__name__}.forward", "SF121"):
        result = model(**inputs, return_dict=False)
    assert len(result) == len(stock(model, **inputs, return_dict=False))


def test_tuple_by_configuration():
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    model.config.return_dict = False
    assert len(check(sentfast.accelerate(model), inputs)) == 2


def test_positional_arguments_and_token_types():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    types = torch.randint(0, 2, inputs["input_ids"].shape)
    expected = stock(model, inputs["input_ids"], inputs["attention_mask"], types).last_hidden_state
    with ran():
        result = model(inputs["input_ids"], inputs["attention_mask"], types).last_hidden_state
    used = inputs["attention_mask"].bool()
    torch.testing.assert_close(result[used], expected[used])


def test_base_model_inside():
    model, inputs = transformers.BertForSequenceClassification(encoders.config("bert")).eval(), encoders.batch(LENGTHS)
    expected = stock(model, **inputs)
    assert sentfast.accelerate(model, "bf16") is model
    computed = "bf16" if native.cpu_loaded() and native.cpu_isa() == "avx512_bf16" else "match"
    assert sentfast.precision_of(model) == sentfast.precision_of(model.bert) == computed
    sentfast.accelerate(model)
    assert sentfast.precision_of(model) == "match" and sentfast.is_accelerated(model.bert)
    with ran():
        result = model(**inputs)
    torch.testing.assert_close(result.logits, expected.logits)


def test_bf16():
    model, inputs = encoders.model("bert", 64, 2), encoders.batch(LENGTHS)
    exact = encoders.exact(model, inputs)
    used = inputs["attention_mask"].bool()
    half = copy.deepcopy(model).bfloat16()(**inputs).last_hidden_state[used]
    sentfast.accelerate(model, precision="bf16")
    with ran():
        result = model(**inputs).last_hidden_state
    assert result.dtype == torch.float32
    assert_accurate(result[used], half, exact)
    before = native.cpu_isa()  # the best tier, which on Intel's processors has no bfloat16
    for isa in native.supported_cpu_isas():
        if isa == "avx512_bf16":
            continue
        sentfast.report(reset=True)
        try:
            native.cpu_isa(isa)
            with pytest.warns(sentfast.SentfastWarning, match=f"{isa}. have no bfloat16 products"):
                sentfast.accelerate(model, "bf16")
            assert sentfast.precision_of(model) == "match"
            (row,) = sentfast.explain(model).rows
            assert row.precision == "fp32" and "bf16 asked for" in str(row)
            with ran():
                plain = model(**inputs).last_hidden_state[used]
        finally:
            native.cpu_isa(before)
        assert_accurate(plain, stock(model, **inputs).last_hidden_state[used], exact)
    assert sentfast.explain(model).rows[0].precision == ("bf16" if products.has_bf16() else "fp32")


def test_arguments():
    with pytest.raises(ValueError, match=r"precision: expected one of \('match', 'bf16'\), got 'int3'"):
        sentfast.accelerate(encoders.model("bert"), "int3")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        sentfast.accelerate("model")
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        sentfast.restore(None)


def test_what_is_not_covered_is_named():
    config = transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=50)
    with pytest.raises(sentfast.UnsupportedModelError, match=r"T5EncoderModel.*covered model types: bert, .*\[SF123\]"):
        sentfast.accelerate(transformers.T5EncoderModel(config))
    with pytest.raises(NotImplementedError, match=r"head size 10 is not a multiple of 8 \[SF125\]"):
        sentfast.accelerate(nn.Sequential(encoders.model("bert", 40, 4)))
    with pytest.raises(NotImplementedError, match=r"Linear cannot be accelerated: there is no transformers model"):
        sentfast.accelerate(nn.Linear(2, 2))


def test_what_is_covered_is_accelerated():
    good, bad = encoders.model("bert"), encoders.model("bert", 40, 4)
    sentfast.report(reset=True)
    with pytest.warns(
        sentfast.SentfastWarning, match=r"not accelerated: bad \(BertModel\): configuration that the enc"
    ):
        sentfast.accelerate(nn.ModuleDict({"good": good, "bad": bad}))
    assert sentfast.is_accelerated(good) and not sentfast.is_accelerated(bad)


# ---- the patched class ----------------------------------------------------------------------------------------------


def test_other_models_of_the_class_are_left_alone():
    model, other, inputs = encoders.model("bert"), encoders.model("bert"), encoders.batch(LENGTHS)
    sentfast.accelerate(model)
    sentfast.report(reset=True)
    other(**inputs)
    assert not sentfast.report().calls and not sentfast.report().fallbacks


def test_the_class_is_restored():
    model, original = encoders.model("electra"), vars(transformers.ElectraModel)["forward"]
    signature = inspect.signature(transformers.ElectraModel.forward)
    for _ in range(3):
        sentfast.accelerate(model)
        patched = vars(transformers.ElectraModel)["forward"]
        assert patched is not original and "ElectraModel.forward" in switch.patched()
        assert inspect.signature(transformers.ElectraModel.forward) == signature
        sentfast.disable()
        assert vars(transformers.ElectraModel)["forward"] is original
        sentfast.enable()
        with ran():
            model(**encoders.batch([3]))
        sentfast.restore(model)
        assert vars(transformers.ElectraModel)["forward"] is original
        assert "ElectraModel.forward" not in switch.patched()


def test_a_second_model_keeps_the_class_patched():
    first, second = sentfast.accelerate(encoders.model("bert")), sentfast.accelerate(encoders.model("bert"))
    sentfast.restore(first)
    with ran():
        second(**encoders.batch([3]))


def test_restore():
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    sentfast.accelerate(model, "bf16")
    assert sentfast.restore(model) is model and not sentfast.is_accelerated(model)
    assert sentfast.precision_of(model) == "match"
    adapter.mark(model)
    sentfast.report(reset=True)
    model(**inputs)
    assert not sentfast.report().calls
    assert encoder_of(model) == "SF118" and sentfast.explain(model).rows[0].reason == "SF118"
    check(sentfast.accelerate(model), inputs)


def test_marked_by_the_drop_in():
    # Without padding: nobody has said that its rows may be 0.
    model, inputs = encoders.model("bert"), encoders.batch([7, 7])
    adapter.mark(model)
    assert not sentfast.is_accelerated(model)
    check(model, inputs)
    adapter.mark(nn.Linear(2, 2))
    assert set(adapter._marked) == {model}


def test_switched_off():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    sentfast.report(reset=True)
    with sentfast.disabled():
        model(**inputs)
    sentfast.disable()
    model(**inputs)
    assert not sentfast.report().calls and not sentfast.report().fallbacks


def test_copies_and_pickles_start_anew():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    model(**inputs)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sentfast.report(reset=True)
        clone(**inputs)
        assert not sentfast.report().calls and not sentfast.is_accelerated(clone)
        check(sentfast.accelerate(clone), inputs)


def test_hooks_on_the_model_itself_run():
    model, inputs, seen = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS), []
    model.register_forward_hook(lambda module, arguments, output: seen.append(output.last_hidden_state.shape))
    with ran():
        model(**inputs)
    assert seen == [(3, 12, 32)] and not sentfast.explain(model).rows[0].reason
    assert encoder_of(model) == "SF120"


def test_threads():
    model, inputs = sentfast.accelerate(encoders.model("mpnet")), encoders.batch(LENGTHS)
    expected, results = model(**inputs).last_hidden_state, []

    def worker():
        with torch.no_grad():
            results.extend(model(**inputs).last_hidden_state for _ in range(5))

    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(result, expected) for result in results)


def test_hooks_that_record_outputs_sleep():
    """transformers leaves them on the layers after the first request for hidden states."""
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    with ran("BertModel.forward", "SF121"):
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    check(model, inputs)


def test_a_gradient_does_not_come_from_packed_weights():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    with torch.enable_grad():
        sentfast.report(reset=True)
        model(**inputs).pooler_output.sum().backward()
        report = sentfast.report()
        assert ("varlen_attention_backward", "cpu") in report.calls and not report.fallbacks
        assert all(parameter.grad is not None for parameter in model.encoder.parameters())
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        check(model, inputs)


def test_training_step_is_seen():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    before = model(**inputs).last_hidden_state
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(**inputs).pooler_output.sum().backward()
    optimiser.step()
    assert (check(model, inputs)[0] - before).abs().max() > 1e-3


# ---- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    encoders.model("bert").save_pretrained(folder)
    return str(folder)


def pipeline(folder):
    parts = [models.Transformer(folder), models.Pooling(32)]
    return SentenceTransformer(modules=parts, device="cpu").eval()


def test_sentence_transformer(folder):
    model = pipeline(folder)
    assert sentfast.accelerate(model) is model and sentfast.is_accelerated(model)
    assert sentfast.is_accelerated(model[0]) and sentfast.is_accelerated(model[0].auto_model)
    rows = sentfast.explain(model).rows
    assert [(row.name, row.operator, row.backend, row.precision) for row in rows[:2]] == [
        ("0", "encoder", BACKEND, "fp32"),
        ("1", "pool", BACKEND, ""),
    ]
    assert "encoder" in str(rows[0]) and "fp32" in str(rows[0])
    sentfast.restore(model[0])
    assert not sentfast.is_accelerated(model)
    assert sentfast.explain(model).rows[0].reason == "SF118"
    assert sentfast.accelerate(model[0]) is model[0] and sentfast.is_accelerated(model)


def test_router(folder):
    query, document = models.Transformer(folder), models.Transformer(folder)
    parts = {"query": [query, models.Pooling(32)], "document": [document, models.Pooling(32)]}
    model = SentenceTransformer(
        modules=[models.Router.for_query_document(**{f"{name}_modules": modules for name, modules in parts.items()})],
        device="cpu",
    )
    sentfast.accelerate(model)
    assert sentfast.is_accelerated(query) and sentfast.is_accelerated(document)
    rows = {row.name: row.operator for row in sentfast.explain(model).rows}
    found = {name: operator for name, operator in rows.items() if name != "similarity"}
    assert sorted(found.values()) == ["encoder", "encoder", "pool", "pool"], rows


def test_explain_of_other_backends(folder):
    model = pipeline(folder)
    part = nn.Module()
    part.auto_model = SimpleNamespace(config=None)
    model[0] = part
    row = sentfast.explain(model).rows[0]
    assert (row.operator, row.reason) == ("", "SF119")
    with pytest.raises(sentfast.UnsupportedModelError, match="SF119"):
        sentfast.accelerate(model)
