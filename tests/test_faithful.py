"""Never stale and never foreign: whatever is edited or patched shows in the next result, or the original code runs."""

from __future__ import annotations

import copy
import os
import types
from operator import attrgetter

import encoders
import numpy as np
import pytest
import torch
from tiny_models import build, save_base
from tiny_models import texts as some_texts
from torch import nn
from torch.nn import functional

import sentfast
from sentfast.encoder import encoder as module
from sentfast.encoder import encoder_of, encoder_or_parts, on_cpu, verify
from sentfast.encoder.examine import inner_modules
from sentfast.encoder.model_lookups import ModelLookups
from sentfast.encoder.verify import ALLOWED, twin

LENGTHS = [9, 1, 5]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


def drawn(count: int) -> int:
    return int(torch.randint(count, ()))


def hidden(model, inputs):
    return model(**inputs)[0][inputs["attention_mask"].bool()].float()


def difference(model, inputs):
    """Between the accelerated model and the original, relative to the largest number."""
    expected = encoders.stock(hidden, model, inputs)
    return ((hidden(model, inputs) - expected).abs().max() / expected.abs().max()).item()


def place(tensor):
    """The index of one element."""
    return tuple(drawn(size) for size in tensor.shape)


def other(tensor):
    """New values, as far from the old as they are large."""
    return torch.randn_like(tensor) * 0.3 if tensor.is_floating_point() else (tensor == 0).to(tensor.dtype)


def change(x, index):
    """Of positions and token types to numbers that every table has."""
    whole = not torch.as_tensor(x[index]).is_floating_point() and len(index) == 2 and x.shape[0] == 1
    x[index] = x[index] == 0 if whole else x[index] + 3


def in_place(owner, name):
    x = getattr(owner, name)
    with torch.no_grad():
        x.copy_(other(x))


def one_element(owner, name):
    x = getattr(owner, name)
    with torch.no_grad():
        change(x, place(x))


def one_element_of_data(owner, name):
    x = getattr(owner, name).data
    change(x, place(x))


def part_of_data(owner, name):
    x = getattr(owner, name).data
    x[x.shape[0] // 2 :] = other(x[x.shape[0] // 2 :])


def new_data(owner, name):
    x = getattr(owner, name)
    x.data = other(x.data)


def transposed_data(owner, name):
    x = getattr(owner, name)
    x.data = x.data.t() if x.ndim == 2 and x.shape[0] == x.shape[1] else other(x.data).t().contiguous().t()


def numpy_element(owner, name):
    x = getattr(owner, name).detach()
    x = x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x
    change(x.numpy(), place(x))


def dlpack(owner, name):
    x = getattr(owner, name).detach()
    x = x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x
    y = torch.from_dlpack(x) if drawn(2) else torch.from_numpy(np.from_dlpack(x))
    change(y, place(y))


def another_process(owner, name):
    x = getattr(owner, name).data
    index = place(x)
    x.share_memory_()
    child = os.fork()
    if child == 0:
        change(x, index)
        os._exit(0)
    os.waitpid(child, 0)


def set_storage(owner, name):
    x = getattr(owner, name)
    with torch.no_grad():
        x.set_(other(x.detach()))


def swap(owner, name):
    x = getattr(owner, name)
    made = other(x.detach())
    torch.utils.swap_tensors(x, nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made)


def replaced(owner, name):
    x = getattr(owner, name)
    made = other(x.detach())
    setattr(owner, name, nn.Parameter(made) if isinstance(x, nn.Parameter) else made)


ROADS = (
    in_place,
    one_element,
    one_element_of_data,
    part_of_data,
    new_data,
    transposed_data,
    numpy_element,
    dlpack,
    set_storage,
    swap,
    replaced,
)
if hasattr(os, "fork"):
    ROADS += (another_process,)


def tensors(model):
    """(module, name) of every parameter and buffer that the encoder stands for."""
    return [
        (inner, name)
        for _, inner in inner_modules(model)
        for table in (inner._parameters, inner._buffers)
        for name, x in table.items()
        if x is not None and x.numel()
    ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_every_edit_of_a_tensor_shows_at_once(kind):
    model, inputs = sentfast.accelerate(encoders.model(kind)), encoders.batch(LENGTHS)
    found = tensors(model)
    for _ in range(12):
        hidden(model, inputs)
        owner, name = found[drawn(len(found))]
        road = ROADS[drawn(len(ROADS))]
        before = getattr(owner, name).clone()
        road(owner, name)
        what = f"{kind}: {road.__name__} of {type(owner).__name__}.{name} {list(before.shape)}"
        assert not torch.equal(getattr(owner, name), before), what
        assert difference(model, inputs) < ALLOWED[torch.float32], what


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
@pytest.mark.parametrize("way", ["large call", "small calls", "refresh"])
def test_an_edit_of_a_packed_model_shows_in_time(kind, way, monkeypatch):
    dtype = (torch.bfloat16, torch.float16)[drawn(2)]
    model, inputs = sentfast.accelerate(encoders.model(kind).to(dtype)), encoders.batch(LENGTHS)
    monkeypatch.setattr(on_cpu, "ALL_AT", sum(LENGTHS) if way == "large call" else 1 << 30)
    monkeypatch.setattr(on_cpu, "MOST_CALLS", 8)
    found = [(owner, name) for owner, name in tensors(model) if getattr(owner, name).is_floating_point()]
    for _ in range(3):
        hidden(model, inputs)
        owner, name = found[drawn(len(found))]
        road = ROADS[drawn(len(ROADS))]
        road(owner, name)
        if way == "refresh":
            sentfast.refresh(model)
        for _ in range(8 if way == "small calls" else 0):
            hidden(model, inputs)
        what = f"{kind}, {dtype}: {road.__name__} of {type(owner).__name__}.{name}"
        assert difference(model, inputs) < ALLOWED[dtype], what
        again = twin(model)
        if not isinstance(encoder_of(again), str):  # to the bit as a model that has never been anything else
            assert torch.equal(hidden(model, inputs), hidden(sentfast.accelerate(again), inputs)), what


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_copies_that_nobody_asked_for_are_never_old(kind, dtype, tmp_path):
    """Of a model in half precision, or under autocast: in `encode`, with nothing but the import."""
    model, texts = build(save_base(tmp_path, kind)), some_texts(3)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    allowed = ALLOWED[torch.bfloat16 if dtype == "autocast" else dtype]
    model = model if dtype == "autocast" else model.to(dtype)

    def encoded(model):
        with cast:
            return model.encode(texts, convert_to_tensor=True).float()

    found = [(owner, name) for owner, name in tensors(model[0].auto_model) if getattr(owner, name).is_floating_point()]
    for _ in range(6):
        sentfast.report(reset=True)
        encoded(model)
        assert any(name == "encoder" for name, _ in sentfast.report().calls), sentfast.report()
        owner, name = found[drawn(len(found))]
        road = ROADS[drawn(len(ROADS))]
        road(owner, name)
        with sentfast.disabled():
            expected = encoded(model)
        error = (encoded(model) - expected).abs().max() / expected.abs().max()
        assert error < allowed, f"{kind}: {road.__name__} of {type(owner).__name__}.{name}"


def test_edits_of_a_model_with_adapters_show_at_once():
    peft = pytest.importorskip("peft")
    kind, names = encoders.ADAPTED["some"]
    model = encoders.model(kind)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, init_lora_weights=False), model)
    model, inputs = sentfast.accelerate(model.eval()), encoders.batch(LENGTHS)
    found = tensors(model)
    for _ in range(8):
        hidden(model, inputs)
        owner, name = found[drawn(len(found))]
        one_element_of_data(owner, name)
        assert difference(model, inputs) < ALLOWED[torch.float32], name


# ---- what is not a tensor ----


def layers(model):
    return attrgetter(module.architecture_of(type(model))[0].layers)(model)


def half_attention(*arguments, **options):
    arguments = list(arguments)
    options["scaling" if "scaling" in options else "scale"] = 0.05
    return ORIGINAL_SDPA(*arguments, **options)


ORIGINAL_SDPA = functional.scaled_dot_product_attention


def scaling(model, patch):
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.01


def causal(model, patch):
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True


def fewer_heads(model, patch):
    for layer in model.encoder.layer:
        layer.attention.self.num_attention_heads //= 2
        layer.attention.self.attention_head_size *= 2


def chunk_of_a_class(model, patch):
    cls = type(model.encoder.layer[0])
    original = cls.feed_forward_chunk
    patch.setattr(cls, "feed_forward_chunk", lambda self, x: original(self, x) * 1.5)


def chunk_of_a_layer(model, patch):
    layer = model.encoder.layer[drawn(2)]
    original = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: original(x) * 1.5


def sdpa(model, patch):
    patch.setattr(functional, "scaled_dot_product_attention", half_attention)


def linear(model, patch):
    original = functional.linear
    patch.setattr(functional, "linear", lambda x, *others: original(x * 1.1, *others))


def norm_forward(model, patch):
    original = nn.LayerNorm.forward
    patch.setattr(nn.LayerNorm, "forward", lambda self, x: original(self, x) * 1.1)


def norm_code(model, patch):
    patch.setattr(nn.LayerNorm.forward, "__code__", (lambda self, x: x * 1.1).__code__)


def activation(model, patch):
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn.act = torch.tanh


def epsilon(model, patch):
    for _, inner in inner_modules(model):
        if isinstance(inner, nn.LayerNorm):
            inner.eps = 0.1


def one_epsilon(model, patch):
    model.encoder.layer[drawn(2)].output.LayerNorm.eps = 0.1


def positions(model, patch):
    model.embeddings.position_ids.copy_(model.embeddings.position_ids.flip(1))


def token_types(model, patch):
    if hasattr(model.embeddings, "token_type_ids"):
        model.embeddings.token_type_ids.fill_(1)


def other_positions(model, patch):
    model.embeddings.position_ids = model.embeddings.position_ids + 1


def of_another_class(model, patch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.encoder.layer[drawn(2)].output.dense.__class__ = Doubled


def dictionary(model, patch):
    dense = model.encoder.layer[drawn(2)].output.dense
    dense.__dict__ = {**dense.__dict__, "forward": lambda x: torch.zeros(*x.shape[:-1], 32)}


def shadowed(model, patch):
    dense = model.encoder.layer[drawn(2)].output.dense
    dense.__dict__["weight"] = torch.randn_like(dense.weight)


BERT_EDITS = (
    scaling,
    causal,
    fewer_heads,
    chunk_of_a_class,
    chunk_of_a_layer,
    sdpa,
    linear,
    norm_forward,
    norm_code,
    activation,
    epsilon,
    one_epsilon,
    positions,
    token_types,
    other_positions,
    of_another_class,
    dictionary,
    shadowed,
)


def assert_honoured(edit, patching=pytest.MonkeyPatch.context):
    """Before and after the first call, and when it is taken back."""
    for called in (False, True):
        model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
        if called:
            assert difference(model, inputs) < ALLOWED[torch.float32]
            assert not isinstance(encoder_of(model), str)
        with patching() as patch:
            edit(model, patch)
            assert difference(model, inputs) < ALLOWED[torch.float32], f"called before: {called}"
        assert difference(model, inputs) < ALLOWED[torch.float32]


@pytest.mark.parametrize("edit", BERT_EDITS, ids=lambda edit: edit.__name__)
def test_every_other_edit_is_honoured_before_and_after_the_first_call(edit):
    assert_honoured(edit)


def test_attention_that_is_registered_anew_is_honoured():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    model, inputs = sentfast.accelerate(encoders.model("electra")), encoders.batch(LENGTHS)
    if not hasattr(registry, "_local_mapping"):
        pytest.skip("this version of transformers has no registry of attention functions")
    assert not isinstance(encoder_of(model), str)
    original = registry["sdpa"]
    try:
        registry["sdpa"] = lambda *arguments, **options: original(*arguments, **{**options, "scaling": 0.01})
        assert encoder_of(model) in ("SF110", "SF124")
        assert difference(model, inputs) < ALLOWED[torch.float32]
    finally:
        registry._local_mapping.pop("sdpa", None)
    assert not isinstance(encoder_of(model), str)


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_any_function_of_the_model_that_is_replaced_is_seen(kind):
    """Of those that its code names: in modules of Python, on classes, and by another code object."""
    model = encoders.model(kind)
    assert not isinstance(encoder_of(model), str)
    lookups = ModelLookups(model, [inner for _, inner in inner_modules(model)])
    found = [
        (space, name)
        for space, owner, names, _ in lookups.tables
        for name in names
        if owner is None and isinstance(space.get(name), types.FunctionType) and not name.startswith("__")
    ]
    for _ in range(6):
        space, name = found[drawn(len(found))]
        original = space[name]
        owner = next((cls for cls in lookups._by_class if vars(cls).get(name) is original), None)

        def patched(*arguments, _original=original, **options):
            return _original(*arguments, **options)

        try:
            setattr(owner, name, patched) if owner is not None else space.update({name: patched})
            assert encoder_of(model) in ("SF110", "SF124"), name
        finally:
            setattr(owner, name, original) if owner is not None else space.update({name: original})
        assert not isinstance(encoder_of(model), str), name


@pytest.mark.parametrize("kind", ["modernbert", "mpnet", "roberta"])
def test_what_only_some_architectures_have(kind):
    model, inputs = sentfast.accelerate(encoders.model(kind)), encoders.batch([12, 3])
    assert difference(model, inputs) < ALLOWED[torch.float32]
    if kind == "modernbert":
        for name, buffer in model.named_buffers():
            if "inv_freq" in name and "original" not in name:
                buffer.mul_(1.5)
    elif kind == "roberta":
        model.embeddings.padding_idx = 7
    else:
        model.encoder.relative_attention_bias.weight.data[drawn(32)] += 2
    assert difference(model, inputs) < ALLOWED[torch.float32]
    if kind == "modernbert" and hasattr(layers(model)[1], "attention_type"):
        layers(model)[1].attention_type = "full_attention"
        assert difference(model, inputs) < ALLOWED[torch.float32]


def outcome(function, *arguments):
    """The result, or the type of the error."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
@pytest.mark.parametrize("trains", [False, True])
def test_vectors_of_another_size_do_as_in_the_original(kind, trains):
    """A bias of one number is expanded by a linear layer, and is an error in a norm; a call before changes nothing."""
    for called in (False, True):
        model, inputs = sentfast.accelerate(encoders.model(kind)), encoders.batch(LENGTHS)
        with torch.set_grad_enabled(trains):
            if called:
                hidden(model, inputs)
            vectors = [(owner, name) for owner, name in tensors(model) if getattr(owner, name).ndim == 1]
            owner, name = vectors[drawn(len(vectors))]
            x = getattr(owner, name)
            if drawn(2):
                x.data = x.data[:1].clone()
            elif isinstance(x, nn.Parameter):
                setattr(owner, name, nn.Parameter(x.data[:1].clone()))
            found, expected = outcome(hidden, model, inputs), outcome(encoders.stock, hidden, model, inputs)
        what = f"{type(owner).__name__}.{name} after a call: {called}"
        if isinstance(expected, type):
            assert found is expected, what
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=what)


def test_a_buffer_without_memory_is_left_to_the_original():
    model, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    model.embeddings.position_ids = model.embeddings.position_ids.to("meta")
    assert encoder_of(model) == "SF103"
    assert "embeddings.position_ids is on meta" in module.refusal_of(model).detail
    model = sentfast.accelerate(encoders.model("bert"))
    hidden(model, inputs)
    model.embeddings.position_ids = model.embeddings.position_ids.to("meta")
    sentfast.report(reset=True)
    ours, stock = outcome(hidden, model, inputs), outcome(encoders.stock, hidden, model, inputs)
    # An error, or what transformers 4 makes of positions that are nowhere: whatever lies in new memory.
    assert ours is stock or ours.shape == stock.shape
    assert "SF103" in str(sentfast.report())


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_a_configuration_that_only_a_layer_has_is_compared(kind):
    """Copied with the layer, or come with it from another model."""
    model = sentfast.accelerate(encoders.model(kind))
    inner = [x for x in model.modules() if x is not model and "config" in vars(x)]
    if not inner:
        pytest.skip("no module of it has a configuration")
    owner = inner[drawn(len(inner))]
    owner.config = copy.copy(owner.config)
    entry = module._entry(model)
    assert entry.structure.same(model)
    changes = {"_attn_implementation_internal": "another", "initializer_range": 0.7, "something_new": 1}
    name = list(changes)[drawn(3)]
    setattr(owner.config, name, changes[name])
    assert not entry.structure.same(model), name


def test_a_copy_that_is_made_in_inference_mode_runs():
    """Its parameters can require no gradient, and the trial of a training step is for those that can."""
    original, inputs = encoders.model("bert"), encoders.batch(LENGTHS)
    with torch.inference_mode():
        model = copy.deepcopy(original)
        seen = []
        model.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        expected = encoders.stock(hidden, model, inputs)
        torch.testing.assert_close(hidden(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_the_trial_leaves_no_trace():
    """No random number, no counter, no gradient, no hook, no attribute; whatever mode the caller is in."""
    calls = []
    for way in range(4):
        model = encoders.model(encoders.MODEL_TYPES[drawn(8)])
        model.train(way == 3)
        model.register_forward_hook(lambda *arguments: calls.append("called"))
        before = [(list(vars(inner)), inner.training) for inner in model.modules()]
        sentfast.report(reset=True)
        state = torch.get_rng_state()
        mode = torch.inference_mode() if way == 1 else torch.no_grad()
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=way == 2):
            if way == 3:
                with torch.enable_grad():
                    found = encoder_or_parts(model, inside=True)
            else:
                found = encoder_of(model, inside=True)
        assert not isinstance(found, str), found
        assert torch.equal(torch.get_rng_state(), state)
        assert ("encoder", encoders.BACKEND) not in sentfast.report().calls
        assert before == [(list(vars(inner)), inner.training) for inner in model.modules()]
        assert not calls and all(parameter.grad is None for parameter in model.parameters())


def test_a_model_of_other_mathematics_keeps_its_code():
    """Something that no comparison of names could know: a constant inside the compiled code."""
    model = sentfast.accelerate(encoders.model("bert"))
    cls = type(model.encoder.layer[0].output)
    original = cls.forward.__code__
    try:
        space: dict = {}
        exec(
            "def forward(self, hidden_states, input_tensor):\n"
            "    hidden_states = self.dropout(self.dense(hidden_states))\n"
            "    return self.LayerNorm(hidden_states + 1.01 * input_tensor)",
            space,
        )
        cls.forward.__code__ = space["forward"].__code__
        inputs = encoders.batch(LENGTHS)
        sentfast.report(reset=True)
        with pytest.warns(sentfast.SentfastWarning, match=r"runs its own code: .*\[SF129\]"):
            assert encoder_of(model) == "SF129"
        assert "allowed" in module.refusal_of(model).detail
        assert difference(model, inputs) == 0
    finally:
        cls.forward.__code__ = original
    assert not isinstance(encoder_of(model), str)


def test_a_model_that_differs_is_tried_once(monkeypatch):
    """Neither packed nor run again in its next calls; after an edit of its code it is."""
    model, inputs, made = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS), []
    original = module._made
    monkeypatch.setattr(module, "_made", lambda *args: made.append(1) or original(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_cpu.Encoder, "run", lambda self, ids, *args, **kwargs: torch.zeros(len(ids), 32))
        for _ in range(3):
            assert encoder_of(model) == "SF129"
        assert len(made) == 1
        assert difference(model, inputs) == 0
        assert sentfast.report().fallbacks["BertModel.forward", "SF129"]
    assert encoder_of(model) == "SF129"  # as long as nothing of the model changes
    one_epsilon(model, None)
    epsilon(model, None)
    assert not isinstance(encoder_of(model), str)
    assert difference(model, inputs) < ALLOWED[torch.float32]
    assert len(made) == 2


def test_training_is_tried_too(monkeypatch):
    model = encoders.model("bert").train()
    monkeypatch.setattr(verify, "token_embeddings", lambda *arguments: torch.zeros(18, 32))
    with torch.enable_grad():
        assert encoder_or_parts(model) == "SF129"
