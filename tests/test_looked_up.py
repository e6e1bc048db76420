"""What the model's code looks up is compared: also names that nobody had defined, operators, other objects' methods."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import warnings

import encoders
import pytest
import torch
from test_faithful import assert_honoured, difference, drawn
from torch import nn

import sentfast
from sentfast.encoder import encoder as module
from sentfast.encoder import encoder_of, watch
from sentfast.encoder.examine import inner_modules
from sentfast.encoder.lookups import Lookups, stranger
from sentfast.encoder.verify import ALLOWED

LENGTHS = [9, 1, 5]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


def linear_weight(model, patch):
    patch.setattr(nn.Linear, "weight", property(lambda self: self._parameters["weight"] * 1.5), raising=False)


def linear_attributes(model, patch):
    def get(self, name):
        found = object.__getattribute__(self, name)
        return (lambda x: nn.functional.linear(x, self._parameters["weight"])) if name == "forward" else found

    patch.setattr(nn.Linear, "__getattribute__", get, raising=False)


def order_of_layers(model, patch):
    patch.setattr(nn.ModuleList, "__iter__", lambda self: iter(list(self._modules.values())[::-1]))


def sum_of_tensors(model, patch):
    original = torch.Tensor.__add__
    patch.setattr(
        torch.Tensor,
        "__add__",
        lambda self, other: original(self, other * 1.5 if self.is_floating_point() else other),
        raising=False,
    )


def view_of_tensors(model, patch):
    original = torch.Tensor.view
    patch.setattr(torch.Tensor, "view", lambda self, *shape: original(self + self // 3, *shape), raising=False)


def tanh_in_globals(model, patch):
    """A name of Python's builtins, put into the globals of a module of transformers."""
    patch.setitem(vars(nn.modules.container), "len", lambda x: 1)


def builtin(model, patch):
    original = isinstance
    patch.setattr("builtins.isinstance", lambda x, kinds: original(x, kinds))


def method_of_another_layer(model, patch):
    one, other = model.encoder.layer
    one.feed_forward_chunk = other.feed_forward_chunk


def then_of_another(model, patch):
    """First of itself, which changes nothing, then of another one: the function stays the same."""
    one, other = model.encoder.layer
    one.feed_forward_chunk = one.feed_forward_chunk
    difference(model, encoders.batch(LENGTHS))
    one.feed_forward_chunk = other.feed_forward_chunk


def exchanged_dictionary(model, patch):
    other = encoders.model("bert")
    patch.setattr(model, "__dict__", vars(other))


def kernel(model, patch):
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("gelu", lambda x, approximate="none": x * 0.5, "CPU")
    patch.callback = library._destroy


EDITS = (
    linear_weight,
    linear_attributes,
    order_of_layers,
    sum_of_tensors,
    view_of_tensors,
    tanh_in_globals,
    builtin,
    method_of_another_layer,
    then_of_another,
    exchanged_dictionary,
    kernel,
)


@contextlib.contextmanager
def patching():
    """A MonkeyPatch that also takes back what no attribute shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.callback = lambda: None
        try:
            yield patch
        finally:
            patch.callback()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_is_honoured_before_and_after_the_first_call(edit):
    assert_honoured(edit, patching)


def test_a_logarithm_that_is_replaced_changes_the_buckets():
    model, inputs = sentfast.accelerate(encoders.model("mpnet")), encoders.batch([40, 3])
    assert difference(model, inputs) < ALLOWED[torch.float32]
    original = math.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "log", lambda x: original(x) * 3)
        assert encoder_of(model) == "SF110"
        assert difference(model, inputs) < ALLOWED[torch.float32]
    assert not isinstance(encoder_of(model), str)


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_any_attribute_of_a_module_is_compared(kind):
    """Also one whose name the code puts together, as ModernBERT's `full_attention_attention_scaling`."""
    model = encoders.model(kind)
    entry = module._entry(model)
    found = [
        (inner, name)
        for _, inner in inner_modules(model)
        for name, value in vars(inner).items()
        if name != "training" and type(value) in (int, float, bool, str) and not (isinstance(inner, nn.Dropout))
    ]
    for _ in range(6):
        inner, name = found[drawn(len(found))]
        before = getattr(inner, name)
        setattr(inner, name, not before if isinstance(before, bool) else before * 2 if before else 3)
        assert not entry.structure.same(model), f"{type(inner).__name__}.{name}"
        setattr(inner, name, before)
        assert entry.structure.same(model), f"{type(inner).__name__}.{name}"


def test_the_scaling_of_rotary_angles_is_honoured():
    model, inputs = sentfast.accelerate(encoders.model("modernbert")), encoders.batch([12, 3])
    assert difference(model, inputs) < ALLOWED[torch.float32]
    found = [
        (inner, name)
        for inner in model.modules()
        for name, value in vars(inner).items()
        if name.endswith("attention_scaling") and isinstance(value, float)
    ]
    if not found:
        pytest.skip("this version of transformers has no such attribute")
    inner, name = found[drawn(len(found))]
    setattr(inner, name, 1.5)
    assert difference(model, inputs) < ALLOWED[torch.float32]


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
def test_a_name_that_no_class_had_is_seen(kind):
    model = encoders.model(kind)
    inner = [found for _, found in inner_modules(model)]
    entry = module._entry(model)
    names = sorted(name for name in _names(model, inner) if not name.startswith("__"))
    classes = [cls for cls in dict.fromkeys(c for x in (model, *inner) for c in type(x).__mro__[:-1]) if _open(cls)]
    for _ in range(12):
        cls, name = classes[drawn(len(classes))], names[drawn(len(names))]
        if name in vars(cls):
            continue
        setattr(cls, name, None)
        seen = not entry.structure.same(model)
        delattr(cls, name)
        assert seen, f"{cls.__name__}.{name}"
        assert entry.structure.same(model), f"{cls.__name__}.{name}"


def _names(model, inner):
    from sentfast.encoder.model_lookups import ModelLookups

    return ModelLookups(model, inner).names


def _open(cls):
    """Whether Python code may set attributes of the class."""
    return bool(cls.__flags__ & (1 << 9))


def test_models_with_an_equality_of_their_own_are_told_apart():
    class Equal(encoders.class_of("bert")):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 1

    made = [Equal(encoders.config("bert")).eval() for _ in range(2)]
    for model in made:
        sentfast.accelerate(model)
    inputs = encoders.batch(LENGTHS)
    for _ in range(2):
        for model in made:
            assert not isinstance(encoder_of(model), str)
            assert difference(model, inputs) < ALLOWED[torch.float32]
    sentfast.restore(made[0])
    assert (encoder_of(made[0]), isinstance(encoder_of(made[1]), str)) == ("SF118", False)


def test_a_step_of_peft_that_is_replaced_is_honoured():
    peft = pytest.importorskip("peft")
    kind, names = encoders.ADAPTED["some"]
    model = encoders.model(kind)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, init_lora_weights=False), model)
    model, inputs = sentfast.accelerate(model.eval()), encoders.batch(LENGTHS)
    assert difference(model, inputs) < ALLOWED[torch.float32]
    cls = peft.tuners.lora.layer.Linear
    with pytest.MonkeyPatch.context() as patch:
        original = cls._cast_input_dtype
        patch.setattr(cls, "_cast_input_dtype", lambda self, x, dtype: original(self, x * 2, dtype))
        assert difference(model, inputs) < ALLOWED[torch.float32]
    assert difference(model, inputs) < ALLOWED[torch.float32]


def test_the_compiled_comparison_is_that_of_python():
    """The same edits are seen by both: of values, methods, absent names, lists, sets, code and closures."""
    if not hasattr(watch.native.state.cpu, "Names"):
        pytest.skip("no compiled library")
    inside = [0]

    def function(x=1):
        return inside, x

    class Kind:
        def step(self):
            pass

    one, other = Kind(), Kind()
    space = {"a": 1, "b": "text", "c": one.step, "d": (1, 2.0), "e": function}
    items, members = [1, 2], {1, 2}
    arguments = [(space, None, ("a", "b", "c", "d", "e", "f"), {"f", "g"})], [items], [members], [function], []
    edits = {
        "a": lambda: space.update(a=2),
        "an equal text": lambda: space.update(b="".join(["te", "xt"])),
        "the same method": lambda: space.update(c=one.step),
        "of another object": lambda: space.update(c=other.step),
        "an equal tuple": lambda: space.update(d=(1, float("2"))),
        "another tuple": lambda: space.update(d=(1, 2.5)),
        "a barred name": lambda: space.update(g=None),
        "another name": lambda: space.update(h=None),
        "gone": lambda: space.pop("a"),
        "a list": lambda: items.append(3),
        "a set": lambda: members.add(3),
        "in and out of a set": lambda: (members.discard(1), members.add(4)),
        "defaults": lambda: setattr(function, "__defaults__", (2,)),
        "code": lambda: setattr(function, "__code__", (lambda x=1: 0).__code__) if not function.__closure__ else None,
    }
    same = {"an equal text", "the same method", "an equal tuple", "another name"}
    for name in edits:
        before = dict(space), list(items), set(members), function.__defaults__
        pair = watch.native.state.cpu.Names(*arguments), watch._Names(*arguments)
        edits[name]()
        expected = name in same or name == "code"
        assert [names.same() for names in pair] == [expected, expected], name
        space.clear()
        space.update(before[0])
        items[:] = before[1]
        members.clear()
        members.update(before[2])
        function.__defaults__ = before[3]


def test_code_of_somebody_else_is_named():
    lookups = Lookups(("transformers.", "torch.nn."), [nn.Linear.forward], [nn.Linear])
    assert not lookups.foreign
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *arguments: None)
        assert "linear is code of" in Lookups(("transformers.", "torch.nn."), [nn.Linear.forward], [nn.Linear]).foreign


def test_a_file_named_as_a_module_of_python_is_somebody_elses(tmp_path, monkeypatch):
    (tmp_path / "trace.py").write_text("def step(x): return x\nclass Step:\n    def __call__(self, x): return x\n")
    spec = importlib.util.spec_from_file_location("trace", tmp_path / "trace.py")
    trace = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trace", trace)
    spec.loader.exec_module(trace)
    assert stranger(trace.step) == stranger(trace.Step()) == str(tmp_path / "trace.py")
    assert stranger(math.sin) == stranger(contextlib.nullcontext) == stranger(warnings.warn) == ""
