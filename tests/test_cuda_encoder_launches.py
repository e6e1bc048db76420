"""What the encoder launches on a GPU, seen on fake CUDA tensors.

A tensor left on the wrong device, or a value that the host would have to wait for, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import encoders
import numpy as np
import pytest
import torch
from cuda_encoders import GPU, LENGTHS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sentfast import registry
from sentfast.encoder import Composed, device, examine, graphs, lengths, pack_on_device, structure, training
from sentfast.encoder import composed as composed_module
from sentfast.integrations import guards
from sentfast.reference import POOLING_MODES

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
    # Nor has a fake buffer numbers, which are looked at once, when a model is examined.
    monkeypatch.setattr(examine, "_check_buffers", lambda model: None)
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


PER_LAYER = 7


def test_no_number_is_read_to_see_changes() -> None:
    """What is compared at every call, of tensors that have no numbers: to read one is an error."""
    weights, buffer = torch.empty(3, 2, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    state, written = structure.State([weights], [buffer]), structure.Versions([weights])
    assert state.same() and written.same()
    weights.mul_(2)
    assert state.same() and not written.same()
    buffer.add_(1)
    assert not state.same_buffers()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_launches_and_devices(model_type: str, dtype: torch.dtype, gpu: Launches) -> None:
    """Seven launches a layer; every tensor on the GPU; nothing that the host waits for."""
    layers = {"n_layers" if model_type == "distilbert" else "num_hidden_layers": 6}

    def count(**options: Any) -> tuple[int, int]:
        parts = parts_on_gpu(model_type, dtype, **options)
        encoder = Composed(parts, dtype)
        names = launches_of(gpu, lambda: encoder.run_host(host_batch(LENGTHS), MEAN))
        assert names[-1] == "pool"
        return len(names), len(parts.layers)

    (few, short), (many, deep) = count(), count(**layers)
    assert (many - few) / (deep - short) <= PER_LAYER
    assert few - short * PER_LAYER <= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("model_type", "together", "apart"),
    [
        ("bert", "linear_activation", "bias_activation"),
        ("modernbert", "linear_gated_activation", "gated_activation"),
    ],
)
def test_large_batches_in_float32_take_the_product_of_pytorch(
    model_type: str, together: str, apart: str, dtype: torch.dtype, gpu: Launches
) -> None:
    encoder = Composed(parts_on_gpu(model_type, torch.float32), dtype)
    for tokens in (2048, 2049):
        names = launches_of(gpu, lambda tokens=tokens: encoder.run_host(host_batch([1] * tokens), MEAN))
        fused = 0 if dtype == torch.float32 and tokens > 2048 else len(encoder._layers)
        assert names.count(together) == fused
        assert names.count(apart) == len(encoder._layers) - fused


def test_long_sequences_of_large_batches_are_turned_before_attention(gpu: Launches) -> None:
    """In the layers that see all of them; in the others, and in small batches, attention turns them."""
    encoder = Composed(parts_on_gpu("modernbert", torch.float16), torch.float16)
    layers, local = len(encoder._layers), sum(layer.window >= 0 for layer in encoder._layers)
    assert 0 < local < layers
    for text_lengths, apart in (([2048], 0), ([512] * 5, 0), ([513] + [512] * 4, layers - local)):
        batch = host_batch(text_lengths)
        names = launches_of(gpu, lambda batch=batch: encoder.run_host(batch, MEAN))
        assert names.count("rotate_") == names.count("varlen_attention") == apart
        assert names.count("rotary_attention") == layers - apart


def host_batch(text_lengths: list[int]) -> device.HostBatch:
    ids = np.arange(sum(text_lengths), dtype=np.int32)
    return device.HostBatch(ids, None, ids, np.cumsum([0, *text_lengths]).astype(np.int32))


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_bfloat16_products_cost_two_casts_a_layer(model_type: str, gpu: Launches) -> None:
    encoder = Composed(parts_on_gpu(model_type, torch.float32), torch.bfloat16)
    assert encoder.run_host(host_batch(LENGTHS), None).dtype == torch.float32
    names = launches_of(gpu, lambda: encoder.run_host(host_batch(LENGTHS), MEAN))
    assert names.count("_to_copy") == 2 * len(encoder._layers), names


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
    monkeypatch.setattr(training.torch, "randint", lambda *args, **kwargs: 3)
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
