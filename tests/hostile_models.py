"""Tensors, settings and hooks of a base model that change."""

from __future__ import annotations

import contextlib

import torch
from hostile_common import TEXTS, Negative, base, collect, layer, linears, one
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
    parametrizations.spectral_norm(one(linears(model)))


def own_parametrization(model, patch):
    parametrize.register_parametrization(one(linears(model)), one(["weight", "bias"]), Negative())


def unsafe_parametrization(model, patch):
    x = base(model).embeddings.LayerNorm
    parametrize.register_parametrization(x, "weight", Negative(), unsafe=True)


def pruned(model, patch):
    prune.random_unstructured(one(linears(model)), one(["weight", "bias"]), amount=0.5)


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
    x = layer(model)
    x.intermediate.dense.weight = nn.Parameter(x.intermediate.dense.weight[:40].clone())
    x.intermediate.dense.bias = nn.Parameter(x.intermediate.dense.bias[:40].clone())
    x.output.dense.weight = nn.Parameter(x.output.dense.weight[:, :40].clone())


def expanded_weight(model, patch):
    x = one(linears(model))
    x.weight = nn.Parameter(x.weight[:1].detach().expand_as(x.weight))


def tied(model, patch):
    x, y = (layer.attention.self for layer in base(model).encoder.layer)
    x.query.weight = y.query.weight
    x.key.bias = x.query.bias


def vector_of_parameters(model, patch):
    vector = nn.utils.parameters_to_vector(base(model).parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.7, base(model).parameters())


def plain_tensor_for_a_weight(model, patch):
    x = one(linears(model))
    weight = x.weight.detach() * 2
    del x.weight
    x.weight = weight


def trained(model, patch):
    optimizer = one([torch.optim.SGD, torch.optim.AdamW])(base(model).parameters(), lr=0.1)
    batch = base(model)(**model.tokenize(TEXTS[:2]))
    batch[0].square().sum().backward()
    optimizer.step()


def double(model, patch):
    model.double()


def half(model, patch):
    base(model).to(one([torch.bfloat16, torch.float16]))


def one_layer_half(model, patch):
    layer(model).output.dense.bfloat16()


def frozen(model, patch):
    model.requires_grad_(False)


# ---- settings --------------------------------------------------------------------------------------------------------


def config_value(model, patch):
    name, value = one(
        [
            ("layer_norm_eps", 0.5),
            ("hidden_act", "relu"),
            ("num_hidden_layers", 1),
            ("hidden_dropout_prob", 0.9),
            ("chunk_size_feed_forward", 1),
            ("is_decoder", True),
            ("output_hidden_states", True),
            ("use_cache", True),
            ("torchscript", True),
            ("return_dict", False),
            ("pad_token_id", 3),
            ("_attn_implementation", "eager"),
            ("position_embedding_type", "relative_key"),
        ]
    )
    setattr(base(model).config, name, value)


def attribute_of_a_module(model, patch):
    found = layer(model)
    owner, name, value = one(
        [
            (found.attention.self, "scaling", 0.01),
            (found.attention.self, "num_attention_heads", 2),
            (found.attention.self, "attention_head_size", 4),
            (found.attention.self, "is_causal", True),
            (found, "chunk_size_feed_forward", 1),
            (found, "seq_len_dim", 0),
            (found.output.LayerNorm, "eps", 0.5),
            (found.output.LayerNorm, "normalized_shape", (16,)),
            (found.intermediate, "intermediate_act_fn", nn.Tanh()),
            (found.intermediate.intermediate_act_fn, "forward", torch.tanh),
            (base(model).embeddings.word_embeddings, "padding_idx", None),
            (base(model).embeddings.word_embeddings, "scale_grad_by_freq", True),
            (base(model).embeddings.word_embeddings, "max_norm", 0.1),
        ]
    )
    setattr(owner, name, value)


def a_buffer(model, patch):
    x = base(model).embeddings
    x.position_ids = x.position_ids.flip(1)


def dropout_of_a_module(model, patch):
    found = [x for x in base(model).modules() if isinstance(x, nn.Dropout)]
    one(found).p = 0.9
    if torch.randint(2, ()):
        model.eval()


def new_attribute(model, patch):
    layer(model).feed_forward_chunk = lambda x: torch.zeros_like(x[..., :32])


def gradient_checkpointing(model, patch):
    base(model).gradient_checkpointing_enable()
    if torch.randint(2, ()):
        base(model).gradient_checkpointing_disable()


def compiled_part(model, patch):
    found = one(linears(model))
    found.compile(backend=lambda module, inputs: lambda *args: [x * 1.5 for x in module.forward(*args)])


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hook(model, patch):
    one([*linears(model), base(model).encoder, base(model)]).register_forward_hook(
        lambda module, args, out: out * 1.5 if isinstance(out, torch.Tensor) else None
    )


def hook_with_arguments(model, patch):
    def times(module, args, kwargs):
        return tuple(x * 1.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args), kwargs

    one([*linears(model), *base(model).encoder.layer]).register_forward_pre_hook(times, with_kwargs=True)


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
            if isinstance(out, dict) and name in out:
                out[name] = out[name].flip(-1)

    one([model, *model]).register_forward_hook(flip)


EDITS = collect(globals())
