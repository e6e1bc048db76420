"""Every operator in plain PyTorch: the definition, the fallback and, called in float64, the oracle of the tests.

Each function has the name and the signature of the registered operator (see ``sentfast/ops``). Half inputs
accumulate in float32; every other dtype accumulates in itself, so float64 stays float64 throughout.
This package imports nothing from the others.
"""

from sentfast.reference.attention import rotary_attention, varlen_attention_backward, varlen_attention_forward
from sentfast.reference.encoder import PANEL, Embedding, Layer, encoder, pack_panels, unpack_panels
from sentfast.reference.layers import (
    ACTIVATIONS,
    bias_activation,
    bias_activation_backward,
    dropout_add_layer_norm_backward,
    dropout_add_layer_norm_forward,
    gated_activation,
    linear_activation,
    linear_gated_activation,
    norm_statistics,
    product,
    rotate_,
)
from sentfast.reference.losses import DIRECTIONS, HARDNESS_MODES, contrastive_loss, contrastive_loss_forward
from sentfast.reference.pooling import (
    CLS,
    LASTTOKEN,
    MAX,
    MEAN,
    MEAN_SQRT_LEN_TOKENS,
    POOLING_MODES,
    WEIGHTEDMEAN,
    pool_backward,
    pool_forward,
)
from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.random import dropout
from sentfast.reference.similarity import (
    COSINE,
    DOT,
    EUCLIDEAN,
    MANHATTAN,
    NORMALIZE_EPS,
    PAIRWISE_METRICS,
    cosine_similarity_forward,
    dot_similarity,
    l2_normalize_backward,
    l2_normalize_forward,
    pairwise_similarity_backward,
    pairwise_similarity_forward,
)

__all__ = [
    "ACTIVATIONS",
    "CLS",
    "COSINE",
    "DIRECTIONS",
    "DOT",
    "EUCLIDEAN",
    "HARDNESS_MODES",
    "LASTTOKEN",
    "MANHATTAN",
    "MAX",
    "MEAN",
    "MEAN_SQRT_LEN_TOKENS",
    "NORMALIZE_EPS",
    "PAIRWISE_METRICS",
    "PANEL",
    "POOLING_MODES",
    "WEIGHTEDMEAN",
    "Embedding",
    "Layer",
    "accumulation_dtype",
    "bias_activation",
    "bias_activation_backward",
    "contrastive_loss",
    "contrastive_loss_forward",
    "cosine_similarity_forward",
    "dot_similarity",
    "dropout",
    "dropout_add_layer_norm_backward",
    "dropout_add_layer_norm_forward",
    "encoder",
    "gated_activation",
    "l2_normalize_backward",
    "l2_normalize_forward",
    "linear_activation",
    "linear_gated_activation",
    "norm_statistics",
    "pack_panels",
    "pairwise_similarity_backward",
    "pairwise_similarity_forward",
    "pool_backward",
    "pool_forward",
    "product",
    "rotary_attention",
    "rotate_",
    "unpack_panels",
    "varlen_attention_backward",
    "varlen_attention_forward",
]
