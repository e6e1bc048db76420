"""Tensors, settings and hooks of a base model that change."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from hostile_common import (
    TEXTS,
    Negative,
    base,
    by_chance,
    collect,
    kind_of,
    layer,
    layers,
    linears,
    one,
    part,
    skewed,
    weight_or_bias,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

# ---- parametrizations, pruning, tensors ------------------------------------------------------------------------------


def weight_norm(model, patch):
    x = one(linears(model))
    parametrizations.weight_norm(x)
    with torch.no_grad():
        x.parametrizations.weight.original0.mul_(2)


def old_weight_norm(model, patch):
    x = one(linears(model))
    torch.nn.utils.weight_norm(x)
    with torch.no_grad():
        x.weight_g.mul_(2)


def spectral_norm(model, patch):
    x = parametrizations.spectral_norm(one(linears(model)))
    # In training each use of the weight would change it, and so the next call.
    x.parametrizations.weight[0]._power_method = lambda *args: None


def own_parametrization(model, patch):
    x = one(linears(model))
    parametrize.register_parametrization(x, weight_or_bias(x), Negative())


def unsafe_parametrization(model, patch):
    x = part(model, "first_norm")
    parametrize.register_parametrization(x, "weight", Negative(), unsafe=True)


def pruned(model, patch):
    x = one(linears(model))
    prune.random_unstructured(x, weight_or_bias(x), amount=0.5)


def pruned_and_made_permanent(model, patch):
    x = one(linears(model))
    prune.random_unstructured(x, "weight", amount=0.5)
    prune.remove(x, "weight")


def swapped_tensors(model, patch):
    x = one(linears(model)).weight
    torch.utils.swap_tensors(x, nn.Parameter(torch.randn_like(x)))


def state_dict_assigned(model, patch):
    state = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in base(model).state_dict().items()}
    base(model).load_state_dict(state, assign=bool(torch.randint(2, ())))


def weight_of_another_shape(model, patch):
    """Fewer columns between the two products of a feed-forward block; with a gate both halves."""
    whole = layer(model)
    up, down = part(model, "up", whole), part(model, "down", whole)
    gated = up.weight.shape[0] != down.weight.shape[1]
    up.weight = nn.Parameter(up.weight[: 80 if gated else 40].clone())
    if up.bias is not None:
        up.bias = nn.Parameter(up.bias[: 80 if gated else 40].clone())
    down.weight = nn.Parameter(down.weight[:, :40].clone())


def memory_given_back(model, patch):
    """As FSDP does it between two calls."""
    one([one(linears(model)), part(model, "words")]).weight.untyped_storage().resize_(0)


def expanded_weight(model, patch):
    x = one(linears(model))
    x.weight = nn.Parameter(x.weight[:1].detach().expand_as(x.weight))


def tied(model, patch):
    x, y = (part(model, "query", of) for of in list(layers(model))[:2])
    x.weight, x.bias = y.weight, y.bias


def vector_of_parameters(model, patch):
    vector = nn.utils.parameters_to_vector(base(model).parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.7, base(model).parameters())


def plain_tensor_for_a_weight(model, patch):
    x = one(linears(model))
    weight = x.weight.detach() * 2
    del x.weight
    x.weight = weight


def trained(model, patch):
    optimizer = one([torch.optim.SGD, torch.optim.AdamW])(base(model).parameters(), lr=0.02)
    batch = base(model)(**model.tokenize(TEXTS[:2]))
    batch[0].square().sum().backward()
    optimizer.step()


def double(model, patch):
    model.double()


def half(model, patch):
    base(model).to(one([torch.bfloat16, torch.float16]))


def one_layer_half(model, patch):
    part(model, "down").bfloat16()


def frozen(model, patch):
    model.requires_grad_(False)


# ---- settings --------------------------------------------------------------------------------------------------------


def config_value(model, patch):
    """Those that are read at each call; the others are when a model is made."""
    name, value = one(
        [
            ("is_decoder", True),
            ("is_causal", True),
            ("output_hidden_states", True),
            ("return_dict", False),
            ("_attn_implementation", "flash_attention_2"),
            ("_attn_implementation", "other"),
        ]
    )
    setattr(base(model).config, name, value)


_ATTRIBUTES = (
    ("attention", "scaling", 0.01),
    ("attention", "is_causal", True),
    ("layer", "chunk_size_feed_forward", 1),
    ("norm", "eps", 0.5),
    ("norm", "normalized_shape", (16,)),
    ("activation", "forward", torch.tanh),
    ("words", "padding_idx", 5),
    ("words", "max_norm", 0.1),
)
# A class of modules, so that each architecture has its own.
_OF_ARCHITECTURES = {
    "distilbert": [("attention", "n_heads", 2), ("attention", "dim", 16), ("layer.ffn", "activation", nn.Tanh())],
    "modernbert": [
        ("attention", "head_dim", 4),
        ("attention", "sliding_window", 2),
        ("attention", "attention_dropout", 1.0),
        ("layer", "attention_type", "sliding_attention"),
        ("layer.mlp", "act", nn.Tanh()),
        ("model.rotary_emb", "full_attention_attention_scaling", 0.5),
        ("model.rotary_emb", "sliding_attention_attention_scaling", 0.5),
    ],
    "mpnet": [
        ("attention", "all_head_size", 16),
        ("attention", "num_attention_heads", 2),
        ("layer.intermediate", "intermediate_act_fn", nn.Tanh()),
        ("model.embeddings", "padding_idx", 3),
        (
            "model.encoder",
            "compute_position_bias",
            lambda x, *args, **kwargs: torch.zeros(1, 4, x.shape[1], x.shape[1]),
        ),
    ],
}
_AS_BERT = [
    ("attention", "num_attention_heads", 2),
    ("attention", "attention_head_size", 4),
    ("layer.intermediate", "intermediate_act_fn", nn.Tanh()),
    ("model.embeddings", "padding_idx", 3),
]


def attribute_of_a_module(model, patch):
    path, name, value = one([*_ATTRIBUTES, *_OF_ARCHITECTURES.get(kind_of(model), _AS_BERT)])
    start, _, rest = path.partition(".")
    owner = (
        {"layer": layer, "model": base}[start](model).get_submodule(rest)
        if start in ("layer", "model")
        else part(model, path)
    )
    setattr(owner, name, value)


def a_buffer(model, patch):
    """Positions, token types or frequencies."""
    owner, name = one([(x, name) for x in base(model).modules() for name in x._buffers])
    with torch.no_grad():
        if by_chance():
            getattr(owner, name).copy_(getattr(owner, name).flip(-1) if name != "token_type_ids" else 1)
        else:
            x = getattr(owner, name)
            setattr(owner, name, x.flip(-1) if name != "token_type_ids" else torch.ones_like(x))


def a_buffer_with_gaps(model, patch):
    """Written to after a call."""
    owner, name = one([(x, name) for x in base(model).modules() for name in x._buffers])
    x = owner._buffers[name]
    owner._buffers[name] = x.repeat_interleave(2, -1)[..., ::2]
    model.encode(TEXTS[:2])
    with torch.no_grad():
        owner._buffers[name].copy_(x.flip(-1) if name != "token_type_ids" else 1)


def dropout_of_a_module(model, patch):
    found = [x for x in base(model).modules() if isinstance(x, nn.Dropout)]
    one(found).p = 1.0


def new_attribute(model, patch):
    """Under the name of a method."""
    if kind_of(model) in ("distilbert", "modernbert"):
        found, name = (
            (layer(model).ffn, "ff_chunk") if kind_of(model) == "distilbert" else (base(model).rotary_emb, "forward")
        )
        original = getattr(found, name)
        setattr(found, name, lambda *args: [x * 0.5 for x in y] if type(y := original(*args)) is tuple else y * 0.5)
    else:
        layer(model).feed_forward_chunk = lambda x: torch.zeros_like(x[..., :32])


def compiled_part(model, patch):
    """As ``Module.compile`` does it."""
    found = one(linears(model))
    found._compiled_call_impl = lambda x: skewed(found.forward(x))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hook(model, patch):
    one([*linears(model), *layers(model), base(model)]).register_forward_hook(
        lambda module, args, out: out * 1.5 if isinstance(out, torch.Tensor) else None
    )


def hook_with_arguments(model, patch):
    def times(module, args, kwargs):
        return tuple(x * 1.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args), kwargs

    one([*linears(model), *layers(model)]).register_forward_pre_hook(times, with_kwargs=True)


def hook_put_into_the_dictionary(model, patch):
    one(linears(model))._forward_hooks[999] = lambda module, args, out: out * 1.5


def hook_dictionary_replaced(model, patch):
    one(linears(model))._forward_hooks = {1: lambda module, args, out: out * 1.5}


@contextlib.contextmanager
def _global_hook():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 1.5 if type(module) is nn.Linear else None
    )
    try:
        yield
    finally:
        handle.remove()


def global_hook(model, patch):
    return _global_hook()


def hook_on_a_module_of_the_sentence_model(model, patch):
    def flip(module, args, out):
        for name in ("token_embeddings", "sentence_embedding"):
            if isinstance(out, Mapping) and name in out:
                out[name] = out[name].flip(-1)

    one([model, *model]).register_forward_hook(flip)


EDITS = collect(globals())
