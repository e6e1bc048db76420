"""Transformers of all kinds with random weights, small and of odd sizes: those that the encoder covers, and others."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from draw import Draw
from torch import nn

VOCABULARY = 90  # of the tokenizer in tiny_models, and a few more
PADDING = 1
POSITIONS = 66
HEAD_SIZES = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 104, 112, 120, 128, 12)
ACTIVATIONS = ("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh")
OTHER_ACTIVATIONS = ("quick_gelu", "tanh", "gelu_fast", "mish")
COVERED = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
}
OTHERS = {
    "albert": "Albert",
    "deberta-v2": "DebertaV2",
    "ernie": "Ernie",
    "gpt2": "GPT2",
    "megatron-bert": "MegatronBert",
    "roformer": "RoFormer",
    "t5": "T5",
}
WITH_POOLER = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "albert", "ernie", "megatron-bert")


def model_type(draw: Draw, covered: float = 0.85) -> str:
    if draw.chance("not covered", 1 - covered):
        return draw.one_of("other architecture", tuple(OTHERS))
    return draw.one_of("architecture", tuple(COVERED))


def sizes(draw: Draw, kind: str) -> dict[str, Any]:
    """Hidden size, heads, layers, width of the feed-forward part, by the names of the model's configuration."""
    head = draw.one_of("head size", HEAD_SIZES)
    heads = draw.integer("heads", 1, max(1, min(4, 128 // head)))
    layers = draw.one_of("layers", (1, 2, 2, 3))
    width = draw.one_of("intermediate size", (16, 1, 7, 33, 64, 100, 257))
    if kind == "distilbert":
        return dict(dim=head * heads, n_heads=heads, n_layers=layers, hidden_dim=width)
    if kind == "gpt2":
        return dict(n_embd=head * heads, n_head=heads, n_layer=layers, n_inner=width, n_positions=POSITIONS)
    if kind == "t5":
        return dict(d_model=head * heads, d_kv=head, num_heads=heads, num_layers=layers, d_ff=width)
    return dict(hidden_size=head * heads, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=width)


def special(draw: Draw, kind: str) -> dict[str, Any]:
    """What only some of them have."""
    if kind == "electra":
        return dict(embedding_size=draw.one_of("embedding size", (24, 16, 32, 7)))
    if kind == "albert":
        return dict(embedding_size=draw.one_of("embedding size", (24, 16)), hidden_act="gelu")
    if kind == "modernbert":
        return dict(
            global_attn_every_n_layers=draw.integer("global attention every", 1, 3),
            local_attention=draw.one_of("window", (8, 2, 4, 16, 128)),
            global_rope_theta=draw.one_of("global theta", (1000.0, 160000.0, 3.0)),
            local_rope_theta=draw.one_of("local theta", (100.0, 10000.0)),
            norm_bias=draw.chance("norm bias"),
            attention_bias=draw.chance("attention bias"),
            mlp_bias=draw.chance("mlp bias"),
            **{f"{name}_token_id": 2 for name in ("cls", "sep", "bos", "eos")},
        )
    return {}


def config(draw: Draw, kind: str, dropout: float = 0.0, **options: Any) -> Any:
    options |= dict(vocab_size=VOCABULARY + draw.integer("more words", 0, 9), pad_token_id=PADDING)
    if kind not in ("gpt2", "t5", "modernbert"):
        options["max_position_embeddings"] = POSITIONS + draw.integer("more positions", 0, 9)
    options |= sizes(draw, kind)
    eps = draw.one_of("eps", (1e-12, 1e-5, 1e-3, 0.1), p=0.4)
    activation = draw.one_of("activation", ACTIVATIONS, p=0.5)
    if draw.chance("other activation", 0.08):
        activation = draw.one_of("which activation", OTHER_ACTIVATIONS)
    if kind == "modernbert":
        options |= dict(max_position_embeddings=POSITIONS, norm_eps=eps, hidden_activation=activation)
        options |= dict(attention_dropout=dropout, embedding_dropout=dropout, mlp_dropout=dropout)
    elif kind == "distilbert":
        options |= dict(activation=activation, dropout=dropout, attention_dropout=dropout)
    elif kind in ("gpt2", "t5"):
        options |= dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, dropout_rate=dropout)
    else:
        options |= dict(hidden_act=activation, layer_norm_eps=eps)
        options |= dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if kind not in ("distilbert", "mpnet", "modernbert", "gpt2", "t5"):
        options["type_vocab_size"] = draw.integer("token types", 1 if kind == "roberta" else 2, 4)
    options |= special(draw, kind)
    if draw.chance("output_hidden_states", 0.02):
        options["output_hidden_states"] = True
    if draw.chance("return_dict is False", 0.03):
        options["return_dict"] = False
    if kind in ("bert", "roberta", "electra", "xlm-roberta") and draw.chance("decoder", 0.04):
        options["is_decoder"] = True
    names = {**COVERED, **OTHERS}
    return getattr(transformers, f"{names[kind]}Config")(**options)


def base(draw: Draw, kind: str, dropout: float = 0.0, head: str = "Model", **more: Any) -> Any:
    """A model in evaluation mode; head: the end of its class's name; more: what its configuration must have."""
    name = {**COVERED, **OTHERS}[kind]
    cls = getattr(transformers, "T5EncoderModel" if kind == "t5" else f"{name}{head}")
    options: dict[str, Any] = {}
    if head == "Model" and kind in WITH_POOLER and draw.chance("without pooler", 0.3):
        options["add_pooling_layer"] = False
    made = cls(config(draw, kind, dropout, **more), **options).eval()
    draw.weights(made)
    attention(draw, made)
    return made


def attention(draw: Draw, made: Any) -> None:
    """Sets the attention implementation; in the exact run not one that takes its softmax in float32."""
    chosen = draw.one_of("attention implementation", ("sdpa", "eager"), p=0.3)
    if chosen == "eager" != made.config._attn_implementation and not (
        draw.exact and made.config.model_type == "modernbert"
    ):
        with contextlib.suppress(ValueError):  # some have one alone
            made.set_attn_implementation(chosen)


def cast(draw: Draw, made: nn.Module) -> torch.dtype:
    """The dtype of the model, drawn: the values are rounded to it, in the exact run too."""
    dtype = draw.one_of("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), p=0.15)
    made.to(dtype)
    draw.real(made)
    draw.coarse |= dtype == torch.bfloat16  # of which `encode` makes float32
    return dtype
