"""The packed encoder: which models it covers, their weights as the kernels read them, and how to run them."""

from sentfast.encoder.encoder import Encoder, encoder_of, parts_of
from sentfast.encoder.packed import Packed, pack_padded
from sentfast.encoder.training import token_embeddings

__all__ = ["Encoder", "Packed", "encoder_of", "pack_padded", "parts_of", "token_embeddings"]
