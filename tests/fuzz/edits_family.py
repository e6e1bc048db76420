"""Edits between calls: weights by every road, values, modules, patches of other code. The next result shows them."""

from __future__ import annotations

import importlib
from typing import Any

import architectures
import pipelines
import torch
from compare import Tokens
from draw import Draw, Raised
from models_family import accelerate
from torch import nn


def case(draw: Draw) -> dict[str, Any]:
    kind = draw.one_of("architecture", tuple(architectures.COVERED))
    through = draw.one_of("through", ("encode", "model(**batch)", "model(features)"))
    if through == "model(**batch)":
        model = base = architectures.base(draw, kind)
        draw.real(model)
        accelerate(draw, model)
        call = caller(draw, model)
    else:
        model = pipelines.sentence_transformer(draw, kind=kind)
        base = model[0].model
        texts = pipelines.texts(draw, "texts", draw.one_of("count", (4, 1, 12)))
        call = (lambda: model.encode(texts)) if through == "encode" else (lambda: sentence(model, texts))
    seen: dict[str, Any] = {}
    if not draw.chance("edit before the first call", 0.2):
        for _ in range(draw.one_of("calls before", (1, 2, 25), p=0.3)):
            seen["before"] = apart(draw.attempt(call))
    for turn in range(draw.integer("edits", 1, 2)):
        made = edit(draw, base, kind)
        seen[f"edit {turn}"] = made if isinstance(made, Raised) else None
        for again in range(2):
            seen[f"after {turn}.{again}"] = apart(draw.attempt(call))
    return seen


def apart(x: Any) -> Any:
    """A result that holds no graph: of one that is held, PyTorch refuses to swap the parameters that it has saved."""
    return (x.requires_grad, x.detach()) if isinstance(x, torch.Tensor) else x


def sentence(model: Any, texts: list[str]) -> torch.Tensor:
    return model(model.preprocess(texts))["sentence_embedding"]


def caller(draw: Draw, model: Any) -> Any:
    rows, columns = draw.one_of("rows", (2, 5)), draw.one_of("columns", (6, 3, 20))
    ids = draw.integers("ids", 2, architectures.VOCABULARY - 1, rows, columns)
    lengths = draw.integers("lengths", 1, columns, rows, 1)
    mask = (torch.arange(columns) < lengths).long()
    mask[0] = 1

    def call() -> Any:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask)
        return [Tokens(x, mask) if x.ndim == 3 else x for x in out.to_tuple() if isinstance(x, torch.Tensor)]

    return call


def edit(draw: Draw, base: Any, kind: str) -> Any:
    family = draw.one_of("edit", ("weight", "value", "module", "patch"))
    chosen = {"weight": edit_weight, "value": edit_value, "module": edit_module, "patch": edit_patch}[family]
    with torch.no_grad():
        return draw.attempt(chosen, draw, base, kind)


# Weights

ROADS: dict[str, Any] = {
    "in place": lambda p, new: p.copy_(new),
    "data in place": lambda p, new: p.data.copy_(new),
    "data": lambda p, new: setattr(p, "data", new.clone()),
    "data transposed": lambda p, new: setattr(p, "data", new.t().contiguous().t()),
    "numpy": lambda p, new: p.detach().numpy().__setitem__(..., new.numpy()),
    "dlpack": lambda p, new: torch.from_dlpack(p.detach()).copy_(new),
    "set_": lambda p, new: p.set_(new.clone()),
    "detach": lambda p, new: p.detach().copy_(new),
    "view": lambda p, new: p.view(-1).copy_(new.flatten()),
    "storage": lambda p, new: p.untyped_storage().copy_(new.clone().untyped_storage()),
}


ALL_ROADS = (*ROADS, "swap", "load_state_dict", "half and back", "requires_grad", "tensor swap")


def part(draw: Draw, p: torch.Tensor) -> torch.Tensor:
    """The parameter with new numbers in a part of it."""
    new = p.detach().clone()
    kind = draw.one_of("part", ("all", "one element", "rows", "columns", "scaled", "zero"))
    change = draw.normal("change", *p.shape).to(p.dtype) * 2 + 1
    first = draw.integer("first", 0, 10**6)
    if kind == "one element":
        flat = new.view(-1)
        flat[first % flat.numel()] += 3.0
    elif kind == "rows":
        new[first % len(p) :] = change[first % len(p) :]
    elif kind == "columns":
        new[..., first % p.shape[-1] :] = change[..., first % p.shape[-1] :]
    elif kind == "scaled":
        new *= 1.5
    elif kind == "zero":
        new[first % len(p)] = 0
    else:
        new = change
    return new


def edit_weight(draw: Draw, base: Any, kind: str, roads: tuple[str, ...] = ALL_ROADS) -> Any:
    named = [(name, p) for name, p in base.named_parameters() if p.numel()]
    name, parameter = named[draw.integer("parameter", 0, 10**6) % len(named)]
    draw.values["parameter's name"] = name
    new = part(draw, parameter)
    road = draw.one_of("road", roads)
    owner_path, _, attribute = name.rpartition(".")
    owner = base.get_submodule(owner_path)
    if road == "swap":
        setattr(owner, attribute, nn.Parameter(new))
    elif road == "load_state_dict":
        base.load_state_dict({**base.state_dict(), name: new})
    elif road == "half and back":
        base.half().to(torch.float64 if draw.exact else torch.float32)
    elif road == "requires_grad":
        parameter.requires_grad_(False)
    elif road == "tensor swap":
        torch.utils.swap_tensors(parameter, nn.Parameter(new))
    elif road != "data transposed" or parameter.ndim == 2:
        ROADS[road](parameter, new)


# Values that enter the result


def edit_value(draw: Draw, base: Any, kind: str) -> Any:
    modules = dict(base.named_modules())
    norms = [m for m in modules.values() if isinstance(m, nn.LayerNorm)]
    attentions = [m for name, m in modules.items() if "attention" in type(m).__name__.lower()]
    options: dict[str, Any] = {
        "eps": lambda: setattr(norms[draw.integer("norm", 0, 99) % len(norms)], "eps", 0.5),
        "every eps": lambda: [setattr(norm, "eps", 0.5) for norm in norms],
        "scaling": lambda: [setattr(m, "scaling", 0.01) for m in attentions if hasattr(m, "scaling")],
        "is_causal": lambda: [setattr(m, "is_causal", True) for m in attentions if hasattr(m, "is_causal")],
        "buffers": lambda: [buffer.copy_(buffer.flip(-1)) for _, buffer in base.named_buffers() if buffer.ndim],
        "attention implementation": lambda: base.set_attn_implementation("eager"),
        "output_hidden_states": lambda: setattr(base.config, "output_hidden_states", True),
        "return_dict": lambda: setattr(base.config, "return_dict", True),
        "use the tokenizer's padding": lambda: setattr(base.config, "pad_token_id", 3),
        "padding_idx": lambda: setattr(base.embeddings, "padding_idx", 4),
        "activation": lambda: swap_activation(base),
        "heads": lambda: [halve_heads(m) for m in attentions],
        "local attention": lambda: [
            setattr(m, "sliding_window", 3) for m in attentions if hasattr(m, "sliding_window")
        ],
        "training": lambda: base.train(),
        "dtype": lambda: base.to(torch.float64),
    }
    return options[draw.one_of("value", tuple(options))]() and None


def halve_heads(module: Any) -> None:
    for heads, size in (("num_attention_heads", "attention_head_size"), ("n_heads", "attention_head_size")):
        if hasattr(module, heads) and hasattr(module, size) and getattr(module, heads) % 2 == 0:
            setattr(module, heads, getattr(module, heads) // 2)
            setattr(module, size, getattr(module, size) * 2)


def swap_activation(base: Any) -> None:
    for module in base.modules():
        for name in ("intermediate_act_fn", "activation", "act"):
            if hasattr(module, name) and callable(getattr(module, name)):
                setattr(module, name, nn.Tanh())


# Modules and foreign patches


class Doubled(nn.Module):
    """Around another module."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return tuple([2 * out[0], *out[1:]]) if isinstance(out, tuple) else 2 * out


def edit_module(draw: Draw, base: Any, kind: str) -> Any:
    linears = [(name, m) for name, m in base.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm, nn.Embedding))]
    name, module = linears[draw.integer("module", 0, 10**6) % len(linears)]
    draw.values["module's name"] = name
    owner = base.get_submodule(name.rpartition(".")[0])
    how = draw.one_of("how", ("wrapped", "instance forward", "hook", "pre-hook", "subclass", "identity", "no bias"))
    if how == "wrapped":
        setattr(owner, name.rpartition(".")[2], Doubled(module))
    elif how == "instance forward":
        original = module.forward
        module.forward = lambda *args: 2 * original(*args)  # type: ignore[method-assign]
    elif how == "hook":
        module.register_forward_hook(lambda module, inputs, out: out * 2)
    elif how == "pre-hook" and not isinstance(module, nn.Embedding):
        module.register_forward_pre_hook(lambda module, inputs: tuple(x * 2 for x in inputs))
    elif how == "subclass":
        own = type("Own", (type(module),), {"forward": lambda self, *args: 2 * super(own, self).forward(*args)})
        module.__class__ = own
    elif how == "identity" and isinstance(module, nn.LayerNorm):
        setattr(owner, name.rpartition(".")[2], nn.Identity())
    elif how == "no bias" and isinstance(module, nn.Linear):
        module.bias = None


def edit_patch(draw: Draw, base: Any, kind: str) -> Any:
    """A class, a function or a registry of a library is patched, until the end of the run."""
    module = importlib.import_module(type(base).__module__)
    functional, linear, layer_norm = nn.functional, nn.functional.linear, nn.functional.layer_norm
    attention, gelu, embedding = functional.scaled_dot_product_attention, functional.gelu, functional.embedding
    options: dict[str, tuple[Any, str, Any]] = {
        "F.scaled_dot_product_attention": (
            functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: 2 * attention(*args, **kwargs),
        ),
        "F.linear": (functional, "linear", lambda *args, **kwargs: 2 * linear(*args, **kwargs)),
        "F.layer_norm": (functional, "layer_norm", lambda *args, **kwargs: 2 * layer_norm(*args, **kwargs)),
        "F.gelu": (functional, "gelu", lambda *args, **kwargs: 2 * gelu(*args, **kwargs)),
        "F.embedding": (functional, "embedding", lambda *args, **kwargs: 2 * embedding(*args, **kwargs)),
        "Linear.forward": (nn.Linear, "forward", lambda self, x: 2 * linear(x, self.weight, self.bias)),
    }
    if hasattr(module, "eager_attention_forward"):
        eager = module.eager_attention_forward
        options["eager_attention_forward"] = (module, "eager_attention_forward", doubled_first(eager))
    for name, cls in vars(module).items():
        for method in ("feed_forward_chunk", "forward"):
            if isinstance(cls, type) and method in vars(cls) and any(type(m) is cls for m in base.modules()):
                original = vars(cls)[method]
                if cls is not type(base):
                    options[f"{name}.{method}"] = (cls, method, doubled_first(original))
    owner, attribute, value = options[draw.one_of("patch", sorted(options))]
    draw.patch(owner, attribute, value)


def doubled_first(original: Any) -> Any:
    def patched(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out if isinstance(out, torch.Tensor) else out

    return patched
