"""What the files of hostile edits share: models of every architecture, and their parts by what they are for."""

from __future__ import annotations

import functools
import types

import encoders
import tiny_models
import torch
from torch import nn

TEXTS = [
    "the query weather",
    "in",
    "a passage, long and of many words: weather in the passage 0 1 2 3",
    "x y",
    "[MASK] b",
]
KINDS = encoders.MODEL_TYPES

_BERT = {
    "stack": "encoder",
    "layers": "encoder.layer",
    "attention": "attention.self",
    "query": "attention.self.query",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
    "activation": "intermediate.intermediate_act_fn",
    "words": "embeddings.word_embeddings",
    "first_norm": "embeddings.LayerNorm",
}
_OTHERS = {
    "mpnet": _BERT | {"attention": "attention.attn", "query": "attention.attn.q"},
    "distilbert": _BERT
    | {
        "stack": "transformer",
        "layers": "transformer.layer",
        "attention": "attention",
        "query": "attention.q_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm": "output_layer_norm",
        "activation": "ffn.activation",
    },
    "modernbert": {
        "stack": "",
        "layers": "layers",
        "attention": "attn",
        "query": "attn.Wqkv",
        "up": "mlp.Wi",
        "down": "mlp.Wo",
        "norm": "mlp_norm",
        "activation": "mlp.act",
        "words": "embeddings.tok_embeddings",
        "first_norm": "embeddings.norm",
    },
}
_NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "mlp_dropout")


class InapplicableError(Exception):
    """The edit means nothing for a model of this architecture; the argument says why."""


def made(kind: str, folder) -> object:
    """A tiny SentenceTransformer without dropout, in evaluation mode."""
    path = folder / kind
    if not path.exists():
        size = tiny_models.save_tokenizer(path)
        options = {name: 0.0 for name in _NO_DROPOUT if hasattr(encoders.config(kind), name)}
        torch.manual_seed(0)
        encoders.model(kind, vocab_size=size, **options).save_pretrained(path)
    return tiny_models.build(str(path))


def base(model):
    return model[0].auto_model


def kind_of(model):
    return base(model).config.model_type


def _names(model):
    return _OTHERS.get(kind_of(model), _BERT)


def stack(model):
    """The module that runs the layers one after the other."""
    return base(model).get_submodule(_names(model)["stack"])


def layers(model):
    return base(model).get_submodule(_names(model)["layers"])


def layer(model):
    return one(list(layers(model)))


def part(model, name, of=None):
    """A part of a layer, drawn or given, by its name in the table; or one before all layers."""
    path = _names(model)[name]
    return (
        base(model).get_submodule(path) if path.startswith("embeddings") else (of or layer(model)).get_submodule(path)
    )


def owner_of(model, module):
    """Who has the module, and under which name."""
    return next((x, name) for x in base(model).modules() for name, y in x.named_children() if y is module)


def linears(model):
    return [x for name, x in base(model).named_modules() if type(x) is nn.Linear and "pooler" not in name]


def weight_or_bias(linear):
    return one([name for name, x in linear.named_parameters()])


def one(items):
    return items[int(torch.randint(len(items), ()))]


def by_chance(share=0.5):
    return bool(torch.rand(()) < share)


def scaled(function):
    """The function with other results where they are tensors of real numbers."""

    @functools.wraps(function)
    def patched(*args, **kwargs):
        out = function(*args, **kwargs)
        return skewed(out) if isinstance(out, torch.Tensor) and out.is_floating_point() else out

    return patched


# By another way than a patch of ``torch.Tensor`` takes.
_times, _line = torch.mul, torch.linspace


def skewed(x):
    """Another tensor of the same shape, even after a layer norm."""
    return _times(x, _line(0.5, 2, x.shape[-1], dtype=x.dtype, device=x.device) if x.ndim else 1.5)


def collect(names):
    """The edits of a file by name: functions of a model and a patch."""
    return {
        name: value
        for name, value in names.items()
        if isinstance(value, types.FunctionType)
        and value.__code__.co_varnames[:2] == ("model", "patch")
        and value.__module__ == names["__name__"]
        and not name.startswith("_")
    }


def replaces(owner, name):
    def edit(model, patch):
        patch.setattr(owner, name, scaled(getattr(owner, name)))

    edit.__name__ = f"{owner.__name__.rpartition('.')[2]}.{name}"
    return edit


class Negative(nn.Module):
    def forward(self, x):
        return -x
