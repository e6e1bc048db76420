"""The packed encoder against transformers: every architecture, dtype and form of input; what bad input says."""

from __future__ import annotations

import copy
import random

import encoders
import pytest
import torch
from accuracy import assert_accurate, error
from encoders import check, run
from torch import nn
from transformers.activations import ACT2FN

from sentfast import native, reference
from sentfast.encoder import encoder_of, examine, on_cpu, pack_padded, products, weights

LENGTHS = [7, 1, 40, 23, 2]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_architecture(model_type, turn):
    hidden, heads = encoders.drawn_size()
    model = encoders.model(model_type, hidden, heads, attn_implementation="eager")
    encoder, result = check(model, encoders.batch(LENGTHS))
    assert encoder.architecture == model_type and encoder.hidden_size == hidden and encoder.precision == "fp32"
    assert result.shape == (sum(LENGTHS), hidden)
    check(model, encoders.batch([5]))
    # Position tables of this family begin after the padding token.
    assert encoder.max_length == (64 if encoder.tables.padding_idx is not None else 66)


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_default_attention_and_no_mask(model_type):
    model = encoders.model(model_type)
    check(model, {"input_ids": torch.randint(2, encoders.VOCABULARY, (3, 12))})


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_a_long_batch_is_computed_in_pieces(model_type, monkeypatch):
    """Between which Python answers signals; the bits are the same."""
    model, draw = encoders.model(model_type), random.Random(int(torch.randint(2**31, ())))
    lengths = [draw.choice([1, 2, 9, 40]) for _ in range(draw.randint(2, 30))]
    inputs = encoders.batch(lengths)
    encoder = encoder_of(model)
    most, calls = draw.randint(1, 100), []
    original = on_cpu.operator

    def counted(words, input_ids, cu_seqlens, *rest):
        calls.append((len(input_ids), len(cu_seqlens) - 1))
        return original(words, input_ids, cu_seqlens, *rest)

    forms = [{}, {"padded_length": max(lengths)}, {"modes": ("mean", "max")}, {"modes": ("cls",), "normalize": True}]
    wholes = [run(encoder, inputs, **form) for form in forms]
    for name, value in (("operator", counted), ("PIECE", 1), ("LEAST_TOKENS", most)):
        monkeypatch.setattr(on_cpu, name, value)
    for form, whole in zip(forms, wholes, strict=True):
        found = run(encoder, inputs, **form)
        what = (lengths, most, form)
        # The definition's products are PyTorch's, whose bits depend on the number of rows.
        assert torch.equal(found, whole) if native.cpu_loaded() else torch.allclose(found, whole, atol=1e-5), what
    assert sum(tokens for tokens, _ in calls) == len(forms) * sum(lengths)
    assert all(tokens <= most or sequences == 1 for tokens, sequences in calls), (lengths, most, calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_half(model_type, dtype):
    model = encoders.model(model_type, 64, 2).to(dtype)
    encoder, _ = check(model, encoders.batch(LENGTHS))
    assert encoder.precision == ("bf16" if dtype == torch.bfloat16 and products.has_bf16() else "fp32")
    assert encoder.dtype == dtype


def test_bf16_products_of_a_float32_model():
    model, inputs = encoders.model("bert", 64, 2), encoders.batch(LENGTHS)
    encoder, used = encoder_of(model, "bf16"), inputs["attention_mask"].bool()
    assert encoder.precision == ("bf16" if products.has_bf16() else "fp32")
    exact = encoders.exact(model, inputs)
    half = copy.deepcopy(model).bfloat16()(**inputs).last_hidden_state[used]
    result = run(encoder, inputs)
    assert result.dtype == torch.float32
    assert_accurate(result, half, exact)
    if products.has_bf16():
        assert error(result, exact) > 4 * error(model(**inputs).last_hidden_state[used], exact)
        assert encoder_of(model) is not encoder and encoder_of(model, "bf16") is encoder
        before = native.cpu_isa()
        try:
            native.cpu_isa("avx2")
            assert encoder_of(model, "bf16").precision == "fp32"
        finally:
            native.cpu_isa(before)
    with pytest.raises(ValueError, match=r"precision: expected one of \('match', 'bf16'\), got 'int3'"):
        encoder_of(model, "int3")


def test_bf16_products_need_pairs_of_columns():
    model = encoders.model("bert", intermediate_size=75).bfloat16()
    encoder, _ = check(model, encoders.batch(LENGTHS))
    assert encoder.precision == "fp32"
    model = encoders.model("electra", embedding_size=2 * int(torch.randint(1, 20, ())) + 1).bfloat16()
    encoder, _ = check(model, encoders.batch(LENGTHS))
    assert encoder.precision == "fp32"


@pytest.mark.parametrize("model_type", encoders.WITH_TOKEN_TYPES)
def test_token_types(model_type):
    model, inputs = encoders.model(model_type, type_vocab_size=2), encoders.batch(LENGTHS)
    _, without = check(model, inputs)
    inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
    _, result = check(model, inputs)
    assert (result - without).abs().max() > 0.1
    packed = pack_padded(encoder_of(model).tables, inputs["input_ids"], None, torch.zeros_like(inputs["input_ids"]))
    assert packed.token_type_ids is None


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_position_ids(model_type):
    model, inputs = encoders.model(model_type), encoders.batch(LENGTHS)
    inputs["position_ids"] = torch.randint(2, 66, inputs["input_ids"].shape)
    check(model, inputs)
    inputs["position_ids"] = inputs["position_ids"][:1]
    check(model, inputs)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_padding_token_inside_a_text_is_no_position(model_type):
    model, inputs = encoders.model(model_type), encoders.batch(LENGTHS)
    plain, _ = check(model, inputs)
    inputs["input_ids"][2, 3] = inputs["input_ids"][2, 11] = inputs["input_ids"][0, 0] = encoders.PADDING
    assert plain.tables.padding_idx == encoders.PADDING
    check(model, inputs)
    # The same ids with a padding token that is one like any other give another result.
    packed = pack_padded(plain.tables, inputs["input_ids"], inputs["attention_mask"])
    counted = plain.run(packed.input_ids, packed.cu_seqlens)
    plain.tables = plain.tables._replace(padding_idx=None)
    assert (plain.run(packed.input_ids, packed.cu_seqlens) - counted).abs().max() > 1e-3


@pytest.mark.parametrize("buckets", [32, 40])
def test_mpnet_bias_beyond_its_last_bucket(buckets):
    options = dict(max_position_embeddings=302, relative_attention_num_buckets=buckets)
    model = encoders.model("mpnet", 32, 4, **options)
    check(model, encoders.batch([200, 95, 130]))
    table = weights.pack(examine.examine(model), torch.float32).tensors[
        reference.Embedding._fields.index("attention_bias")
    ]
    assert table.shape == (4, 599)
    expected = model.encoder.compute_position_bias(torch.empty(1, 300, 1))[0]
    distance = torch.arange(300) - torch.arange(300).unsqueeze(1)
    assert torch.equal(table[:, distance + 299], expected)


def test_modernbert_windows():
    model = encoders.model("modernbert", local_attention=10)
    windows = examine.examine(model).windows
    assert windows == (-1, 5, 5, -1)
    check(model, encoders.batch([60, 3, 31]))
    check(encoders.model("modernbert", global_attn_every_n_layers=1), encoders.batch([30]))
    bias = dict(attention_bias=True, mlp_bias=True, norm_bias=True)
    check(encoders.model("modernbert", **bias), encoders.batch(LENGTHS))


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    nn.GELU(): "gelu",
    nn.GELU(approximate="tanh"): "gelu_tanh",
}


@pytest.mark.parametrize("name", ACTIVATIONS, ids=str)
def test_activation(name):
    model = encoders.model("bert")
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = ACT2FN[name] if isinstance(name, str) else name
    assert reference.ACTIVATIONS[examine.examine(model).activation] == ACTIVATIONS[name]
    check(model, encoders.batch(LENGTHS))


def test_several_layers_and_one():
    for count in (1, 3):
        check(encoders.model("bert", num_hidden_layers=count), encoders.batch(LENGTHS))


def test_results_by_layout_and_mode():
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    encoder = encoder_of(model)
    tokens = run(encoder, inputs)
    padded = run(encoder, inputs, padded_length=44)
    assert padded.shape == (5, 44, 32)
    assert torch.equal(padded[:, :40][inputs["attention_mask"].bool()], tokens)
    assert padded.count_nonzero() == tokens.count_nonzero()
    pooled = run(encoder, inputs, modes=("mean", "cls"), normalize=True)
    assert pooled.shape == (5, 64)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(5))


def test_pooled_is_the_pooled_token_embeddings():
    model, inputs = encoders.model("mpnet"), encoders.batch(LENGTHS)
    encoder = encoder_of(model)
    packed = pack_padded(encoder.tables, inputs["input_ids"], inputs["attention_mask"])
    exact = encoders.exact(model, inputs)
    eager = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    for i, mode in enumerate(reference.POOLING_MODES):
        pooled = [reference.pool_forward(x, None, packed.cu_seqlens, [i], 1, False)[0] for x in (eager, exact)]
        result = encoder.run(packed.input_ids, packed.cu_seqlens, modes=(mode,), prompt_length=1)
        assert_accurate(result, *pooled, what=mode)


# ---- bad input ------------------------------------------------------------------------------------------------------


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "id": ((int32(1, 60), int32(0, 2)), {}, IndexError, "input_ids: expected numbers from 0 to 59, got 1 to 60"),
    "negative": ((int32(-1, 5), int32(0, 2)), {}, IndexError, "input_ids: expected numbers from 0 to 59, got -1 to 5"),
    "dtype": (
        (torch.ones(2), int32(0, 2)),
        {},
        ValueError,
        "input_ids: expected contiguous int32 .* got torch.float32",
    ),
    "ends": ((int32(1, 2), int32(0, 3)), {}, ValueError, r"cu_seqlens: expected numbers that rise .* got \[0, 3\]"),
    "falling": ((int32(1, 2), int32(0, 3, 2)), {}, ValueError, "cu_seqlens: expected numbers that rise from 0 to 2"),
    "no ends": ((int32(), int32()), {}, ValueError, "cu_seqlens: expected numbers that rise from 0 to 0"),
    "long": (
        (int32(*[1] * 67), int32(0, 67)),
        {},
        ValueError,
        "cu_seqlens: expected sequences of at most 66 .* got 67",
    ),
    "type": (
        (int32(1, 2), int32(0, 2)),
        {"token_type_ids": int32(0, 2)},
        IndexError,
        "token_type_ids: expected numbers from 0 to 1, got 0 to 2",
    ),
    "position": (
        (int32(1, 2), int32(0, 2)),
        {"position_ids": int32(0, 66)},
        IndexError,
        "position_ids: expected numbers from 0 to 65, got 0 to 66",
    ),
    "count": (
        (int32(1, 2), int32(0, 2)),
        {"position_ids": int32(0)},
        ValueError,
        "position_ids: expected 2 numbers as in input_ids, got 1",
    ),
    "mode": ((int32(1), int32(0, 1)), {"modes": ("sum",)}, ValueError, "modes: expected names of .* got 'sum'"),
    "padded": (
        (int32(1, 2), int32(0, 2)),
        {"padded_length": 1},
        ValueError,
        "padded_length: expected at least 2, the longest sequence, got 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, exception, message = BAD[case]
    with pytest.raises(exception, match=message):
        encoder_of(encoders.model("bert")).run(*arguments, **options)


def test_empty_sequences():
    encoder = encoder_of(encoders.model("bert"))
    result = encoder.run(int32(5, 6), int32(0, 0, 2, 2), modes=("mean",))
    assert torch.equal(result[1:2], encoder.run(int32(5, 6), int32(0, 2), modes=("mean",)))
    assert not result[[0, 2]].any()


def mask_of(rows):
    return torch.tensor(rows)


BAD_PADDED = {
    "left padding": (dict(attention_mask=mask_of([[0, 1, 1], [1, 1, 1]])), "SF104"),
    "hole": (dict(attention_mask=mask_of([[1, 0, 1], [1, 1, 1]])), "SF104"),
    "empty row": (dict(attention_mask=mask_of([[0, 0, 0], [1, 1, 1]])), "SF104"),
    "weights": (dict(attention_mask=mask_of([[2, 2, 0], [1, 1, 1]])), "SF104"),
    "rank": (dict(attention_mask=torch.ones(2, 1, 3, 3)), "SF104"),
    "no tensor": (dict(attention_mask=[[1, 1, 1], [1, 1, 1]]), "SF104"),
    "ids": (dict(input_ids=torch.tensor([[1, 2, 60], [1, 1, 1]])), "SF126"),
    "wide ids": (dict(input_ids=torch.tensor([[1, 2, 2**32 + 5], [1, 1, 1]])), "SF126"),
    "types": (dict(token_type_ids=torch.tensor([[0, 0, 2], [0, 0, 0]])), "SF126"),
    "positions": (dict(position_ids=torch.tensor([[0, 1, 66]])), "SF126"),
    "length": (dict(input_ids=torch.ones(1, 67, dtype=torch.long)), "SF126"),
    "floats": (dict(input_ids=torch.ones(2, 3)), "SF107"),
    "one dimension": (dict(input_ids=torch.ones(3, dtype=torch.long)), "SF107"),
    "no rows": (dict(input_ids=torch.ones(0, 3, dtype=torch.long)), "SF107"),
    "shape of types": (dict(token_type_ids=torch.zeros(2, 2, dtype=torch.long)), "SF107"),
    "meta": (dict(input_ids=torch.ones(2, 3, dtype=torch.long, device="meta")), "SF103"),
}


@pytest.mark.parametrize("case", BAD_PADDED)
def test_batches_for_the_original(case):
    options, code = BAD_PADDED[case]
    encoder = encoder_of(encoders.model("bert"))
    assert pack_padded(encoder.tables, **{"input_ids": torch.ones(2, 3, dtype=torch.long), **options}) == code


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32, torch.float16])
def test_mask_dtypes(dtype):
    inputs = encoders.batch([3, 1, 5])
    packed = pack_padded(
        encoder_of(encoders.model("bert")).tables, inputs["input_ids"], inputs["attention_mask"].to(dtype)
    )
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 9] and packed.length == 5
    assert packed.input_ids.tolist() == inputs["input_ids"][inputs["attention_mask"].bool()].tolist()
