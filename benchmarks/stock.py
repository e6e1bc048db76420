"""What a user runs today: sentence-transformers' own modules, and plain PyTorch under torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pool = Callable[[Tensor, Tensor], Tensor]


def stock_pool(mode: str) -> Pool:
    """Pooling and Normalize of sentence-transformers, as a model runs them."""
    modules: list = []

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        if not modules:
            modules.extend(_modules(mode, x.shape[-1]))
        features = {"token_embeddings": x, "attention_mask": mask}
        for module in modules:
            features = module(features)
        return features["sentence_embedding"]

    return pool


def _modules(mode: str, dim: int) -> tuple:
    try:
        found = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError:  # as it was called before
        found = importlib.import_module("sentence_transformers.models")
    return found.Pooling(dim, mode), found.Normalize()


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def _max(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1) != 0, x, float("-inf")).amax(1)


def _cls(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0]


def _lasttoken(x: Tensor, mask: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device), mask.sum(1) - 1]


def _weightedmean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask * torch.arange(1, x.shape[1] + 1, device=x.device)
    return (x * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True)


def _mean_sqrt_len_tokens(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).sqrt()


# For padding on the right only: written for speed, not for every mask.
_PLAIN: dict[str, Pool] = {
    "mean": _mean,
    "max": _max,
    "cls": _cls,
    "lasttoken": _lasttoken,
    "weightedmean": _weightedmean,
    "mean_sqrt_len_tokens": _mean_sqrt_len_tokens,
}


def compiled_pool(mode: str) -> Pool:
    """Pooling and normalisation in plain PyTorch, compiled for each shape."""
    torch.compiler.reset()
    plain = _PLAIN[mode]

    def pool(x: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(plain(x, mask), p=2, dim=-1)

    return torch.compile(pool, dynamic=False)
