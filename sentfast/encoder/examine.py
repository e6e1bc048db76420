"""Whether a model is what the description of its architecture says: its parts, or the reason why not.

Looks at classes, shapes and the configuration. What may change from call to call (hooks, training mode, gradients)
is checked in ``structure.py`` and ``encoder.py``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from sentfast.encoder.adapters import adapted
from sentfast.encoder.architecture import MODEL_TYPES, Architecture, architecture_of
from sentfast.encoder.device import composed
from sentfast.encoder.parts import Dropouts, LayerParts, Parts
from sentfast.integrations.guards import ours
from sentfast.reference import ACTIVATIONS
from sentfast.registry import KERNEL_DTYPES

HEAD_SIZE_STEP = 8
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", None)  # the same result; None: not chosen yet
_PLAIN = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList)
_CODE = (types.FunctionType, property, staticmethod, classmethod)
_ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")
# Rotary angles that depend on the length of the batch have no table.
_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
_ACTIVATION_OF = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


class Refusal(NamedTuple):
    """Why a model is not covered: reason code, and what was found."""

    code: str
    detail: str


class _RefusalError(Exception):
    def __init__(self, code: str, detail: str):
        self.refusal = Refusal(code, detail)


def examine(model: nn.Module) -> Parts | Refusal:
    """The model's parts, or why the packed encoder does not cover it."""
    found = architecture_of(type(model))
    if found is None:
        known = ", ".join(MODEL_TYPES)
        return Refusal("SF123", f"{type(model).__name__}; covered model types: {known}")
    architecture, base = found
    try:
        _check_class(type(model), base)
        _check_parameters(model)
        _check_buffers(model)
        _check_modules(model, architecture)
        _check_config(model.config)
        return _take_apart(model, architecture)
    except _RefusalError as error:
        return error.refusal
    except AttributeError as error:
        return Refusal("SF125", f"another structure than expected: {error}")


def inner_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below the model that the encoder stands for; the pooler runs as it is."""
    for name, child in model.named_children():
        if name != "pooler":
            yield from child.named_modules(prefix=name)


def has_memory(x: torch.Tensor) -> bool:
    """Some give back the memory of a tensor that they leave where it is, as FSDP does between two calls."""
    if type(x) is not nn.Parameter or x.is_meta:
        return True
    return x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()


def foreign(function: Any) -> bool:
    """Whether code of neither transformers nor PyTorch nor us takes part in a method."""
    while function is not None:
        package = getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]
        if package not in ("transformers", "torch") and not ours(function):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _check_class(cls: type, base: type) -> None:
    for subclass in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(subclass).copy().items():
            if isinstance(value, _CODE) and not name.startswith("__") and hasattr(base, name):
                raise _RefusalError("SF110", f"{subclass.__name__}.{name} overrides {base.__name__}.{name}")
    if foreign(vars(base)["forward"]):
        raise _RefusalError("SF110", f"{base.__name__}.forward was replaced")


def _check_parameters(model: nn.Module) -> None:
    dtype = device = None
    for owner, module in inner_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            path = f"{owner}.{name}"
            if type(parameter) is not nn.Parameter:
                sharded = type(parameter).__module__.startswith("torch.distributed")
                raise _RefusalError("SF114" if sharded else "SF108", f"{path} is a {type(parameter).__name__}")
            if parameter.layout != torch.strided:
                raise _RefusalError("SF105", f"{path} has layout {parameter.layout}")
            if not has_memory(parameter):
                raise _RefusalError("SF105", f"the memory of {path} was given back")
            # Read where it is: a copy would have to be compared with it at every call.
            if not parameter.is_contiguous():
                raise _RefusalError("SF105", f"{path} is not contiguous: strides {parameter.stride()}")
            dtype, device = dtype or parameter.dtype, device or parameter.device
            if parameter.device != device or not (parameter.is_cpu or composed(device)):
                raise _RefusalError("SF103", f"{path} is on {parameter.device}, the first parameter on {device}")
            if parameter.dtype != dtype or dtype not in KERNEL_DTYPES:
                raise _RefusalError("SF102", f"{path} is {parameter.dtype}, the first parameter {dtype}")


def _check_buffers(model: nn.Module) -> None:
    """They are where the model is. Positions count from 0, and token types are 0, where a call gives none."""
    device = next((x.device for _, module in inner_modules(model) for x in module.parameters()), None)
    for owner, module in inner_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                raise _RefusalError("SF103", f"{owner}.{name} is on {buffer.device}, the first parameter on {device}")
            # Only what lies in one piece is compared at every call.
            if buffer is not None and not buffer.is_contiguous():
                raise _RefusalError("SF105", f"{owner}.{name} is not contiguous: strides {buffer.stride()}")
            if buffer is None or name not in ("position_ids", "token_type_ids"):
                continue
            default = torch.arange(buffer.shape[-1], device=buffer.device) if name == "position_ids" else 0
            if not bool((buffer == default).all()):
                raise _RefusalError("SF125", f"the numbers in {owner}.{name} are not those that the model starts with")


def _check_modules(model: nn.Module, architecture: Architecture) -> None:
    defined_in = (architecture.module, *_ACTIVATION_MODULES)
    classes = set()
    adapters = tuple(f"{path}." for path, module in inner_modules(model) if adapted(module))
    for path, module in inner_modules(model):
        cls = type(module)
        if adapted(module) or path.startswith(adapters):
            continue  # called as it is
        if any(base.__module__.startswith("torch.distributed") for base in cls.__mro__):
            raise _RefusalError("SF114", f"{path} is a {cls.__name__}")
        if cls not in _PLAIN and cls.__module__ not in defined_in:
            raise _RefusalError("SF108", f"{path} is a {cls.__module__}.{cls.__name__}")
        if "forward" in vars(module):
            raise _RefusalError("SF110", f"{path}.forward was replaced")
        classes.add(cls)
    for cls in classes - {nn.ModuleList}:
        if foreign(cls.forward) or not _own_forward(cls):
            raise _RefusalError("SF110", f"{cls.__name__}.forward was replaced")


def _own_forward(cls: type) -> bool:
    """Whether the class or a base of it was written with this `forward`, and not with that of another class."""
    written = next(kind for kind in cls.__mro__ if "forward" in vars(kind))
    name = getattr(vars(written)["forward"], "__qualname__", "")
    return name == f"{written.__qualname__}.forward"


def _check_config(config: Any) -> None:
    for name in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, name, False):
            raise _RefusalError("SF125", f"config.{name} is set")
    implementation = config._attn_implementation
    registered = getattr(sys.modules["transformers.modeling_utils"], "ALL_ATTENTION_FUNCTIONS", {})
    if implementation == "sdpa" and foreign(registered.get("sdpa")):
        raise _RefusalError("SF124", "other code is registered as 'sdpa'")


class _Reader:
    """Takes the parts of a model and remembers which parameters they hold."""

    def __init__(self, eps: float | None = None):
        self.seen: set[int] = set()
        self.eps = eps

    def linear(self, root: Any, path: str, rows: int, columns: int) -> nn.Linear:
        return self._plain(root, path, nn.Linear, (rows, columns))

    def embedding(self, root: Any, path: str, columns: int) -> nn.Embedding:
        table = self._plain(root, path, nn.Embedding, None)
        if table.max_norm is not None or table.scale_grad_by_freq or table.weight.shape[1] != columns:
            raise _RefusalError("SF125", f"{path} has max_norm, scale_grad_by_freq or another width than {columns}")
        return table

    def norm(self, root: Any, path: str, size: int) -> nn.LayerNorm:
        norm = self._plain(root, path, nn.LayerNorm, (size,))
        self.eps = norm.eps if self.eps is None else self.eps
        if norm.eps != self.eps:
            raise _RefusalError("SF125", f"the epsilon of {path} is {norm.eps}, elsewhere {self.eps}")
        return norm

    def _plain(self, root: Any, path: str, cls: type, shape: tuple[int, ...] | None) -> Any:
        module: Any = attrgetter(path)(root)
        plain = module.base_layer if adapted(module) else module
        found: type = type(plain)
        if found is not cls:
            raise _RefusalError("SF108", f"{path} is a {found.__module__}.{found.__name__}")
        if plain.weight is None or (shape is not None and tuple(plain.weight.shape) != shape):
            got = "no weight" if plain.weight is None else f"shape {list(plain.weight.shape)}"
            raise _RefusalError("SF125", f"{path} has {got}, expected shape {list(shape or ())}")
        for name in ("weight", "bias"):
            # A plain tensor is not watched, and may carry a gradient from elsewhere.
            if getattr(plain, name, None) is not plain._parameters.get(name):
                raise _RefusalError("SF108", f"{path}.{name} is no parameter of its module")
        bias = getattr(plain, "bias", None)
        if bias is not None and bias.shape != plain.weight.shape[:1]:
            raise _RefusalError("SF125", f"the bias of {path} has shape {list(bias.shape)}, which the sum may expand")
        self.seen.update(id(parameter) for parameter in module.parameters())
        return module


def _take_apart(model: nn.Module, architecture: Architecture) -> Parts:
    config: Any = model.config
    read, hidden, heads = _Reader(), config.hidden_size, config.num_attention_heads
    if hidden % heads or hidden // heads % HEAD_SIZE_STEP:
        raise _RefusalError("SF125", f"head size {hidden / heads:g} is not a multiple of {HEAD_SIZE_STEP}")
    width = attrgetter(architecture.words)(model).weight.shape[1]
    words = read.embedding(model, architecture.words, width)
    positions = read.embedding(model, architecture.positions, width) if architecture.positions else None
    token_types = read.embedding(model, architecture.token_types, width) if architecture.token_types else None
    embedding_norm = read.norm(model, architecture.embedding_norm, width)
    projection = None
    if architecture.projection and hasattr(model, architecture.projection):
        projection = read.linear(model, architecture.projection, hidden, width)
    elif width != hidden:
        raise _RefusalError("SF125", f"embedding size {width}, hidden size {hidden}")
    layers = list(attrgetter(architecture.layers)(model))
    if not layers:
        raise _RefusalError("SF125", "no layers")
    if getattr(model.get_submodule("embeddings"), "position_embedding_type", "absolute") != "absolute":
        raise _RefusalError("SF125", "relative position embeddings")
    parts = tuple(_layer_parts(read, architecture, layer, hidden) for layer in layers)
    final_norm = read.norm(model, architecture.final_norm, hidden) if architecture.final_norm else None
    bias = _bias(read, model, architecture, heads)
    for path, module in inner_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in read.seen:
                raise _RefusalError("SF125", f"{path}.{name} is no part of the architecture")
    assert read.eps is not None
    padding_idx = attrgetter(architecture.padding_idx)(model) if architecture.padding_idx else None
    return Parts(
        architecture=architecture,
        adapted=tuple(module for _, module in inner_modules(model) if adapted(module)),
        words=words,
        positions=positions,
        token_types=token_types,
        embedding_norm=embedding_norm,
        embedding_dropout=attrgetter(architecture.embedding_dropout)(model),
        projection=projection,
        final_norm=final_norm,
        bias=bias,
        rotary=_rotary(model, layers) if architecture.rotary else (),
        layers=parts,
        hidden_size=hidden,
        heads=heads,
        activation=_activation({_activation_name(attrgetter(architecture.activation)(layer)) for layer in layers}),
        windows=tuple(_window(layer, config) for layer in layers) if architecture.rotary else (),
        eps=read.eps,
        padding_idx=padding_idx,
        position_offset=0 if padding_idx is None else padding_idx + 1,
        length=config.max_position_embeddings if positions is None else positions.weight.shape[0],
        eager=config._attn_implementation == "eager",
        dtype=words.weight.dtype,
        device=words.weight.device,
    )


def _layer_parts(read: _Reader, architecture: Architecture, layer: nn.Module, hidden: int) -> LayerParts:
    qkv_rows = 3 * hidden // len(architecture.qkv)
    intermediate = attrgetter(architecture.down)(layer).in_features
    first_norm = attrgetter(architecture.attention_norm)(layer)
    return LayerParts(
        module=layer,
        dropouts=_dropouts(architecture, layer),
        qkv=tuple(read.linear(layer, path, qkv_rows, hidden) for path in architecture.qkv),
        output=read.linear(layer, architecture.output, hidden, hidden),
        attention_norm=None
        if type(first_norm) is nn.Identity
        else read.norm(layer, architecture.attention_norm, hidden),
        up=read.linear(layer, architecture.up, intermediate * (2 if architecture.gated else 1), hidden),
        down=read.linear(layer, architecture.down, hidden, intermediate),
        feed_forward_norm=read.norm(layer, architecture.feed_forward_norm, hidden),
    )


def _dropouts(architecture: Architecture, layer: nn.Module) -> Dropouts:
    def of(path: str) -> Any:
        return attrgetter(path)(layer) if path else None

    return Dropouts(
        attention_module=of(architecture.attention),
        attention=of(architecture.attention_dropout),
        output=of(architecture.output_dropout),
        gate=of(architecture.gate_dropout),
        feed_forward=of(architecture.feed_forward_dropout),
    )


def _activation_name(function: Any) -> str:
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    name = type(function).__name__
    return _ACTIVATION_OF.get(name, name) if type(function).__module__ in _ACTIVATION_MODULES else repr(function)


def _activation(names: set[str]) -> int:
    name = names.pop()
    if names or name not in ACTIVATIONS:
        raise _RefusalError("SF125", f"activation {name}; covered: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def _bias(read: _Reader, model: nn.Module, architecture: Architecture, heads: int) -> Any:
    if not architecture.attention_bias:
        return None
    module: Any = attrgetter(architecture.attention_bias)(model)
    table = read.embedding(module, "relative_attention_bias", heads)
    if foreign(module.relative_position_bucket) or foreign(module.compute_position_bias):
        raise _RefusalError("SF110", "the relative position bias was replaced")
    # The number of buckets is a default argument of the model's code, not an option of its configuration.
    if table.weight.shape[0] < 32:
        raise _RefusalError("SF125", f"{table.weight.shape[0]} buckets of relative positions, expected 32")
    return module


def _window(layer: Any, config: Any) -> int:
    if hasattr(layer, "attention_type"):
        return config.sliding_window if layer.attention_type == "sliding_attention" else -1
    return layer.attn.local_attention[0]


def _rotary(model: Any, layers: list[Any]) -> tuple[Callable[[torch.Tensor], Any], ...]:
    """One function for all layers, told the kind of layer, or one in each layer, by the version of transformers."""
    if hasattr(model, "rotary_emb"):
        module = model.rotary_emb
        kinds = ("full_attention", "sliding_attention")
        present = [kind if kind in module.rope_type else next(iter(module.rope_type)) for kind in kinds]
        _check_rotary(module.rope_type.values())
        return tuple(lambda positions, kind=kind: module(_beside(positions), positions, kind) for kind in present)
    modules = []
    for local in (False, True):
        fitting = [layer for layer in layers if (layer.attn.local_attention[0] >= 0) == local]
        modules.append((fitting or layers)[0].attn.rotary_emb)
    _check_rotary(module.rope_type for module in modules)
    return tuple(lambda positions, module=module: module(_beside(positions), positions) for module in modules)


def _beside(positions: torch.Tensor) -> torch.Tensor:
    """What tells a rotary module dtype and device of its result."""
    return torch.empty(0, dtype=torch.float32, device=positions.device)


def _check_rotary(names: Iterable[str]) -> None:
    for name in names:
        if name not in _ROTARY_TYPES:
            raise _RefusalError("SF125", f"rotary embeddings of type {name}")
