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
from sentfast import reference
from sentfast.encoder import encoder as module
from sentfast.encoder import encoder_of, examine, on_cpu, watch, weights
from sentfast.encoder.verify import ALLOWED

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
    packed = weights.pack(examine.examine(model), torch.float32).tensors
    head = reference.Embedding(*packed[: len(reference.Embedding._fields)])
    assert head.positions.data_ptr() == model.embeddings.position_embeddings.weight.data_ptr()
    assert head.norm_weight.data_ptr() == model.embeddings.LayerNorm.weight.data_ptr()


@pytest.mark.parametrize("kind", ["bert", "mpnet", "electra", "modernbert"])
def test_float32_matrices_are_the_parameters_themselves(kind):
    model, batch = encoders.model(kind), encoders.batch(LENGTHS)
    packed = weights.pack(examine.examine(model), torch.float32)
    layer = reference.Layer(*packed.tensors[len(reference.Embedding._fields) :][:14])
    own = {parameter.data_ptr() for parameter in model.parameters()}
    matrices = (layer.qkv_weight, layer.output_weight, layer.up_weight, layer.down_weight)
    assert all(x.ndim == 2 and x.data_ptr() in own for x in matrices) and not packed.large.bytes
    check(model, batch)
    with torch.no_grad():
        matrices[0].mul_(1.5)
    check(model, batch)


def test_every_parameter_is_read_where_it_is_or_compared():
    for kind in encoders.MODEL_TYPES:
        for dtype in (torch.float32, torch.bfloat16):
            parts = examine.examine(encoders.model(kind).to(dtype))
            packed = weights.pack(parts, torch.float32)
            known = {
                x.data_ptr()
                for x in (*packed.tensors, *packed.small.tensors, *packed.large.tensors, parts.words.weight)
            }
            assert {x.data_ptr() for x in weights.parameters_of(parts)} <= known


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
    write_through_data,
    there_and_back,
    lambda model: model.bfloat16(),
    lambda model: model.half(),
)
IN_PLACE = (optimise, load, write_through_data)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_renewed(change):
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    first, before = check(model, inputs)
    assert encoder_of(model) is first
    change(model)
    second, after = check(model, inputs)
    assert change in IN_PLACE or second is not first
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

    monkeypatch.setattr(on_cpu, "pack", slow)
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


STEPS_OF_PACKING = (
    (weights, "pack_panels"),
    (watch, "bytes_of"),
    (weights, "_rotary"),
    (torch.Tensor, "clone"),
    (torch, "cat"),
)


@pytest.mark.parametrize("taken_back", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_while_weights_are_packed_shows(dtype, taken_back, monkeypatch):
    """Another thread writes between the reading of a parameter and the note of what it was, and may take it back."""
    model, inputs = sentfast.accelerate(encoders.model("bert").to(dtype)), encoders.batch([5, 1, 9])
    layer = model.encoder.layer[int(torch.randint(2, ()))]
    found = [layer.attention.self.query.bias, layer.attention.self.value.bias]
    found += [] if dtype == torch.float32 else [layer.output.dense.weight, layer.attention.self.key.weight]
    parameter = found[int(torch.randint(len(found), ()))]
    before, edits = parameter.detach().clone(), []

    def edit(*args):
        """As another thread may, at any step of packing."""
        if not edits:
            edits.append(1)
            parameter.data.add_(1)

    def after(result):
        if taken_back:
            parameter.data.copy_(before)
        return result

    assert not isinstance(encoder_of(model), str)
    found = encoder_of(model)
    for step in STEPS_OF_PACKING:
        owner, name = step
        original = getattr(owner, name)
        edits.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, lambda *args, original=original, **kw: (edit(), original(*args, **kw))[1])
            patch.setattr(on_cpu, "pack", lambda *args: after(weights.pack(*args)))
            found.refresh()
        sure = on_cpu.ALL_AT
        monkeypatch.setattr(on_cpu, "ALL_AT", 1)  # every call compares everything
        with torch.no_grad():
            result = model(**inputs)[0][inputs["attention_mask"].bool()].float()
            expected = encoders.stock(lambda m, i: m(**i)[0][i["attention_mask"].bool()].float(), model, inputs)
        monkeypatch.setattr(on_cpu, "ALL_AT", sure)
        size = expected.abs().max().item()
        assert (result - expected).abs().max() <= ALLOWED[dtype] * size, (step, edits)
        parameter.data.copy_(before)


@pytest.mark.parametrize("moved", [False, True])
def test_an_edit_of_a_buffer_while_a_model_is_examined_shows(moved, monkeypatch):
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch([5, 1, 9])
    positions, made = model.embeddings.position_ids, module.State

    def state(*args):
        positions.numpy()[0, 0] = 7
        return made(*args)

    if moved:
        assert not isinstance(encoder_of(model), str)
        model.embeddings.word_embeddings.weight.data = model.embeddings.word_embeddings.weight.data.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "State", state)
        encoder_of(model)
    with torch.no_grad():
        expected = encoders.stock(lambda m, i: m(**i)[0], model, inputs)
        assert (model(**inputs)[0] - expected)[
            inputs["attention_mask"].bool()
        ].abs().max() < 1e-4 * expected.abs().max()
