"""Tiny random models in the form of the real ones: a WordPiece vocabulary of letters, two layers, 32 columns."""

from __future__ import annotations

import random
from pathlib import Path

import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer, models
from sentence_transformers import __version__ as st_version

VERSION = tuple(int(part) for part in st_version.split(".")[:2])
HIDDEN = 32
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ["the", "query", "passage", "weather", "in", ":", ",", ".", "?", "é", "中", "я"]
MAX_LENGTH = 40

_SIZES = dict(
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    pad_token_id=1,
    initializer_range=0.3,
)
_CONFIGS = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
}


def save_tokenizer(path: Path) -> int:
    """Returns the size of the vocabulary."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    # As many published models: saved in a state in which nobody can use it.
    tokenizer.enable_truncation(9)
    tokenizer.enable_padding(length=9, pad_id=1, pad_token="[PAD]")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "pad", "sep", "unk", "mask")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **names)
    fast.save_pretrained(path)
    return len(vocabulary)


def save_base(folder: Path, kind: str, **sizes: float) -> str:
    """A base model of transformers with its tokenizer; sizes: instead of the tiny ones."""
    path = folder / kind
    config, cls = _CONFIGS[kind]
    vocabulary = save_tokenizer(path)
    torch.manual_seed(0)
    cls(config(vocab_size=vocabulary, **{**_SIZES, **sizes})).save_pretrained(path)
    return str(path)


def pooling(modes: tuple[str, ...] = ("mean",), include_prompt: bool = True) -> models.Pooling:
    if VERSION >= (5, 4):
        return models.Pooling(HIDDEN, pooling_mode=modes, include_prompt=include_prompt)
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{name}": mode in modes for mode, name in names.items()}
    return models.Pooling(HIDDEN, include_prompt=include_prompt, **flags)


def build(path: str, *tail: torch.nn.Module, modes=("mean",), include_prompt=True, cls=SentenceTransformer, **kwargs):
    torch.manual_seed(1)
    transformer = models.Transformer(path)
    model = cls(modules=[transformer, pooling(modes, include_prompt), *tail], device="cpu", **kwargs)
    return model.eval()


def texts(count: int, seed: int = 0) -> list[str]:
    """Words of all lengths, some unknown to the vocabulary, some texts empty, some longer than the model takes."""
    draw = random.Random(seed)
    alphabet = LETTERS + "éñß中я🙂\u200b\t ['"

    def word() -> str:
        return draw.choice(WORDS) if draw.random() < 0.3 else "".join(draw.choices(alphabet, k=draw.randrange(1, 8)))

    lengths = (draw.choice([0, 1, 2, 3, 5, 8, 13, 30, 100]) for _ in range(count))
    return [" ".join(word() for _ in range(length)) for length in lengths]
