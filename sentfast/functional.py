"""The operators as functions, in the manner of ``torch.nn.functional``."""

from sentfast.ops.losses import contrastive_loss
from sentfast.ops.pooling import pool
from sentfast.ops.similarity import (
    cosine_similarity,
    dot_similarity,
    l2_normalize,
    pairwise_cosine_similarity,
    pairwise_similarity,
)

__all__ = [
    "contrastive_loss",
    "cosine_similarity",
    "dot_similarity",
    "l2_normalize",
    "pairwise_cosine_similarity",
    "pairwise_similarity",
    "pool",
]
