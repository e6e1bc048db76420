"""The packed encoder: which models it covers, their weights as the kernels read them, and how to run them."""

from sentfast.encoder.encoder import Encoder, encoder_of
from sentfast.encoder.packed import Packed, pack_padded

__all__ = ["Encoder", "Packed", "encoder_of", "pack_padded"]
