"""Models of sentence-transformers over drawn transformers, put together without a file: building is most of a case."""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

import architectures
import tiny_models
import torch
from draw import Draw
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as st_transformer
from sentence_transformers.sentence_transformer import modules as st_modules
from torch import nn

POOLING_MODES = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
PROMPTS = {"query": "query : ", "document": "the passage: ", "empty": ""}
_TASKS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "fill-mask": ("logits", "token_embeddings"),
}


@functools.cache
def _template() -> Any:
    """A Transformer module of sentence-transformers without its model, loaded once."""
    # Only the first run of a process comes here, so no random number may be missing afterwards.
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        made = st_transformer.Transformer(tiny_models.save_base(Path(folder), "bert"))
    made.model = nn.Identity()
    return made


def transformer(draw: Draw, model: Any, task: str = "feature-extraction") -> Any:
    """The Transformer module around a model."""
    made = copy.deepcopy(_template())
    made.model = model
    parameters = inspect.signature(model.forward).parameters
    made._declared_forward_params = set(parameters)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    made.model_forward_params = None if open_ended else set(parameters) | st_transformer._FORWARD_SAFETY_NET_KEYS
    output, feature = _TASKS[task]
    made.transformer_task = task
    made.modality_config = {"text": {"method": "forward", "method_output_name": output}}
    made.module_output_name = feature
    made.tokenizer.model_max_length = draw.one_of("max_seq_length", (40, 5, 16, 64), p=0.3)
    made.tokenizer.padding_side = draw.one_of("padding side", ("right", "left"), p=0.08)
    return made


def width(model: Any) -> int:
    config = model.config
    return getattr(config, "hidden_size", None) or config.dim


def pooling(draw: Draw, dimension: int) -> Any:
    modes: Any = tuple(draw.some_of("pooling modes", POOLING_MODES)) if draw.chance("several modes", 0.25) else ()
    modes = modes or draw.one_of("pooling mode", POOLING_MODES)
    return st_modules.Pooling(dimension, pooling_mode=modes, include_prompt=not draw.chance("exclude prompt", 0.2))


class Lengths(nn.Module):
    """A module of the user's: LSTM wants lengths, which the tokenizers of today no longer give."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features["sentence_lengths"] = features["attention_mask"].sum(1)
        return features


class Own(nn.Module):
    """An activation of the user's, which looks at the whole row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=-1, keepdim=True)


def dense_activation(draw: Draw, width: int) -> nn.Module:
    makers = {
        "tanh": nn.Tanh,
        "identity": nn.Identity,
        "gelu": nn.GELU,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid,
        "softmax": lambda: nn.Softmax(dim=-1),
        "softmax of dimension 0": lambda: nn.Softmax(dim=0),
        "glu": nn.GLU,
        "layer norm": lambda: nn.LayerNorm(width),
        "prelu": lambda: nn.PReLU(width),
        "sequential": lambda: nn.Sequential(nn.Linear(width, 5), nn.Tanh()),
        "own": Own,
        "hardtanh": nn.Hardtanh,
        "softplus": nn.Softplus,
        "elu": nn.ELU,
    }
    name = draw.one_of("dense activation", tuple(makers))
    return makers[name]()


def sentence_module(draw: Draw, dimension: int) -> tuple[nn.Module, int]:
    """A module that works on the sentence embedding, and the dimension after it."""
    kind = draw.one_of("module", ("normalize", "dense", "dropout", "layer norm"))
    if kind == "normalize":
        return st_modules.Normalize(), dimension
    if kind == "dropout":
        return st_modules.Dropout(0.0), dimension
    if kind == "layer norm":
        return draw.weights(st_modules.LayerNorm(dimension)), dimension
    out = draw.one_of("dense width", (16, 2, 6, 30, 64, 128))
    activation = dense_activation(draw, out)
    options = {"bias": not draw.chance("no bias", 0.3), "use_residual": draw.chance("residual", 0.15)}
    made = st_modules.Dense(dimension, out, activation_function=activation, **options)
    draw.weights(made)
    with torch.no_grad():
        after = activation(torch.zeros(2, out)).shape[-1]
    return made, after


def token_module(draw: Draw, dimension: int, tokenizer: Any) -> tuple[list[nn.Module], int]:
    """A module that works on the token embeddings."""
    kind = draw.one_of("token module", ("cnn", "lstm", "word weights"))
    if kind == "cnn":
        made: Any = st_modules.CNN(dimension, draw.integer("channels", 4, 9), [1, 3])
        return [draw.weights(made)], made.get_embedding_dimension()
    if kind == "lstm":
        made = st_modules.LSTM(dimension, 6, bidirectional=draw.chance("bidirectional"))
        return [Lengths(), draw.weights(made)], made.get_embedding_dimension()
    weights = {"the": 2.0, "query": 0.5, "a": 0.0}
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return [st_modules.WordWeights(vocabulary, weights, 1.5)], dimension


def sentence_transformer(draw: Draw, dropout: float = 0.0, kind: str = "") -> SentenceTransformer:
    model = architectures.base(draw, kind or architectures.model_type(draw, covered=0.9), dropout)
    first = transformer(draw, model)
    dimension = width(model)
    parts: list[Any] = [first]
    if draw.chance("token modules", 0.12):
        more, dimension = token_module(draw, dimension, first.tokenizer)
        parts += more
    parts.append(pooling(draw, dimension))
    dimension = parts[-1].get_embedding_dimension()
    for _ in range(draw.integer("sentence modules", 0, 3)):
        module, dimension = sentence_module(draw, dimension)
        parts.append(module)
    prompts = dict(PROMPTS) if draw.chance("prompts") else None
    default = draw.one_of("default prompt", (None, "query"), p=0.2) if prompts else None
    made = SentenceTransformer(modules=parts, device="cpu", prompts=prompts, default_prompt_name=default)
    made.eval()
    architectures.cast(draw, made)
    return made


# Texts

_ODD = (
    "",
    " ",
    "\n",
    "\x00",
    "🙂🙂",
    "é" * 9,
    "中文 я",
    "[MASK] [SEP] [PAD]",
    "a" * 300,
    "the " * 80,
    "[CLS]",
)


def texts(draw: Draw, name: str, count: int) -> list[str]:
    """Words of all lengths, some unknown; some texts are empty, long or odd."""
    stream = draw.stream(name)
    made = tiny_models.texts(count, seed=stream.randrange(10**6))
    for i in range(count):
        if stream.random() < 0.08:
            made[i] = stream.choice(_ODD)
    return made
