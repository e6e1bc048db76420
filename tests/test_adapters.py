"""LoRA adapters of PEFT in evaluation: one matrix stands for a layer and what its adapters add, as long as it does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKEND
from encoders import ADAPTED, SOME, batch, check, model, stock, surroundings
from sentence_transformers import losses
from tiny_models import build, texts
from torch import Tensor, nn

import sentfast
from sentfast import native
from sentfast.encoder import choice, encoder_of
from sentfast.integrations import transformers as adapter

peft = pytest.importorskip("peft", reason="needs peft")

LENGTHS = [9, 1, 23, 5]


@pytest.fixture(autouse=True)
def around() -> Iterator[None]:
    with surroundings():
        yield


def with_adapters(model_type: str, targets: list[str], **options: Any) -> Any:
    """Nobody reads the rows that the attention mask hides, so a padded batch is packed."""
    made = model(model_type)
    made.add_adapter(configured(targets, **options))
    choice.choose(made, "match", "zeros")
    adapter.mark(made.eval())
    return made


def configured(targets: list[str], **options: Any) -> Any:
    """With weights that change something."""
    return peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})


def lora_layers(made: nn.Module) -> list[Any]:
    return [module for module in made.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def calls_of(made: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, set[str]]:
    """The token embeddings in use, and the operators that made them; nothing falls back."""
    sentfast.report(reset=True)
    result = made(**inputs)[0][inputs["attention_mask"].bool()]
    report = sentfast.report()
    assert not report.fallbacks, report
    return result, {name for name, backend in report.calls if backend == BACKEND}


@pytest.mark.parametrize("name", ADAPTED)
def test_each_kind_of_layer(name: str) -> None:
    """The matrices stay where they are, but for those that adapters add to."""
    made, inputs = with_adapters(*ADAPTED[name]), batch(LENGTHS)
    _, result = check(made, inputs)
    made.disable_adapters()
    _, without = check(made, inputs)
    assert (result - without).abs().max() > 1e-2


def test_what_the_adapters_do_is_seen_at_every_call() -> None:
    made, inputs = with_adapters("bert", SOME), batch(LENGTHS)
    made.add_adapter(configured(["key"], r=2), "second")
    layers, seen = [layer for layer in lora_layers(made) if "default" in layer.lora_A], []

    def scale_down() -> None:
        for layer in layers:
            layer.scaling["default"] *= 0.5

    def learn() -> None:
        layers[0].lora_B["default"].weight.add_(0.3)

    def learn_unseen() -> None:
        layers[0].lora_B["default"].weight.data[0].add_(0.3)

    for change in (
        lambda: made.set_adapter("default"),
        lambda: made.set_adapter("second"),
        lambda: made.set_adapter(["default", "second"]),
        scale_down,
        learn,
        learn_unseen,
        made.disable_adapters,
        made.enable_adapters,
        lambda: made.set_adapter("default"),
    ):
        change()
        seen.append(check(made.eval(), inputs)[1])
        assert "encoder" in calls_of(made, inputs)[1]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(seen))


def test_merged_and_taken_out_again() -> None:
    made, inputs = with_adapters("bert", SOME), batch(LENGTHS)
    _, first = check(made, inputs)
    for layer in lora_layers(made):
        layer.merge()
    _, merged = check(made, inputs)
    torch.testing.assert_close(merged, first, rtol=1e-4, atol=1e-4)
    # Adapters that are merged and switched off are taken out of the weights by the next call of their layer.
    made.disable_adapters()
    assert encoder_of(made) == "SF108"
    off, operators = calls_of(made, inputs)
    assert "encoder" not in operators and not any(layer.merged for layer in lora_layers(made))
    _, again = check(made, inputs)
    torch.testing.assert_close(again, off, rtol=1e-4, atol=1e-4)
    assert (off - first).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["half", "bias", "forward"])
def test_what_no_matrix_stands_for_runs_as_steps(form: str) -> None:
    """In half precision the rounding of a matrix would be added; a bias or code of the user's is no part of one."""
    made, inputs = with_adapters("bert", SOME, lora_bias=form == "bias"), batch(LENGTHS)
    if form == "half":
        made.to(torch.bfloat16)
    if form == "forward":
        first = lora_layers(made)[0].lora_A["default"]
        first.forward = lambda x: 2 * nn.functional.linear(x, first.weight)
    assert encoder_of(made) == "SF108"
    used = inputs["attention_mask"].bool()
    eager = stock(made, **inputs)[0][used]
    result, operators = calls_of(made, inputs)
    assert "varlen_attention" in operators and "encoder" not in operators
    assert_accurate(result, eager, exact := stock(made.double(), **inputs)[0][used], size=exact.abs().max().item())
    with pytest.raises(sentfast.UnsupportedModelError, match="LoRA adapters in half precision"):
        sentfast.accelerate(made.bfloat16() if form == "half" else made.float())


@pytest.mark.skipif(not native.cpu_loaded(), reason="about the compiled CPU kernels")
def test_precision_bf16() -> None:
    made, inputs = with_adapters("bert", SOME), batch(LENGTHS)
    _, full = check(made, inputs)
    rounded, operators = calls_of(sentfast.accelerate(made, precision="bf16"), inputs)
    assert "encoder" in operators
    assert torch.cosine_similarity(rounded, full, dim=-1).min() > 0.999


def test_a_model_that_peft_has_wrapped(path: str) -> None:
    """As ``get_peft_model`` does: the wrapper calls the base model, in evaluation and in training."""
    wrapped = build(path)
    wrapped[0].model = peft.get_peft_model(wrapped[0].auto_model, configured(SOME))
    sentences = texts(9)
    with sentfast.disabled():
        eager = wrapped.encode(sentences, convert_to_tensor=True)
    sentfast.report(reset=True)
    torch.testing.assert_close(wrapped.encode(sentences, convert_to_tensor=True), eager, rtol=1e-4, atol=1e-5)
    assert ("encoder", BACKEND) in sentfast.report().calls
    called = wrapped.tokenize(sentences)
    sentfast.report(reset=True)
    torch.testing.assert_close(wrapped(called)["sentence_embedding"], eager, rtol=1e-4, atol=1e-5)
    assert ("encoder", BACKEND) in sentfast.report().calls

    loss = losses.MultipleNegativesRankingLoss(wrapped.train())
    found = []
    for context in (sentfast.disabled, torch.enable_grad):
        wrapped.zero_grad()
        sentfast.report(reset=True)
        with context(), torch.enable_grad():
            value = loss([wrapped.tokenize(column) for column in (sentences[:4], sentences[4:8])], None)
            value.backward()
        found.append([p.grad.clone() for p in wrapped.parameters() if p.grad is not None])
    assert ("varlen_attention_backward", BACKEND) in sentfast.report().calls
    assert len(found[0]) == 2 * len(lora_layers(wrapped))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
