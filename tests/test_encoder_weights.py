"""The packed weights and the side table that holds them: renewed when anything changes, shared by threads, freed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
import weakref

import encoders
import pytest
import torch
from encoders import check, run
from torch import nn

import sentfast
from sentfast import native, reference
from sentfast.encoder import encoder as module
from sentfast.encoder import encoder_of, examine, weights

LENGTHS = [7, 1, 40, 23, 2]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(64, 64), (24, 32), (96, 33), (200, 7), (128, 72)])
def test_panels(rows, columns, dtype):
    weight = torch.randn(rows, columns)
    for pieces in ([weight], [weight, weight + 1, -weight]):
        expected = reference.pack_panels(torch.cat(pieces), [], dtype == torch.bfloat16)
        assert torch.equal(weights.panels(pieces, dtype), expected)
        assert torch.equal(weights.panels([piece.bfloat16() for piece in pieces], torch.bfloat16), expected) or (
            dtype == torch.float32
        )


def test_tables_and_norms_are_the_parameters_themselves():
    model = encoders.model("bert")
    packed = weights.pack(examine.examine(model), torch.float32)
    head = reference.Embedding(*packed[: len(reference.Embedding._fields)])
    assert head.positions.data_ptr() == model.embeddings.position_embeddings.weight.data_ptr()
    assert head.norm_weight.data_ptr() == model.embeddings.LayerNorm.weight.data_ptr()


@pytest.mark.parametrize("kind", ["bert", "mpnet", "electra", "modernbert"])
def test_a_large_model_keeps_its_matrices_where_they_are(kind, monkeypatch):
    model, batch = encoders.model(kind), encoders.batch(LENGTHS)
    _, in_panels = check(model, batch)
    monkeypatch.setattr(weights, "LARGE", 0)
    twin = copy.deepcopy(model)
    layer = reference.Layer(
        *weights.pack(examine.examine(twin), torch.float32)[len(reference.Embedding._fields) :][:14]
    )
    own = {parameter.data_ptr() for parameter in twin.parameters()}
    matrices = (layer.qkv_weight, layer.output_weight, layer.up_weight, layer.down_weight)
    assert all(x.ndim == 2 and x.data_ptr() in own for x in matrices)
    _, in_place = check(twin, batch)
    assert torch.equal(in_place, in_panels) or encoders.BACKEND == "reference"
    with torch.no_grad():
        matrices[0].mul_(1.5)
    check(twin, batch)


def test_missing_biases_count_as_zero():
    model = encoders.model("bert")
    for layer in model.encoder.layer:
        layer.attention.self.key.bias = None
        layer.output.dense.bias = None
    check(model, encoders.batch(LENGTHS))


def optimise(model):
    with torch.enable_grad():
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        with sentfast.disabled():
            model(**encoders.batch([4])).last_hidden_state.square().mean().backward()
        optimiser.step()


def load(model):
    model.load_state_dict(encoders.model("bert").state_dict())


def assign(model):
    dense = model.encoder.layer[1].output.dense
    dense.weight.data = torch.randn_like(dense.weight)


def replace_module(model):
    layer = model.encoder.layer[0].intermediate
    layer.dense = nn.Linear(32, 74)


def replace_parameter(model):
    model.encoder.layer[0].output.dense.bias = nn.Parameter(torch.randn(32))


def replace_activation(model):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def write_through_data(model):
    model.encoder.layer[1].attention.self.value.weight.data.add_(0.3)


def there_and_back(model):
    model.half().float()


def fewer_layers(model):
    del model.encoder.layer[1]


CHANGES = (
    optimise,
    load,
    assign,
    replace_module,
    replace_parameter,
    replace_activation,
    fewer_layers,
    lambda model: model.bfloat16(),
    lambda model: model.half(),
)
NEED_FINGERPRINT = (write_through_data, there_and_back)


@pytest.mark.parametrize("change", [*CHANGES, *NEED_FINGERPRINT], ids=lambda change: change.__name__)
def test_weights_are_renewed(change):
    if change in NEED_FINGERPRINT and not hasattr(native.state.cpu, "fingerprint"):
        pytest.skip("the compiled library has no fingerprint")
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    first, before = check(model, inputs)
    assert encoder_of(model) is first
    change(model)
    second, after = check(model, inputs)
    assert second is not first
    assert (after.float() - before.float()).abs().max() > 1e-5


def test_tensors_of_inference_mode_are_renewed_too():
    with torch.inference_mode():
        model = encoders.model("bert")
        inputs = encoders.batch(LENGTHS)
        before = run(encoder_of(model), inputs)
        model.encoder.layer[0].output.dense.weight = nn.Parameter(torch.randn(32, 74), requires_grad=False)
        assert (run(encoder_of(model), inputs) - before).abs().max() > 1e-3


def test_attributes_do_not_renew_weights():
    model = encoders.model("bert")
    first = encoder_of(model)
    model.encoder.layer[0].note = "mine"
    assert encoder_of(model) is first


def test_nothing_is_stored_on_the_model():
    model = encoders.model("bert")
    names, state, pickled = list(vars(model)), model.state_dict(), pickle.dumps(model)
    parameters = [id(parameter) for parameter in model.parameters()]
    encoder_of(model)
    sentfast.accelerate(model)
    model(**encoders.batch([4, 2]))
    assert list(vars(model)) == names and pickle.dumps(model) == pickled
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    clone = copy.deepcopy(model)
    assert sentfast.is_accelerated(model) and not sentfast.is_accelerated(clone)
    assert encoder_of(clone) is not encoder_of(model)
    sentfast.restore(model)


def test_a_model_is_freed():
    model = encoders.model("mpnet")
    encoder = encoder_of(model)
    gone, packed = weakref.ref(model), weakref.ref(encoder)
    del model, encoder
    gc.collect()
    assert gone() is None and packed() is None


def test_two_threads_pack_once(monkeypatch):
    model, packed, found = encoders.model("bert"), [], []

    def slow(*arguments):
        packed.append(threading.get_ident())
        time.sleep(0.05)
        return weights.pack(*arguments)

    def worker():
        with torch.no_grad():
            found.append(encoder_of(model))

    monkeypatch.setattr(module, "pack", slow)
    threads = [threading.Thread(target=worker) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1 and len(found) == 8 and len(set(map(id, found))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_packs():
    model, entered, leave = encoders.model("bert"), threading.Event(), threading.Event()

    def hold():
        with module._lock:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if not isinstance(encoder_of(model), str) else 1)
    leave.set()
    thread.join()
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that nobody holds")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(encoders.BACKEND != "cpu", reason="the compiled CPU kernels are not loaded")
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_small_model_is_packed_after_its_first_groups_and_keeps_its_bits(kind, monkeypatch):
    model, batch = encoders.model(kind), encoders.batch(LENGTHS)
    packed = []

    def counted(*arguments):
        packed.append(arguments[2:])
        return weights.pack(*arguments)

    monkeypatch.setattr(module, "pack", counted)
    monkeypatch.setattr(module, "GROUP", sum(LENGTHS))
    monkeypatch.setattr(module, "AS_THEY_ARE", 1)
    results = [check(model, batch)[1] for _ in range(3)]
    assert packed == [(True,), ()]
    assert all(torch.equal(results[0], result) for result in results[1:])
    monkeypatch.setattr(module, "AS_THEY_ARE", 0)
    assert torch.equal(check(copy.deepcopy(model), batch)[1], results[0])
    assert packed == [(True,), (), (True,), ()]
