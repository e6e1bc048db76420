"""The packed encoder with gradients: every architecture against transformers, dropout, checkpoints, autocast."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import encoders
import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor, nn

import sentfast
from sentfast import functional as F
from sentfast import native
from sentfast.encoder.verify import _gradient_difference

pytestmark = pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")

LENGTHS = [9, 3, 1, 17, 6]
FORWARD = {"varlen_attention", "dropout_add_layer_norm", "bias_activation"}
BACKWARD = {f"{name}_backward" for name in FORWARD}
RATES = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout"),
)
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with encoders.surroundings(), torch.enable_grad():
        yield


def trained(model_type: str, *size: int, p: float = 0.0, **options: Any) -> nn.Module:
    """In training mode, accelerated, with probability p in every dropout of the architecture."""
    known = vars(encoders.config(model_type))
    rates = {name: p for name in RATES if name in known}
    return sentfast.accelerate(encoders.model(model_type, *size, **rates, **options).train())


def gradients(model: nn.Module, inputs: dict[str, Tensor], weights: Tensor, **options: Any) -> tuple[Tensor, Gradients]:
    """Token embeddings of the used positions, and the gradients of their weighted sum."""
    model.zero_grad()
    hidden = model(**inputs, **options).last_hidden_state
    used = hidden[inputs["attention_mask"].bool()]
    (used.double() * weights).sum().backward()
    return used.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def exact_gradients(model: nn.Module, inputs: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Gradients]:
    """In float64, each row by itself: there, masks of padding may overflow."""
    double = copy.deepcopy(model).double()
    rows = []
    for i, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        row = {name: x[i : i + 1, :length] for name, x in inputs.items() if name != "attention_mask"}
        rows.append(double(**row)[0][0])
    hidden = torch.cat(rows)
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: x.grad for name, x in double.named_parameters() if x.grad is not None}


@contextlib.contextmanager
def packed() -> Iterator[None]:
    """The block runs the packed operators forward and backward, and nothing falls back."""
    sentfast.report(reset=True)
    yield
    report = sentfast.report()
    ran = {operator for operator, backend in report.calls if backend == "cpu"}
    assert ran >= FORWARD | BACKWARD and not report.fallbacks, str(report)


def assert_gradients(result: Gradients, eager: Gradients, exact: Gradients) -> None:
    """Each by the rule; what a gradient was made of is as large as the largest one of all, in each of several steps."""
    assert result.keys() == exact.keys()
    size = 8 * max(x.abs().max().item() for x in exact.values())
    for name, gradient in result.items():
        assert_accurate(gradient, eager[name], exact[name], size=size, what=name)


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_gradients(model_type: str) -> None:
    size = encoders.drawn_size()
    model, inputs = trained(model_type, *size), encoders.batch(LENGTHS)
    if model_type in encoders.WITH_TOKEN_TYPES:
        inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
    weights = torch.randn(sum(LENGTHS), size[0])
    with packed():
        result, got = gradients(model, inputs, weights)
    with sentfast.disabled():
        eager, plain = gradients(model, inputs, weights)
        exact, true = exact_gradients(model, inputs, weights)
    assert result.dtype == eager.dtype
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    assert_gradients(got, plain, true)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "electra", "modernbert"])
def test_autocast(model_type: str) -> None:
    assert_autocast_as_stock(trained(model_type))


def assert_autocast_as_stock(model: nn.Module) -> None:
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    with torch.autocast("cpu", torch.bfloat16):
        with packed():
            result, got = gradients(model, inputs, weights)
        with sentfast.disabled():
            eager, plain = gradients(model, inputs, weights)
    with sentfast.disabled():
        exact, true = exact_gradients(model, inputs, weights)
    assert result.dtype == eager.dtype
    assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in plain.items()}
    bf16 = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    assert_accurate(result.float(), eager.float(), exact, size=bf16 * exact.abs().max().item())
    size = 4 * bf16 * max(x.abs().max().item() for x in true.values())
    for name, gradient in got.items():
        assert_accurate(gradient, plain[name], true[name], size=size, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters(dtype: torch.dtype) -> None:
    assert_half_as_stock(trained("bert").to(dtype))


def assert_half_as_stock(model: nn.Module) -> None:
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    with packed():
        result, got = gradients(model, inputs, weights)
    with sentfast.disabled():
        eager, plain = gradients(model, inputs, weights)
        exact, true = exact_gradients(model, inputs, weights)
    assert result.dtype == eager.dtype == next(model.parameters()).dtype
    assert_accurate(result, eager, exact)
    assert_gradients(got, plain, true)


def test_outputs_are_those_of_transformers() -> None:
    model, inputs = trained("bert"), encoders.batch(LENGTHS)
    result, eager = model(**inputs), encoders.stock(model, **inputs)
    assert type(result) is type(eager) and result.keys() == eager.keys()
    assert result.last_hidden_state.shape == eager.last_hidden_state.shape
    torch.testing.assert_close(result.pooler_output, eager.pooler_output, rtol=1e-4, atol=1e-5)
    assert (result.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()


def checkpoint_layers(model: Any) -> None:
    new = getattr(model, "activation_checkpointing_enable", None)
    new() if new else model.gradient_checkpointing_enable()


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_a_seed_gives_the_same_step_again(model_type: str) -> None:
    """With PyTorch's generator put back, as cached gradients and checkpoints do; also without a gradient."""
    model, inputs = trained(model_type, p=0.2), encoders.batch(LENGTHS)
    weights, state = torch.randn(sum(LENGTHS), 32), torch.get_rng_state()
    first, expected = gradients(model, inputs, weights)
    other, _ = gradients(model, inputs, weights)
    assert not torch.equal(first, other)
    torch.set_rng_state(state)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    assert torch.equal(first, hidden)
    torch.set_rng_state(state)
    again, found = gradients(model, inputs, weights)
    assert torch.equal(first, again) and all(torch.equal(found[name], x) for name, x in expected.items())
    if not model.supports_gradient_checkpointing:
        return
    checkpoint_layers(model)
    torch.set_rng_state(state)
    with packed():
        again, found = gradients(model, inputs, weights)
    assert torch.equal(first, again) and all(torch.equal(found[name], x) for name, x in expected.items())


def test_checkpoints_keep_less() -> None:
    def kept() -> int:
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            model(**inputs)
        return sum(held)

    model, inputs = trained("bert"), encoders.batch([30] * 4)
    whole = kept()
    checkpoint_layers(model)
    assert kept() < whole / 2


def assert_drops_as_stock(model: nn.Module, what: str) -> None:
    """Mean and spread of the token embeddings of many copies of two texts."""
    copies, (first, second) = 400, (4, 2)
    inputs = {name: x.repeat(copies, 1) for name, x in encoders.batch([first, second]).items()}
    used = inputs["attention_mask"].bool()
    ours = model(**inputs)[0][used].detach().double().view(copies, first + second, -1)
    stock = encoders.stock(model, **inputs)[0][used].detach().double().view(copies, first + second, -1)
    assert ours.std(dim=0).max() > 0.01, what
    error = ((ours.var(dim=0) + stock.var(dim=0)) / copies).sqrt()
    assert ((ours.mean(dim=0) - stock.mean(dim=0)).abs() / error).max() < 6, what
    spread = ours.std(dim=0).mean() / stock.std(dim=0).mean()
    assert 0.9 < spread < 1.1, f"{what}: {spread}"


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_every_dropout_drops_as_in_transformers(model_type: str) -> None:
    """One rate at a time."""
    known = vars(encoders.config(model_type))
    for name in (name for name in RATES if name in known):
        others = {other: 0.0 for other in RATES if other in known and other != name}
        model = sentfast.accelerate(encoders.model(model_type, **others, **{name: 0.3}).train())
        with torch.no_grad():
            assert_drops_as_stock(model, name)


def with_adapters(model_type: str, targets: list[str], p: float = 0.0) -> nn.Module:
    """LoRA of PEFT with weights that change something; the embeddings learn too."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = trained(model_type)
    options = dict(r=4, lora_alpha=8, lora_dropout=p, init_lora_weights=False)
    model.add_adapter(peft.LoraConfig(target_modules=targets, **options))
    model.get_input_embeddings().requires_grad_(True)
    return model.train()


def assert_gradients_as_stock(model: nn.Module) -> None:
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    with packed():
        result, got = gradients(model, inputs, weights)
    with sentfast.disabled():
        eager, plain = gradients(model, inputs, weights)
        exact, true = exact_gradients(model, inputs, weights)
    assert_accurate(result, eager, exact, size=4 * exact.abs().max().item())
    assert_gradients(got, plain, true)


@pytest.mark.parametrize("name", encoders.ADAPTED)
def test_adapters(name: str) -> None:
    model = with_adapters(*encoders.ADAPTED[name])
    assert_gradients_as_stock(model)
    assert any("lora_A" in parameter and x.grad.any() for parameter, x in model.named_parameters() if x.requires_grad)


def test_adapters_in_half_precision_and_under_autocast() -> None:
    assert_half_as_stock(with_adapters("bert", encoders.EVERY).to(torch.bfloat16))
    assert_autocast_as_stock(with_adapters("bert", encoders.EVERY))


def test_several_adapters_at_once() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = with_adapters("bert", encoders.SOME)
    model.add_adapter(peft.LoraConfig(target_modules=encoders.EVERY, r=3, init_lora_weights=False), "second")
    model.set_adapter(["default", "second"])
    assert_gradients_as_stock(model)


def test_adapters_switched_off_and_merged() -> None:
    model = with_adapters("bert", encoders.SOME)
    inputs = encoders.batch(LENGTHS)
    used = inputs["attention_mask"].bool()
    with torch.no_grad():
        first = encoders.stock(model, **inputs)[0][used]
    model.disable_adapters()
    model.get_input_embeddings().requires_grad_(True)
    assert_gradients_as_stock(model)
    model.enable_adapters()
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert_gradients_as_stock(model)
    torch.testing.assert_close(model(**inputs)[0][used], first, rtol=1e-3, atol=1e-3)


def test_adapters_drop_as_in_transformers() -> None:
    assert_drops_as_stock(with_adapters("bert", encoders.EVERY, p=0.3), "lora_dropout")


def test_adapters_that_do_more_go_to_the_original() -> None:
    """Other code, and a variant of LoRA."""
    model, inputs = with_adapters("bert", encoders.SOME), encoders.batch(LENGTHS)
    model.encoder.layer[0].attention.self.query.forward = lambda x: x
    with encoders.ran("BertModel.forward", "SF108"):
        model.train()(**inputs)
    peft = pytest.importorskip("peft")
    model = trained("bert")
    model.add_adapter(peft.LoraConfig(target_modules=encoders.SOME, r=4, use_dora=True))
    with encoders.ran("BertModel.forward", "SF108"):
        model.train()(**inputs)[0].sum().backward()


def test_frozen_parameters_get_no_gradient() -> None:
    model, inputs = trained("mpnet"), encoders.batch(LENGTHS)
    for part in (model.embeddings, model.encoder.layer[0]):
        part.requires_grad_(False)
    weights = torch.randn(sum(LENGTHS), 32)
    _, got = gradients(model, inputs, weights)
    with sentfast.disabled():
        _, plain = gradients(model, inputs, weights)
        _, true = exact_gradients(model, inputs, weights)
    assert not any(name.startswith(("embeddings", "encoder.layer.0")) for name in got)
    assert_gradients(got, plain, true)


def test_steps_of_an_optimiser() -> None:
    """Weights that change are seen at once, in training and afterwards in evaluation."""
    ours = trained("bert")
    stock = copy.deepcopy(ours)
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    optimisers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (ours, stock)]
    for _ in range(3):
        with packed():
            gradients(ours, inputs, weights)
        with sentfast.disabled():
            gradients(stock, inputs, weights)
        for optimiser in optimisers:
            optimiser.step()
    for name, x in ours.named_parameters():
        torch.testing.assert_close(x, stock.get_parameter(name), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), encoders.ran():
        result = ours.eval()(**inputs)[0]
    used = inputs["attention_mask"].bool()
    torch.testing.assert_close(result[used], encoders.stock(stock.eval(), **inputs)[0][used], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_a_backward_pass_reads_the_weights_of_its_forward_pass(model_type: str) -> None:
    """As in PyTorch also where ``p.data`` was given other memory in between: noise that is taken back, means of
    weights, two losses before their steps. (A layer norm reads its weight from the parameter, there and here.)"""
    model = trained(model_type)
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    used, parameters = inputs["attention_mask"].bool(), dict(model.named_parameters())
    names = [name for name in parameters if "pooler" not in name]
    frozen = parameters[names[int(torch.randint(len(names), ()))]].requires_grad_(False)
    drawn = [[names[int(i)]] for i in torch.randperm(len(names))[:5]]
    for changed in (names, *drawn):
        found = []
        for context in (packed(), sentfast.disabled()):
            before = {name: parameters[name].data for name in changed}
            with context:
                model.zero_grad()
                hidden = model(**inputs).last_hidden_state[used]
                for name in changed:
                    parameters[name].data = before[name] * 1.5 + 0.1
                (hidden.double() * weights).sum().backward()
            for name in changed:
                parameters[name].data = before[name]
            found.append({name: x.grad.clone() for name, x in parameters.items() if x.grad is not None})
        size = max(x.abs().max().item() for x in found[1].values())
        assert found[0].keys() == found[1].keys() and frozen.grad is None
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4 * size, msg=f"{name}, {changed}")


def test_what_needs_no_gradient_is_not_kept() -> None:
    """A product of a frozen weight keeps no input; one whose input needs no gradient, no weight."""
    for frozen, leaf in (("weight", "x"), ("x", "weight")):
        tensors = {"x": torch.randn(7, 32), "weight": torch.randn(16, 32)}
        tensors[leaf].requires_grad_(True)
        y = F.linear(**tensors)
        kept = [x for x in y.grad_fn.saved_tensors if x is not None]
        assert [x.data_ptr() for x in kept] == [tensors[frozen].data_ptr()]
        tensors[leaf].data.zero_()  # read by nobody
        y.backward(grad := torch.randn(7, 16))
        expected = grad @ tensors["weight"] if leaf == "x" else grad.t() @ tensors["x"]
        torch.testing.assert_close(tensors[leaf].grad, expected)


def test_sparse_gradients_of_every_table() -> None:
    """As SparseAdam needs them."""
    model = trained("bert")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = True
    inputs, weights = encoders.batch(LENGTHS), torch.randn(sum(LENGTHS), 32)
    with packed():
        _, got = gradients(model, inputs, weights)
    with sentfast.disabled():
        _, plain = gradients(model, inputs, weights)
    assert got.keys() == plain.keys() and any(x.is_sparse for x in got.values())
    for name, gradient in got.items():
        assert gradient.is_sparse == plain[name].is_sparse
        torch.testing.assert_close(gradient.to_dense(), plain[name].to_dense(), rtol=1e-3, atol=1e-4)


def test_the_padding_token_has_no_gradient() -> None:
    """Also where it stands inside a text."""
    model, inputs = trained("bert"), encoders.batch([8, 5])
    inputs["input_ids"][0, 3] = encoders.PADDING
    gradients(model, inputs, torch.randn(13, 32))
    assert (model.embeddings.word_embeddings.weight.grad[encoders.PADDING] == 0).all()


def test_hooks_of_the_backward_pass_go_to_the_original() -> None:
    model, inputs = trained("bert"), encoders.batch(LENGTHS)
    seen = []
    handle = model.encoder.layer[0].output.dense.register_full_backward_hook(lambda *arguments: seen.append(1))
    with encoders.ran("BertModel.forward", "SF120"):
        model(**inputs)[0].sum().backward()
    assert seen
    handle.remove()
    with packed():
        model(**inputs)[0].sum().backward()


def test_the_hook_that_asks_for_gradients_of_the_embeddings_is_no_obstacle() -> None:
    model, inputs = trained("bert"), encoders.batch(LENGTHS)
    model.requires_grad_(False)
    model.encoder.layer[1].requires_grad_(True)
    model.enable_input_require_grads()
    with packed():
        model(**inputs)[0].sum().backward()
    assert model.encoder.layer[1].output.dense.weight.grad is not None


@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_gradients_lie_in_memory_of_their_own(model_type):
    """Else one gradient keeps, and is saved with, the memory of others, also of frozen parameters."""
    model = trained(model_type)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.rand(()) < 0.8))
    inputs = encoders.batch(LENGTHS)
    hidden = model(**inputs).last_hidden_state
    if not hidden.requires_grad:
        return
    hidden.square().sum().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    storages = [x.untyped_storage() for x in found.values()]
    assert {name for name, x in found.items() if x.untyped_storage().nbytes() != x.nbytes} == set()
    assert len({x.data_ptr() for x in storages}) == len(storages)


def test_a_trial_of_gradients_sees_what_is_not_finite() -> None:
    """Where the original's has overflowed nothing is decided; where ours alone has, they differ without end."""

    def one_below(count: int) -> int:
        return int(torch.randint(count, ()))

    expected = [torch.randn(1 + one_below(5)), None, torch.randn(2 + one_below(8), 3)]
    near = [None if x is None else x + 1e-6 for x in expected]
    assert _gradient_difference(near, expected) < 1e-4
    for value in (math.nan, math.inf, -math.inf):
        place = one_below(2) * 2
        spoiled = [None if x is None else x.clone() for x in near]
        spoiled[place].view(-1)[one_below(spoiled[place].numel())] = value
        assert _gradient_difference(spoiled, expected) == math.inf
        assert _gradient_difference(expected, spoiled) < 1e-4
    assert _gradient_difference([None], [torch.full((2,), math.nan)]) == 0
    assert _gradient_difference([torch.ones(2)], [None]) > 1e3
