"""Every reason why a call of an accelerated model runs the code of transformers, and that it then does."""

from __future__ import annotations

import warnings
from pathlib import Path

import encoders
import pytest
import torch
import transformers
from encoders import ran, stock
from sentence_transformers import util
from torch import nn

import sentfast
from sentfast import native
from sentfast.doctor import _isa
from sentfast.encoder import encoder_of, products
from sentfast.integrations import guards
from sentfast.report import REASONS

LENGTHS = [5, 1, 12]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 2


class MyLinear(nn.Linear):
    pass


class Overriding(transformers.BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Named(transformers.BertModel):
    pass


def first_layer(model):
    return model.encoder.layer[0]


def adapter_layer(model):
    first_layer(model).attention.self.query = Adapter(first_layer(model).attention.self.query)


def linear_subclass(model):
    first_layer(model).output.dense = MyLinear(74, 32)


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise = torch.ao.quantization.quantize_dynamic
        model.encoder = quantise(model.encoder, {nn.Linear}, dtype=torch.qint8)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(first_layer(model).output.dense)


def instance_forward(model):
    layer = first_layer(model).intermediate
    layer.forward = lambda x: type(layer).forward(layer, x) * 2


def forward_of_the_model(model):
    model.forward = lambda *args, **kwargs: "mine"


def sparse(model):
    dense = first_layer(model).output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to_sparse())


def mixed(model):
    first_layer(model).output.dense.half()


def hook(model):
    first_layer(model).register_forward_hook(lambda module, arguments, output: None)


def replaced_hooks(model):
    layer = first_layer(model)
    layer._forward_hooks = type(layer._forward_hooks)()
    hook(model)


def pre_hook(model):
    first_layer(model).output.dense.register_forward_pre_hook(lambda module, arguments: None)


def dropout(model):
    model.train()


def monte_carlo(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def decoder(model):
    model.config.is_decoder = True


def attentions(model):
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True


def hidden_states(model):
    model.config.output_hidden_states = True


def flash(model):
    model.config._attn_implementation_internal = "flash_attention_2"


def two_epsilons(model):
    first_layer(model).output.LayerNorm.eps = 0.5
    model.encoder.layer = nn.ModuleList(model.encoder.layer)


def renorm(model):
    model.embeddings.token_type_embeddings = nn.Embedding(2, 32, max_norm=1.0)


def no_scale(model):
    first_layer(model).output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)


def unknown_part(model):
    first_layer(model).attention.self.distance = nn.Embedding(5, 8)


def quick_gelu(model):
    first_layer(model).intermediate.intermediate_act_fn = transformers.activations.ACT2FN["quick_gelu"]


def no_layers(model):
    model.encoder.layer = nn.ModuleList()


def two_devices(model):
    first_layer(model).output.dense.to("meta")


def replica(model):
    model._is_replica = True  # as nn.DataParallel marks what it makes for each GPU


def compiled(model):
    model.compile()


CHANGES = {
    adapter_layer: "SF108",
    linear_subclass: "SF108",
    quantised: "SF108",
    parametrised: "SF108",
    instance_forward: "SF110",
    forward_of_the_model: "SF110",
    sparse: "SF105",
    mixed: "SF102",
    hook: "SF120",
    replaced_hooks: "SF120",
    pre_hook: "SF120",
    dropout: "SF122",
    monte_carlo: "SF122",
    attentions: "SF121",
    hidden_states: "SF121",
    flash: "SF124",
    decoder: "SF125",
    two_epsilons: "SF125",
    renorm: "SF125",
    no_scale: "SF125",
    unknown_part: "SF125",
    quick_gelu: "SF125",
    no_layers: "SF125",
    two_devices: "SF103",
    replica: "SF114",
    compiled: "SF127",
    lambda model: model.double(): "SF102",
    lambda model: model.to("meta"): "SF103",
}
BEFORE_FIRST_USE_ONLY = {two_epsilons}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_reason(change, used_before):
    model = encoders.model("bert")
    if used_before:
        assert not isinstance(encoder_of(model), str)
    change(model)
    for _ in range(2):
        assert encoder_of(model) == CHANGES[change]


def test_a_reason_that_goes_away():
    model = encoders.model("bert")
    handle = first_layer(model).register_forward_hook(lambda module, arguments, output: None)
    assert encoder_of(model) == "SF120"
    handle.remove()
    assert not isinstance(encoder_of(model), str)
    query = first_layer(model).attention.self.query
    adapter_layer(model)
    assert encoder_of(model) == "SF108"
    first_layer(model).attention.self.query = query
    assert not isinstance(encoder_of(model), str)
    model.double()
    assert encoder_of(model) == "SF102"
    model.float()
    assert not isinstance(encoder_of(model), str)
    model.train()
    assert encoder_of(model) == "SF122"
    for module in model.modules():
        module.p = 0.0
    assert not isinstance(encoder_of(model), str)


def test_classes_of_the_user():
    config = encoders.config("bert")
    assert encoder_of(Overriding(config).eval()) == "SF110"
    assert not isinstance(encoder_of(Named(config).eval()), str)
    assert encoder_of(nn.Linear(2, 2)) == "SF123"
    config = transformers.BertConfig(**{**encoders.config("bert").to_dict(), "is_decoder": True})
    assert encoder_of(transformers.BertModel(config).eval()) == "SF125"


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 has no relative keys")
def test_relative_keys():
    assert encoder_of(encoders.model("bert", position_embedding_type="relative_key")) == "SF125"


@pytest.mark.parametrize("owner", ["BertModel", "BertLayer", "BertSelfAttention", "BertIntermediate"])
def test_classes_patched_by_other_code(owner, monkeypatch):
    bert = transformers.models.bert.modeling_bert
    model = encoders.model("bert")
    used = type(first_layer(model).attention.self) if owner == "BertSelfAttention" else getattr(bert, owner)
    for patch_first in (True, False):
        model = encoders.model("bert")
        if not patch_first:
            assert not isinstance(encoder_of(model), str)
        with monkeypatch.context() as patch:
            patch.setattr(used, "forward", lambda self, *args, **kwargs: "mine")
            assert encoder_of(model) == "SF110"
        assert not isinstance(encoder_of(model), str)


def test_attention_registered_by_other_code(monkeypatch):
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    model = encoders.model("bert", attn_implementation="sdpa")
    original = functions["sdpa"]
    try:
        functions["sdpa"] = lambda *args, **kwargs: "mine"
        assert encoder_of(model) == "SF124"
    finally:
        functions["sdpa"] = original


def test_mpnet_bias_of_other_code():
    model = encoders.model("mpnet")
    model.encoder.relative_attention_bias = nn.Embedding(20, 4)
    assert encoder_of(model) == "SF125"
    model = encoders.model("mpnet")
    model.encoder.compute_position_bias = lambda x: 0
    assert encoder_of(model) == "SF110"


def test_rotary_angles_that_depend_on_the_batch():
    model = encoders.model("modernbert")
    rotary = getattr(model, "rotary_emb", None)
    if rotary is None:
        for layer in model.layers:
            layer.attn.rotary_emb.rope_type = "dynamic"
    else:
        rotary.rope_type = dict.fromkeys(rotary.rope_type, "dynamic")
    assert encoder_of(model) == "SF125"


def test_sharded_parameters():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        model, mesh = encoders.model("bert"), init_device_mesh("cpu", (1,))
        dense = first_layer(model).output.dense
        dense.weight = nn.Parameter(distribute_tensor(dense.weight, mesh))
        assert encoder_of(model) == "SF114"
    finally:
        distributed.destroy_process_group()


def test_wrapped_by_fsdp():
    model = encoders.model("bert")
    wrapper = type("FSDPBertLayer", (type(first_layer(model)),), {"__module__": "torch.distributed.fsdp"})
    first_layer(model).__class__ = wrapper
    assert encoder_of(model) == "SF114"


def test_no_compiled_kernels(monkeypatch):
    model = encoders.model("bert")
    monkeypatch.setitem(guards.HAS_KERNELS, "cpu", False)
    monkeypatch.setattr(guards, "forced", lambda: False)
    assert encoder_of(model) == "SF112"
    with pytest.raises(sentfast.UnsupportedModelError, match="SF112"):
        sentfast.accelerate(model)


def test_a_cpu_with_tiles_keeps_its_bfloat16(monkeypatch):
    """As on a processor with AMX: what is bfloat16 is the original's, unless the backend is asked for."""
    monkeypatch.setattr(products, "has_tiles", lambda: True)
    monkeypatch.setattr(products.registry, "RUN_ALL", False)
    monkeypatch.setattr(products.registry, "forced_backend", lambda: None)
    plain, half = encoders.model("bert"), encoders.model("bert").bfloat16()
    assert not isinstance(encoder_of(plain), str)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder_of(plain) == "SF131"
    assert encoder_of(half) == "SF131"
    with pytest.raises(sentfast.UnsupportedModelError, match=r"AMX.*SF131"):
        sentfast.accelerate(half)
    monkeypatch.setattr(products.registry, "forced_backend", lambda: "cpu")
    assert not isinstance(encoder_of(half), str)


def test_an_old_gpu_leaves_products_to_the_original(monkeypatch):
    """Of any capability below 8.0 among the machine's GPUs; row operators stay, and so does what is asked for."""
    drawn = [(int(torch.randint(5, 10, ())), int(torch.randint(0, 10, ()))) for _ in range(3)]
    monkeypatch.setitem(guards.HAS_KERNELS, "cuda", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(drawn))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: drawn[index])
    guards.capability.cache_clear()
    try:
        expected = "SF133" if any(major < 8 for major, _ in drawn) else ""
        assert guards.products("cuda") == guards.tensor_cores("cuda") == expected
        assert guards.device("cuda") == guards.tensor_cores("cpu") == ""
        with sentfast.use_backend("triton"):
            assert guards.products("cuda") == ""
    finally:
        guards.capability.cache_clear()


def test_a_cpu_without_vectors_runs_the_original(monkeypatch):
    """What a machine sees whose best kernels are the plain ones; asked for by name, they run."""
    model = encoders.model("bert")
    for what, runs in zip(("structure", "products"), native.scope("scalar", asked=False), strict=True):
        monkeypatch.setattr(native.state, what, runs)
    monkeypatch.setattr(guards, "forced", lambda: False)
    assert encoder_of(model) == "SF131"
    assert guards.tensor(torch.ones(2, 3)) == "SF131"
    rows = torch.randn(3, 4)
    with sentfast.disabled():
        expected = util.cos_sim(rows, rows)
    sentfast.report(reset=True)
    assert torch.equal(util.cos_sim(rows, rows), expected)
    assert [code for _, code in sentfast.report().fallbacks] == ["SF131"]
    assert "SF131" in _isa()
    selected = native.cpu_isa()
    try:
        native.cpu_isa("scalar")
        assert not guards.tensor(torch.ones(2, 3)) and not isinstance(encoder_of(model), str)
        assert _isa() == "scalar"
    finally:
        native.cpu_isa(selected)


def test_global_hooks():
    model = encoders.model("bert")
    handle = nn.modules.module.register_module_forward_hook(lambda module, arguments, output: None)
    try:
        assert encoder_of(model) == "SF120"
    finally:
        handle.remove()
    assert not isinstance(encoder_of(model), str)


CALLS = {
    "left padding": (lambda x: {"attention_mask": x["attention_mask"].flip(1)}, "SF104"),
    "inputs_embeds": (lambda x: {"input_ids": None, "inputs_embeds": torch.randn(3, 12, 32)}, "SF107"),
    "flattened": (lambda x: {"cu_seq_lens_q": torch.tensor([0, 12])}, "SF107"),
    "attentions": (lambda x: {"output_attentions": True}, "SF121"),
    "hidden states": (lambda x: {"output_hidden_states": True}, "SF121"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_for_the_original(case):
    model = encoders.model("bert", attn_implementation="eager")
    options, code = CALLS[case]
    inputs = encoders.batch(LENGTHS)
    inputs.update(options(inputs))
    sentfast.accelerate(model)
    if case == "flattened" and transformers.__version__.startswith("4."):
        with ran("BertModel.forward", code), pytest.raises(TypeError, match="cu_seq_lens_q"):
            model(**inputs)
        return
    expected = stock(model, **inputs)
    with ran("BertModel.forward", code):
        result = model(**inputs)
    assert list(result.keys()) == list(expected.keys())
    assert torch.equal(result.last_hidden_state, expected.last_hidden_state)


def test_errors_are_those_of_the_original():
    model = sentfast.accelerate(encoders.model("bert"))
    for inputs in (
        dict(input_ids=torch.tensor([[1, 60]])),
        dict(input_ids=torch.ones(1, 67, dtype=torch.long)),
        dict(),
        dict(input_ids=torch.ones(1, 3, dtype=torch.long), inputs_embeds=torch.ones(1, 3, 32)),
    ):
        with pytest.raises(Exception) as expected:
            stock(model, **inputs)
        with pytest.raises(type(expected.value)) as found:
            model(**inputs)
        assert str(found.value) == str(expected.value)


def test_autocast():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch(LENGTHS)
    with ran("BertModel.forward", "SF116"), torch.autocast("cpu", torch.float16):
        model(**inputs)
    with ran(), torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs)
    assert result.last_hidden_state.dtype == torch.float32


def test_tracing_and_transforms():
    model, inputs = sentfast.accelerate(encoders.model("bert", return_dict=False)), encoders.batch([4, 4])
    sentfast.report(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (inputs["input_ids"], inputs["attention_mask"]), strict=False, check_trace=False)
    report = sentfast.report()
    assert not report.calls and set(report.fallbacks) == {("BertModel.forward", "SF115")}


def test_torch_compile_sees_the_original():
    model, inputs = sentfast.accelerate(encoders.model("bert")), encoders.batch([4, 4])
    expected = stock(model, **inputs).last_hidden_state
    sentfast.report(reset=True)
    result = torch.compile(model, backend="eager")(**inputs).last_hidden_state
    assert not sentfast.report().calls
    torch.testing.assert_close(result, expected)
    torch._dynamo.reset()


def test_every_reason_is_documented():
    page = Path(__file__).parent.parent / "docs" / "reasons.md"
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("| SF")]
    assert rows == sorted(REASONS)


def test_explain_names_what_it_found():
    model = encoders.model("bert")
    adapter_layer(model)
    text = str(sentfast.explain(model))
    assert "SF108" in text and "encoder.layer.0.attention.self.query is a" in text and "Adapter" in text
    hooked = encoders.model("bert")
    hook(hooked)
    assert sentfast.explain(hooked).rows[0].reason == "SF120"
