"""The packed encoder: which models it covers, their weights as the kernels read them, and how to run them."""

from sentfast.encoder.composed import Composed
from sentfast.encoder.device import pack_on_device
from sentfast.encoder.encoder import encoder_of, encoder_or_parts
from sentfast.encoder.on_cpu import Encoder
from sentfast.encoder.packed import Packed, pack_padded
from sentfast.encoder.training import token_embeddings

__all__ = [
    "Composed",
    "Encoder",
    "Packed",
    "encoder_of",
    "encoder_or_parts",
    "pack_on_device",
    "pack_padded",
    "token_embeddings",
]
