"""The packed encoder on a GPU, if there is one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import encoders
import numpy as np
import pytest
import test_training
import tiny_models
import torch
from accuracy import assert_accurate
from cuda_encoders import ARGUMENTS, GPU, composed, needs_fused, packed_texts, without_graphs
from sentence_transformers import models
from torch import Tensor

import sentfast
from sentfast.encoder import lengths

if tiny_models.VERSION >= (6, 2):  # before, `encode` has no loop of its own
    from sentfast.integrations import encode

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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_base(tmp_path_factory.mktemp("models"), "mpnet")


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
    attention = {"varlen_attention", "rotary_attention"} & names
    return bool(attention) and "dropout_add_layer_norm" in names and not others and not report.fallbacks


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
