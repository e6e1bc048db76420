"""The packed encoder as it runs on a GPU: its code on CPU tensors, on fake CUDA tensors, and on a GPU if there is one.

On CPU tensors the results are real; on fake ones a tensor left on the wrong device, or a value that the host would have
to wait for, is an error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import encoders
import numpy as np
import pytest
import test_training
import tiny_models
import torch
from accuracy import assert_accurate
from sentence_transformers import models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import sentfast
from sentfast import functional, registry, switch
from sentfast.encoder import Composed, device, encoder_of, examine, graphs, lengths, pack_on_device, training
from sentfast.encoder import composed as composed_module
from sentfast.integrations import guards, loaders
from sentfast.ops import linear
from sentfast.reference import POOLING_MODES

if tiny_models.VERSION >= (6, 2):  # before, `encode` has no loop of its own
    from sentfast.integrations import encode

LENGTHS = [9, 3, 1, 17, 6]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a device on which the encoder runs as steps."""
    monkeypatch.setattr(device, "_COMPOSED", {"cpu", "cuda"})
    with encoders.surroundings():
        yield


def composed(made: Any, precision: str = "match") -> Composed:
    found = encoder_of(made, precision)
    assert isinstance(found, Composed), found
    return found


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_token_embeddings(model_type: str) -> None:
    for hidden, heads in encoders.SIZES:
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
    if code:
        return {found for _, found in report.fallbacks} == {code} and "varlen_attention" not in names
    return {"varlen_attention", "dropout_add_layer_norm"} <= names and "encoder" not in names and not report.fallbacks


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


# ---- CUDA graphs -------------------------------------------------------------------------------------------------


class Repeating:
    """Stands for CUDA: a "graph" calls the function again, which finds the block as it is then."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.turns = 0, 0, 0

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        output = run().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield


@pytest.fixture
def capture(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repeating]:
    found = Repeating()
    monkeypatch.setattr(composed_module, "captures", lambda device: True)
    monkeypatch.setattr(composed_module, "CudaCapture", lambda device: found)
    # The compiled CPU kernels refuse offsets that leave tokens out; those of a GPU cannot look, and read the rows of
    # sequences alone. Attention leaves the others unwritten, which is NaN here.
    pool = composed_module._pool
    monkeypatch.setattr(composed_module, "_pool", lambda x, mask, ends, *o: pool(x[: ends[-1]], mask, ends, *o))
    with registry.use_backend("reference"):
        yield found


def packed_texts(text_lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, encoders.VOCABULARY, (sum(text_lengths),), dtype=torch.int32)
    return ids, torch.tensor([0, *text_lengths]).cumsum(0).int()


def test_buckets() -> None:
    assert graphs.shape_of(1, 1, 1) == (16, 2, 16)
    assert graphs.shape_of(16, 2, 14) == (16, 2, 16)
    assert graphs.shape_of(17, 4, 5) == (32, 4, 16)
    assert graphs.shape_of(300, 1, 300) == (512, 64, 512)
    assert graphs.shape_of(300, 60, 17) == (512, 64, 32)
    assert graphs.shape_of(graphs.MOST_TOKENS, 8, 256) == (2048, 256, 256)
    assert graphs.shape_of(graphs.MOST_TOKENS + 1, 8, 256) is None
    assert graphs.shape_of(30, 5, 16) is None  # more sequences than there is room for
    assert graphs.shape_of(0, 1, 0) is None


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_graphs_give_the_same_results(model_type: str, capture: Repeating) -> None:
    """Batches of one bucket, longer and shorter than the one it was made for, with more and fewer sequences.

    Each fills the block anew: offsets, ids and types of another batch would be seen.
    """
    made = encoders.model(model_type)
    encoder = composed(made)
    shapes = [[9, 3], [9, 3], [20], [16, 4, 1, 2], [1] * 4, [31], [5], [3, 28], [32], [2, 2, 28]]
    for text_lengths in shapes + shapes[::-1]:
        ids, ends = packed_texts(text_lengths)
        options: dict[str, Any] = {"modes": ("mean", "cls"), "prompt_length": 1, "normalize": True}
        if model_type == "bert" and len(text_lengths) > 1:
            options["token_type_ids"] = torch.randint(0, 2, ids.shape, dtype=torch.int32)
        result = encoder.run(ids, ends, **options)
        expected = without_graphs(encoder, ids, ends, **options)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert 0 < capture.recorded <= 4 and capture.replayed == capture.turns >= 14


def without_graphs(encoder: Composed, *args: Any, **options: Any) -> Tensor:
    found, encoder._graphs = encoder._graphs, None
    try:
        return encoder.run(*args, **options)
    finally:
        encoder._graphs = found


def test_a_longer_text_gets_launches_of_its_own(capture: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest sequence is fixed when a graph is made. Each attention is told at least what its batch has."""
    told = []
    operator = composed_module._varlen_attention

    def attention(*args: Any) -> Tensor:
        told.append((args[4], int(args[3].diff().max())))
        return operator(*args)

    monkeypatch.setattr(composed_module, "_varlen_attention", attention)
    encoder = composed(encoders.model("bert"))
    for text_lengths in ([15, 15], [15, 15], [15, 15], [28, 2], [28, 2], [28, 2], [1, 16], [16, 16]):
        encoder.run(*packed_texts(text_lengths), modes=("mean",))
    assert capture.replayed == 6 and {bound for bound, _ in told} >= {16, 32}
    assert all(longest <= bound for bound, longest in told)


def test_graphs_of_other_options_are_apart(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    ids, ends = packed_texts([7])
    for options in ({"modes": ("mean",)}, {"modes": ("cls",)}, {"modes": ("mean",), "normalize": True}) * 3:
        result = encoder.run(ids, ends, **options)
        torch.testing.assert_close(result, without_graphs(encoder, ids, ends, **options), rtol=1e-5, atol=1e-5)
    assert capture.recorded == 3 and capture.replayed == 6


def test_results_are_not_overwritten_by_the_next_replay(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    texts = [packed_texts([8]) for _ in range(4)]
    results = [encoder.run(*text, modes=("mean",)) for text in texts]
    for text, result in zip(texts, results, strict=True):
        torch.testing.assert_close(result, without_graphs(encoder, *text, modes=("mean",)), rtol=1e-5, atol=1e-5)
    assert capture.replayed == 3


def test_only_so_many_graphs_are_kept(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    found = encoder._graphs
    assert found is not None
    found._most = 2
    for text_lengths in ([5], [5], [20], [20], [40], [40], [20], [5], [5]):
        encoder.run(*packed_texts(text_lengths), modes=("mean",))
        assert len(found) <= 2
    assert capture.recorded == 4  # the one of 5 tokens was dropped, the one of 20 was not


def test_new_weights_drop_the_graphs(capture: Repeating) -> None:
    made = encoders.model("bert")
    text = packed_texts([6])
    for _ in range(3):
        old = composed(made).run(*text, modes=("mean",))
    assert capture.recorded == 1
    made.encoder.layer[0].attention.self.query.weight.mul_(2)
    for _ in range(3):
        new = composed(made).run(*text, modes=("mean",))
    assert capture.recorded == 2
    assert not torch.allclose(old, new)
    torch.testing.assert_close(new, without_graphs(composed(made), *text, modes=("mean",)), rtol=1e-5, atol=1e-5)


def test_a_capture_that_fails_is_not_tried_again(capture: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Any) -> Any:
        capture.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", record)
    encoder, text = composed(encoders.model("bert")), packed_texts([6])
    results = [encoder.run(*text, modes=("mean",)) for _ in range(4)]
    assert capture.recorded == 1 and all(torch.equal(result, results[0]) for result in results)


def test_large_batches_and_token_embeddings_use_no_graph(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    for _ in range(3):
        encoder.run(*packed_texts([6]))
        encoder.run(*packed_texts([60] * 35), modes=("mean",))
    assert not capture.recorded


def test_threads_do_not_disturb_each_other(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    texts = [packed_texts([4 + i % 5]) for i in range(40)]
    expected = [without_graphs(encoder, *text, modes=("mean",)) for text in texts]

    def run(text: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad(), registry.use_backend("reference"):
            return encoder.run(*text, modes=("mean",))

    with ThreadPoolExecutor(4) as pool:
        for result, one in zip(pool.map(run, texts), expected, strict=True):
            torch.testing.assert_close(result, one, rtol=1e-5, atol=1e-5)
    assert capture.replayed >= 38


# ---- encode ------------------------------------------------------------------------------------------------------

needs_fused = pytest.mark.skipif(tiny_models.VERSION < (6, 2), reason="encode has no loop of its own")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_base(tmp_path_factory.mktemp("models"), "mpnet")


ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "batches of 7": {"batch_size": 7},
    "progress bar": {"show_progress_bar": True, "convert_to_tensor": True},
    "normalized": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 11, "normalize_embeddings": True},
    "prompt": {"prompt": "weather: "},
}


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


# ---- fake CUDA tensors -------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
MEAN = composed_module.Pooling((POOLING_MODES.index("mean"),), 0, True)
_FREE = {"view", "t", "unbind", "select", "narrow", "slice", "expand", "unsqueeze", "squeeze", "transpose", "permute"}
_FREE |= {"_unsafe_view", "reshape", "detach", "alias", "split", "empty", "empty_like", "new_empty", "unsqueeze_"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would run, and refuses what the host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"), f"waits: {name}"
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            assert result.device.type == source.device.type or source.device.type == "cpu", f"waits: {name} to the CPU"
        if name not in _FREE and function.namespace == "aten":
            self.names.append(name)
        return result


def indexed(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` of numbers, slices, None and ...; PyTorch's own asks for a GPU."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        place = items.index(Ellipsis)
        rest = x.ndim - sum(item is not None for item in items) + 1
        items[place : place + 1] = [slice(None)] * rest
    dim = 0
    for item in items:
        if item is None:
            x = x.unsqueeze(dim)
        elif isinstance(item, slice):
            x = torch.ops.aten.slice(x, dim, item.start, item.stop)
        else:
            x = x.select(dim, item)
            continue
        dim += 1
    return x


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Fake tensors on a GPU that need not exist; our operators give their shapes."""
    launches = Launches()

    def call(self: Any, *args: Any) -> Any:
        with _disable_current_modes():
            launches.names.append(self.name)
        before = len(launches.names)
        result = self.fake(*args)
        del launches.names[before:]  # one kernel, whatever its shapes are made of
        return result

    def send(values: np.ndarray, to_device: torch.device, to: Tensor | None = None) -> Tensor:
        return torch.empty(len(values), dtype=torch.int32, device=to_device) if to is None else to

    monkeypatch.setattr(registry.Op, "__call__", call)
    for module in (composed_module, device, graphs):
        monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(composed_module, "captures", lambda device: False)
    # A fake parameter is no nn.Parameter by its type.
    monkeypatch.setattr(examine, "_check_parameters", lambda model: None)
    monkeypatch.setattr(FakeTensor, "__getitem__", indexed, raising=False)
    monkeypatch.setattr(FakeTensor, "copy_", lambda x, source: torch.ops.aten.copy_(x, source), raising=False)
    monkeypatch.setattr(guards, "PLAIN", (*guards.PLAIN, FakeTensor))
    with FakeTensorMode(), torch.no_grad():
        yield launches


def parts_on_gpu(model_type: str, dtype: torch.dtype, **options: Any) -> examine.Parts:
    with _disable_current_modes():
        made = encoders.model(model_type, **options)
    for module in made.modules():
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                if x is not None:
                    kind = dtype if x.is_floating_point() else x.dtype
                    fake = torch.empty(x.shape, dtype=kind, device=GPU)
                    table[name] = nn.Parameter(fake) if isinstance(x, nn.Parameter) else fake
    found = examine.examine(made)
    assert isinstance(found, examine.Parts), found
    return found


def launches_of(launches: Launches, run: Callable[[], Tensor]) -> list[str]:
    launches.names = []
    with launches:
        result = run()
    assert result.device == GPU
    return list(launches.names)


# Queries and keys turned by six elementwise steps, put together, cast and written back; and the gate's product.
PER_LAYER = {"modernbert": 8 + 9 + 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_launches_and_devices(model_type: str, dtype: torch.dtype, gpu: Launches) -> None:
    """Eight launches a layer; every tensor on the GPU; nothing that the host waits for."""
    layers = {"n_layers" if model_type == "distilbert" else "num_hidden_layers": 6}

    def count(**options: Any) -> tuple[int, int]:
        parts = parts_on_gpu(model_type, dtype, **options)
        encoder = Composed(parts, dtype)
        names = launches_of(gpu, lambda: encoder.run_host(host_batch(LENGTHS), MEAN))
        assert names[-1] == "pool"
        return len(names), len(parts.layers)

    (few, short), (many, deep) = count(), count(**layers)
    assert (many - few) / (deep - short) <= PER_LAYER.get(model_type, 8)
    assert few - short * PER_LAYER.get(model_type, 8) <= 10


def host_batch(text_lengths: list[int]) -> device.HostBatch:
    ids = np.arange(sum(text_lengths), dtype=np.int32)
    return device.HostBatch(ids, None, ids, np.cumsum([0, *text_lengths]).astype(np.int32))


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_bfloat16_products_cost_two_casts_a_layer(model_type: str, gpu: Launches) -> None:
    encoder = Composed(parts_on_gpu(model_type, torch.float32), torch.bfloat16)
    assert encoder.run_host(host_batch(LENGTHS), None).dtype == torch.float32
    names = launches_of(gpu, lambda: encoder.run_host(host_batch(LENGTHS), MEAN))
    rotated = 1 if model_type == "modernbert" else 0
    assert names.count("_to_copy") == (2 + rotated) * len(encoder._layers), names


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_packing_a_batch_on_the_gpu(model_type: str, gpu: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noted lengths nothing is waited for, without them the mask is, and nothing else."""
    parts = parts_on_gpu(model_type, torch.float16)
    encoder = Composed(parts, torch.float16)
    ids, mask = (torch.ones(5, 17, dtype=torch.int64, device=GPU) for _ in range(2))
    monkeypatch.setattr(lengths, "recall", lambda mask: np.array(LENGTHS))

    def run() -> Tensor:
        batch = pack_on_device(parts.tables, GPU, ids, mask, torch.zeros_like(ids))
        assert isinstance(batch, device.DeviceBatch), batch
        assert batch.longest == 17 and batch.input_ids.shape[0] == sum(LENGTHS)
        return batch.pad(encoder.hidden(batch))

    launches_of(gpu, run)
    assert pack_on_device(parts.tables, torch.device("cpu"), ids, mask) == "SF103"
    monkeypatch.setattr(lengths, "recall", lambda mask: None)
    with pytest.raises(AssertionError, match="waits: _to_copy to the CPU"):
        launches_of(gpu, run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_training_on_the_gpu(
    model_type: str, dtype: torch.dtype, gpu: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The differentiable steps with dropout, forward: every tensor on the GPU, nothing that the host waits for.

    Not backward and not under autocast: a PyTorch without CUDA has no streams for them.
    """
    monkeypatch.setattr(training.torch, "randint", lambda *args: 3)
    parts = parts_on_gpu(model_type, dtype)
    for layer in parts.layers:
        layer.module.train()
    ids = torch.ones(sum(LENGTHS), dtype=torch.int32, device=GPU)
    ends = torch.zeros(len(LENGTHS) + 1, dtype=torch.int32, device=GPU)
    types = ids if parts.token_types is not None else None

    def run() -> Tensor:
        return training.token_embeddings(parts, ids, ends, 17, types, ids)

    names = launches_of(gpu, run)
    assert run().dtype == dtype
    assert names.count("varlen_attention") == len(parts.layers)


# ---- Triton's kernels --------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")
FEW = [5, 1, 3]


@contextmanager
def on_triton(*operators: str) -> Iterator[None]:
    """The block runs these operators on Triton and nothing on another backend."""
    sentfast.report(reset=True)
    with registry.use_backend("triton"):
        yield
    ran = sentfast.report().calls
    found = {name for name, backend in ran if backend == "triton"}
    assert {backend for _, backend in ran} <= {"triton"} and set(operators) <= found, ran


@interpreted
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_triton_interpreted(model_type: str) -> None:
    made, inputs = encoders.model(model_type, num_hidden_layers=2), encoders.batch(FEW)
    encoder = composed(made)
    with sentfast.disabled():
        eager, exact = made(**inputs).last_hidden_state[inputs["attention_mask"].bool()], encoders.exact(made, inputs)
    with on_triton("varlen_attention", "dropout_add_layer_norm", "bias_activation"):
        result = encoders.run(encoder, inputs)
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    ends = torch.tensor([0, *FEW]).cumsum(0).int()
    expected = functional.pool(result, cu_seqlens=ends, normalize=True)
    with on_triton("pool"):
        pooled = encoders.run(encoder, inputs, modes=("mean",), normalize=True)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.usefixtures("on_cpu")
def test_triton_interpreted_with_room_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a bucket: tokens that belong to no sequence and sequences without tokens, as the block of a graph has them."""
    monkeypatch.setattr(composed_module, "captures", lambda device: True)
    monkeypatch.setattr(composed_module, "CudaCapture", lambda device: found)
    found = Repeating()
    encoder = composed(encoders.model("mpnet"))
    for text_lengths in ([5], [3, 9], [4], [16]):
        text = packed_texts(text_lengths)
        with on_triton("varlen_attention", "pool"):
            result = encoder.run(*text, modes=("mean",))
        torch.testing.assert_close(result, without_graphs(encoder, *text, modes=("mean",)), rtol=1e-4, atol=1e-4)
    assert found.replayed == 3


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


# ---- on a GPU ----------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HALVES = [torch.float32, torch.bfloat16, torch.float16]
# all-MiniLM-L6-v2, all-mpnet-base-v2, xtremedistil-l6-h256, BERT-tiny and ModernBERT-base, with fewer layers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniLM": ("bert", {"hidden": 384, "heads": 12, "intermediate_size": 1536}),
    "MPNet": ("mpnet", {"hidden": 768, "heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514}),
    "xtremedistil": ("bert", {"hidden": 256, "heads": 8, "intermediate_size": 1024}),
    "tiny": ("bert", {"hidden": 128, "heads": 2, "intermediate_size": 512}),
    "ModernBERT": ("modernbert", {"hidden": 768, "heads": 12, "intermediate_size": 1152}),
}


@pytest.fixture
def switched_on() -> Iterator[None]:
    with encoders.surroundings():
        yield


def on_the_gpu(shape: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model_type, sizes = SHAPES[shape]
    made = encoders.model(model_type, **{"max_position_embeddings": 514, **sizes, **options}).to(GPU, dtype)
    sentfast.accelerate(made)
    inputs = encoders.batch([60, 3, 1, 300, 17, 128])
    return made, {name: x.to(GPU) for name, x in inputs.items()}


def exact_on_cpu(made: Any, inputs: dict[str, Tensor]) -> Tensor:
    with sentfast.disabled():
        return encoders.exact(copy.deepcopy(made).cpu(), {name: x.cpu() for name, x in inputs.items()})


def ran_on_kernels() -> bool:
    report = sentfast.report()
    names = {name for name, backend in report.calls if backend in ("cuda", "triton")}
    others = {backend for _, backend in report.calls} - {"cuda", "triton"}
    return {"varlen_attention", "dropout_add_layer_norm"} <= names and not others and not report.fallbacks


@on_gpu
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_padded_batch(shape: str, dtype: torch.dtype) -> None:
    made, inputs = on_the_gpu(shape, dtype)
    used = inputs["attention_mask"].bool()
    eager, exact = encoders.stock(made, **inputs)[0][used], exact_on_cpu(made, inputs)
    sentfast.report(reset=True)
    result = made(**inputs)[0]
    assert ran_on_kernels(), str(sentfast.report())
    assert result.device == GPU and not result[~used].any()
    assert_accurate(result[used].cpu(), eager.cpu(), exact, size=4 * exact.abs().max().item())


@on_gpu
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["MiniLM", "MPNet", "ModernBERT"])
def test_gpu_autocast(shape: str, dtype: torch.dtype) -> None:
    made, inputs = on_the_gpu(shape)
    used = inputs["attention_mask"].bool()
    with torch.autocast("cuda", dtype):
        eager = encoders.stock(made, **inputs)[0][used]
        sentfast.report(reset=True)
        result = made(**inputs)[0][used]
    assert ran_on_kernels(), str(sentfast.report())
    exact = exact_on_cpu(made, inputs)
    assert result.dtype == eager.dtype
    size = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert_accurate(result.cpu(), eager.cpu(), exact, size=size)


@on_gpu
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("way", ["float32", "bfloat16 autocast", "float16 autocast and scaler", "checkpoints"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_training_step(shape: str, way: str) -> None:
    """Gradients as near to the exact ones as those of transformers, over all parameters."""
    model_type, _ = SHAPES[shape]
    known = vars(encoders.config(model_type))
    rates = {name: 0.0 for name in test_training.RATES if name in known}
    made, inputs = on_the_gpu(shape, **rates)
    made.train()
    if way == "checkpoints":
        test_training.checkpoint_layers(made)
    used = inputs["attention_mask"].bool()
    weights = torch.randn(int(used.sum()), made.config.hidden_size, device=GPU)
    dtype = {"b": torch.bfloat16, "f": torch.float16}[way[0]] if "autocast" in way else None

    def gradient() -> Tensor:
        made.zero_grad()
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=dtype == torch.float16)
        with torch.enable_grad(), torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            loss = (made(**inputs)[0][used].float() * weights).mean()
        scaler.scale(loss).backward()
        found = [p.grad.double().flatten() for p in made.parameters() if p.grad is not None]
        return torch.cat(found) / scaler.get_scale() if dtype == torch.float16 else torch.cat(found)

    sentfast.report(reset=True)
    ours = gradient()
    assert ran_on_kernels(), str(sentfast.report())
    with sentfast.disabled():
        eager = gradient()
        made.double()
        weights, dtype = weights.double(), None
        exact = gradient()
    assert ours.shape == exact.shape
    norm = exact.norm()
    eps = torch.finfo(torch.float32).eps
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 64 * eps * norm


@on_gpu
@needs_fused
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("count", [1, 23, 700])
def test_gpu_encode(path: str, case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("_FIRST_WINDOW", 64), ("_WINDOW_ON_DEVICE", 128), ("TOKENS_ON_DEVICE", 3000)):
        monkeypatch.setattr(encode, name, number)
    model = tiny_models.build(path, models.Dense(tiny_models.HIDDEN, 16), models.Normalize()).to(GPU)
    texts, arguments = tiny_models.texts(count), ARGUMENTS[case]
    with sentfast.disabled():
        eager = model.encode(texts, **arguments)
        exact = copy.deepcopy(model).double().encode(texts, **arguments)
    for _ in range(4):  # the third time small batches are graphs
        sentfast.report(reset=True)
        result = model.encode(texts, **arguments)
        assert not sentfast.report().fallbacks
        assert type(result) is type(eager) and len(result) == len(eager)
        found = [torch.stack(x) if isinstance(x, list) else torch.as_tensor(x) for x in (result, eager, exact)]
        assert found[0].dtype == found[1].dtype and found[0].device == found[1].device
        assert_accurate(found[0].cpu(), found[1].cpu(), found[2].cpu(), size=1.0)


@on_gpu
@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("shape", ["MiniLM", "MPNet", "ModernBERT"])
def test_gpu_graphs(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed on other batches of their bucket, on two streams and after new weights."""
    made, _ = on_the_gpu(shape, torch.float16)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for scale in (1.0, 1.5):
        made.get_input_embeddings().weight.mul_(scale)
        encoder = composed(made)
        assert encoder._graphs is not None
        for number, text_lengths in enumerate([[14], [14], [9], [200, 30], [230], [120, 60, 70], [16], [1, 12]] * 2):
            text = packed_texts(text_lengths)
            with torch.cuda.stream(streams[number % 2]):
                result = encoder.run(*text, modes=("mean",), normalize=True)
            torch.cuda.synchronize()
            expected = without_graphs(encoder, *text, modes=("mean",), normalize=True)
            torch.testing.assert_close(result, expected, rtol=2e-3, atol=2e-3)
        assert len(encoder._graphs) >= 3


@on_gpu
@pytest.mark.usefixtures("switched_on")
def test_gpu_waits_for_nothing() -> None:
    """PyTorch itself refuses to wait here; with the lengths noted, as a data loader's batch has them."""
    made, inputs = on_the_gpu("MiniLM", torch.float16)
    lengths.note(inputs["attention_mask"], np.array([60, 3, 1, 300, 17, 128]))
    encoder = composed(made)
    made(**inputs)
    text = packed_texts([40, 300])
    for _ in range(3):
        encoder.run(*text, modes=("mean",))
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)  # those may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(**inputs)
        encoder.run(*text, modes=("mean",))
        without_graphs(encoder, *text, modes=("mean",))
    finally:
        torch.cuda.set_sync_debug_mode("default")
