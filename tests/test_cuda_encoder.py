"""The packed encoder as it runs on a GPU: its code on CPU tensors, and on Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import encoders
import numpy as np
import pytest
import test_training
import tiny_models
import torch
from accuracy import assert_accurate
from cuda_encoders import ARGUMENTS, LENGTHS, composed, interpreted, needs_fused, on_triton
from sentence_transformers import models
from torch import Tensor

import sentfast
from sentfast import functional, switch
from sentfast.encoder import composed as composed_module
from sentfast.encoder import device, encoder_of, lengths, pack_on_device
from sentfast.integrations import loaders
from sentfast.ops import linear

if tiny_models.VERSION >= (6, 2):  # before, `encode` has no loop of its own
    from sentfast.integrations import encode


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_token_embeddings(model_type: str) -> None:
    for hidden, heads in (encoders.drawn_size() for _ in range(4)):
        made, inputs = encoders.model(model_type, hidden, heads), encoders.batch(LENGTHS)
        if model_type in encoders.WITH_TOKEN_TYPES:
            inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
        encoder, used = composed(made), inputs["attention_mask"].bool()
        with sentfast.disabled():
            eager, exact = made(**inputs).last_hidden_state[used], encoders.exact(made, inputs)
        result = encoders.run(encoder, inputs)
        assert encoder.precision == "fp32" and result.dtype == eager.dtype
        # Each of the steps has made what came before it of numbers as large as these.
        assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())


@pytest.mark.usefixtures("on_cpu")
def test_rotary_and_gate_as_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in large batches of long sequences."""
    made, inputs = encoders.model("modernbert"), encoders.batch(LENGTHS)
    encoder = composed(made)
    fused = encoders.run(encoder, inputs)
    monkeypatch.setattr(composed_module, "fuses_rotary", lambda *args: False)
    monkeypatch.setattr(composed_module, "fuses_activation", lambda *args: False)
    sentfast.report(reset=True)
    torch.testing.assert_close(encoders.run(encoder, inputs), fused, rtol=1e-5, atol=1e-5)
    names = {name for name, _ in sentfast.report().calls}
    assert {"rotate_", "gated_activation"} <= names
    assert not {"rotary_attention", "linear_gated_activation"} & names


def half_like(made: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What transformers gives in half precision for the used positions, and the exact result of the same weights."""
    used = inputs["attention_mask"].bool()
    with sentfast.disabled():
        return copy.deepcopy(made).to(dtype)(**inputs).last_hidden_state[used], encoders.exact(made, inputs)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_half_models(model_type: str, dtype: torch.dtype) -> None:
    made, inputs = encoders.model(model_type).to(dtype), encoders.batch(LENGTHS)
    eager, exact = half_like(made, inputs, dtype)
    result = encoders.run(composed(made), inputs)
    assert result.dtype == dtype
    assert_accurate(result, eager, exact)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("way", ["accelerate", "autocast"])
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_bfloat16_products_of_a_float32_model(model_type: str, way: str) -> None:
    made, inputs = encoders.model(model_type), encoders.batch(LENGTHS)
    eager, exact = half_like(made, inputs, torch.bfloat16)
    if way == "accelerate":
        result = encoders.run(composed(made, "bf16"), inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            encoder = composed(made)
            result = encoders.run(encoder, inputs)
        assert encoder.precision == "bf16"
    assert result.dtype == torch.float32
    size = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert_accurate(result, eager, exact, size=size)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_pooled(model_type: str) -> None:
    """In one call with the layers: the same as pooling the token embeddings."""
    made, inputs = encoders.model(model_type), encoders.batch(LENGTHS)
    encoder, modes = composed(made), ("mean", "cls", "lasttoken")
    tokens = encoders.run(encoder, inputs)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    expected = functional.pool(tokens, cu_seqlens=ends, mode=modes, prompt_length=1, normalize=True)
    assert torch.equal(encoders.run(encoder, inputs, modes=modes, prompt_length=1, normalize=True), expected)


@pytest.mark.usefixtures("on_cpu")
def test_bad_arguments_are_named() -> None:
    encoder = composed(encoders.model("bert"))
    ids, ends = torch.tensor([3, 4, 5], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    for call, error, words in (
        (lambda: encoder.run(ids.long(), ends), ValueError, "input_ids: expected contiguous int32"),
        (lambda: encoder.run(ids + 60, ends), IndexError, "input_ids: expected numbers from 0 to 59"),
        (lambda: encoder.run(ids, ends + 1), ValueError, "cu_seqlens: expected numbers that rise from 0 to 3"),
        (lambda: encoder.run(ids, ends, modes=("sum",)), ValueError, "modes: expected names"),
    ):
        with pytest.raises(error, match=words):
            call()


# ---- a padded batch that is on the device ------------------------------------------------------------------------


def steps_ran(code: str = "") -> Any:
    """The operators of the layers and nothing that fell back, or a fallback for this reason alone."""
    report = sentfast.report()
    names = {name for name, _ in report.calls}
    attention = bool({"varlen_attention", "rotary_attention"} & names)
    if code:
        return {found for _, found in report.fallbacks} == {code} and not attention
    return attention and "dropout_add_layer_norm" in names and "encoder" not in names and not report.fallbacks


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_padded_batch(model_type: str) -> None:
    made = sentfast.accelerate(encoders.model(model_type))
    for text_lengths in (LENGTHS, [7, 7, 7], [1], [12, 1]):
        inputs = encoders.batch(text_lengths)
        inputs["input_ids"][0, 0] = encoders.PADDING  # inside a text it moves the positions of RoBERTa
        expected = encoders.stock(made, **inputs)
        sentfast.report(reset=True)
        result = made(**inputs)
        assert steps_ran(), str(sentfast.report())
        assert type(result) is type(expected) and list(result) == list(expected)
        used = inputs["attention_mask"].bool()
        hidden = result.last_hidden_state
        torch.testing.assert_close(hidden[used], expected.last_hidden_state[used], rtol=1e-4, atol=1e-4)
        assert not hidden[~used].any()
    without_mask = made(inputs["input_ids"][:1])
    with sentfast.disabled():
        torch.testing.assert_close(without_mask[0], made(inputs["input_ids"][:1])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_types_and_positions() -> None:
    made, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    shape = inputs["input_ids"].shape
    used = inputs["attention_mask"].bool()
    for options in (
        {"token_type_ids": torch.randint(0, 2, shape), "position_ids": torch.randint(0, 66, shape)},
        {"token_type_ids": torch.randint(0, 2, (1, shape[1])), "position_ids": torch.randint(0, 66, (1, shape[1]))},
    ):
        expected = encoders.stock(made, **inputs, **options)[0][used]
        sentfast.report(reset=True)
        torch.testing.assert_close(made(**inputs, **options)[0][used], expected, rtol=1e-4, atol=1e-4)
        assert steps_ran(), str(sentfast.report())


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "left padding": lambda mask: mask.flip(1),
    "a hole": lambda mask: mask * (torch.arange(mask.shape[1]) != 1),
    "a row without tokens": lambda mask: mask * (torch.arange(mask.shape[0]) > 0).unsqueeze(1),
    "a weight": lambda mask: mask * 2,
}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", MASKS)
def test_masks_for_the_original(case: str) -> None:
    made, inputs = sentfast.accelerate(encoders.model("bert", attn_implementation="eager")), encoders.batch([9, 3, 5])
    inputs["attention_mask"] = MASKS[case](inputs["attention_mask"])
    expected = encoders.stock(made, **inputs)[0]
    sentfast.report(reset=True)
    assert torch.equal(made(**inputs)[0], expected)
    assert steps_ran("SF104"), str(sentfast.report())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_other_types(dtype: torch.dtype) -> None:
    made, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    tables = composed(made).tables
    mask = inputs["attention_mask"].to(dtype)
    batch = pack_on_device(tables, torch.device("cpu"), inputs["input_ids"], mask)
    assert isinstance(batch, device.DeviceBatch), batch
    assert batch.cu_seqlens.diff().tolist() == LENGTHS and batch.longest == max(LENGTHS)


@pytest.mark.usefixtures("on_cpu")
def test_noted_lengths_are_used_until_the_mask_changes() -> None:
    made, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    tables, mask = composed(made).tables, inputs["attention_mask"]

    def lengths_found() -> list[int]:
        batch = pack_on_device(tables, torch.device("cpu"), inputs["input_ids"], mask)
        assert isinstance(batch, device.DeviceBatch)
        return batch.cu_seqlens.diff().tolist()

    with torch.inference_mode(False):
        mask = mask.clone()
    lengths.note(mask, np.array([2, 2, 2, 2, 2]))
    assert lengths_found() == [2, 2, 2, 2, 2]  # nobody has looked at the mask
    mask[0, 8] = 0
    assert lengths_found() == [8, *LENGTHS[1:]]


@pytest.mark.usefixtures("on_cpu")
def test_lengths_are_noted_where_a_data_loader_sends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    monkeypatch.setattr(loaders, "_watched", False)
    for site in [site for site in switch._added if site.name == "send_to_device"]:
        switch.remove(site)  # an earlier test's
    original = accelerate.send_to_device
    made, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    made(**inputs)
    assert accelerate.send_to_device is not original
    batch = {"anchor_attention_mask": inputs["attention_mask"], "anchor_attention_mask_2": inputs["input_ids"], "n": 3}
    sent = accelerate.send_to_device(batch, torch.device("cpu"))
    found = lengths.recall(sent["anchor_attention_mask"])
    assert sent.keys() == batch.keys() and found is not None and found.tolist() == LENGTHS
    sentfast.disable()
    assert accelerate.send_to_device is original
    sentfast.enable()
    assert accelerate.send_to_device is not original
    switch.remove(next(site for site in switch._added if site.name == "send_to_device"))
    assert accelerate.send_to_device is original


def test_lengths_of_a_mask() -> None:
    mask = encoders.batch(LENGTHS)["attention_mask"]
    for dtype in (torch.int64, torch.int32, torch.bool):
        found = lengths.of_mask(mask.to(dtype))
        assert found is not None and found.tolist() == LENGTHS
    for odd in (mask.flip(1), mask * 2, mask.float(), mask[0]):
        assert lengths.of_mask(odd) is None


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_gradients(model_type: str) -> None:
    with torch.enable_grad():
        made, inputs = test_training.trained(model_type), encoders.batch(LENGTHS)
        weights = torch.randn(sum(LENGTHS), 32)
        sentfast.report(reset=True)
        result, got = test_training.gradients(made, inputs, weights)
        assert steps_ran(), str(sentfast.report())
        with sentfast.disabled():
            eager, plain = test_training.gradients(made, inputs, weights)
            exact, true = test_training.exact_gradients(made, inputs, weights)
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    test_training.assert_gradients(got, plain, true)


@pytest.mark.usefixtures("on_cpu")
def test_a_training_step_renews_the_packed_weights() -> None:
    """Also where an optimiser has written to them without a trace."""
    made, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    used = inputs["attention_mask"].bool()
    made(**inputs)
    before = composed(made)
    with torch.enable_grad():
        made(**inputs)[0].sum().backward()
    weight = made.encoder.layer[0].attention.self.query.weight
    np.multiply(weight.detach().numpy(), 1.5, out=weight.detach().numpy())
    assert composed(made) is not before
    expected = encoders.stock(made, **inputs)[0][used]
    torch.testing.assert_close(made(**inputs)[0][used], expected, rtol=1e-4, atol=1e-4)


# ---- encode ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_base(tmp_path_factory.mktemp("models"), "mpnet")


@needs_fused
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("count", [1, 23, 150])
def test_encode(path: str, case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows and batches that are smaller than they are, so that there are several."""
    for name, number in (("_FIRST_WINDOW", 20), ("_WINDOW_ON_DEVICE", 50), ("TOKENS_ON_DEVICE", 300)):
        monkeypatch.setattr(encode, name, number)
    model = tiny_models.build(path, models.Dense(tiny_models.HIDDEN, 16), models.Normalize(), include_prompt=False)
    texts, arguments = tiny_models.texts(count), ARGUMENTS[case]
    with sentfast.disabled():
        eager = model.encode(texts, **arguments)
        exact = copy.deepcopy(model).double().encode(texts, **arguments)
    sentfast.report(reset=True)
    result = model.encode(texts, **arguments)
    report = sentfast.report()
    assert steps_ran() and ("pool_forward" in {name for name, _ in report.calls} or report.calls), str(report)
    assert type(result) is type(eager) and len(result) == len(eager)
    if isinstance(result, list):
        result, eager, exact = torch.stack(result), torch.stack(eager), torch.stack(exact)
    result, eager, exact = (torch.as_tensor(x) for x in (result, eager, exact))
    assert result.dtype == eager.dtype and result.device == eager.device
    assert_accurate(result, eager, exact, size=1.0)


@needs_fused
@pytest.mark.usefixtures("on_cpu")
def test_encode_of_nothing_and_of_bad_ids(path: str) -> None:
    model = tiny_models.build(path)
    assert len(model.encode([])) == 0
    assert model.encode([], convert_to_tensor=True).shape == (0,)
    model[0].auto_model.resize_token_embeddings(3)
    with sentfast.disabled(), pytest.raises(IndexError) as expected:
        model.encode(["weather"])
    with pytest.raises(IndexError) as found:
        model.encode(["weather"])
    assert str(found.value) == str(expected.value)


# ---- Triton's kernels --------------------------------------------------------------------------------------------

FEW = [5, 1, 3]


@interpreted
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_triton_interpreted(model_type: str) -> None:
    made, inputs = encoders.model(model_type, num_hidden_layers=2), encoders.batch(FEW)
    encoder = composed(made)
    with sentfast.disabled():
        eager, exact = made(**inputs).last_hidden_state[inputs["attention_mask"].bool()], encoders.exact(made, inputs)
    steps = ("varlen_attention", "linear_activation")
    if model_type == "modernbert":
        steps = ("rotary_attention", "linear_gated_activation")
    with on_triton("dropout_add_layer_norm", *steps):
        result = encoders.run(encoder, inputs)
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    ends = torch.tensor([0, *FEW]).cumsum(0).int()
    expected = functional.pool(result, cu_seqlens=ends, normalize=True)
    with on_triton("pool"):
        pooled = encoders.run(encoder, inputs, modes=("mean",), normalize=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_triton_interpreted_gradients(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where PyTorch makes the products.
    monkeypatch.setattr(linear, "_fits", lambda *args: False)
    weights = torch.randn(sum(FEW), 32)
    with torch.enable_grad():
        made, inputs = test_training.trained(model_type), encoders.batch(FEW)
        with on_triton("varlen_attention_backward", "dropout_add_layer_norm_backward", "bias_activation_backward"):
            result, got = test_training.gradients(made, inputs, weights)
        with sentfast.disabled():
            eager, plain = test_training.gradients(made, inputs, weights)
            exact, true = test_training.exact_gradients(made, inputs, weights)
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    test_training.assert_gradients(got, plain, true)


@pytest.mark.usefixtures("on_cpu")
def test_copies_that_are_being_made_do_not_count_as_made(monkeypatch):
    """Another thread would compute with the old ones."""
    model = encoders.model("bert")
    encoder = encoder_of(model)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
    seen, original = [], encoder._matrix

    def matrix(linears):
        seen.append(encoder.current())
        return original(linears)

    monkeypatch.setattr(encoder, "_matrix", matrix)
    encoder.refresh()
    assert seen and not any(seen) and encoder.current()
