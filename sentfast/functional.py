"""The operators as functions, in the manner of ``torch.nn.functional``."""

from sentfast.ops.attention import varlen_attention, varlen_attention_qkvpacked
from sentfast.ops.layers import bias_activation, dropout, dropout_add_layer_norm
from sentfast.ops.linear import linear, linear_activation
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
    "bias_activation",
    "contrastive_loss",
    "cosine_similarity",
    "dot_similarity",
    "dropout",
    "dropout_add_layer_norm",
    "l2_normalize",
    "linear",
    "linear_activation",
    "pairwise_cosine_similarity",
    "pairwise_similarity",
    "pool",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
