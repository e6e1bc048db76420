"""The packed encoder: from token ids to token embeddings or sentence embeddings, without a gradient."""

from __future__ import annotations

import torch

from sentfast import reference
from sentfast.registry import define


def _encoder_fake(
    word_embeddings,
    input_ids,
    cu_seqlens,
    token_type_ids,
    position_ids,
    weights,
    heads,
    activation,
    windows,
    pre_norm,
    gated,
    position_offset,
    eps,
    modes,
    prompt_length,
    normalize,
    padded_length,
):
    # Every layer has a down projection of hidden size rows; its norm has that size whatever the panels are filled to.
    hidden = weights[-2].shape[0]
    batch = cu_seqlens.shape[0] - 1
    if modes:
        return word_embeddings.new_empty(batch, len(modes) * hidden)
    if padded_length > 0:
        return word_embeddings.new_empty(batch, padded_length, hidden)
    return word_embeddings.new_empty(input_ids.shape[0], hidden)


encoder = define(
    "encoder(Tensor word_embeddings, Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor? position_ids,"
    " Tensor[] weights, int heads, int activation, int[] windows, bool pre_norm, bool gated, int position_offset,"
    " float eps, int[] modes, int prompt_length, bool normalize, int padded_length) -> Tensor",
    reference=reference.encoder,
    fake=_encoder_fake,
)


def _pack_panels_fake(weight, below, pairs):
    rows, columns = weight.shape[0] + sum(piece.shape[0] for piece in below), weight.shape[1]
    panels = -(-rows // reference.PANEL)
    if pairs:
        return weight.new_empty(panels, -(-columns // 2), reference.PANEL, 2, dtype=torch.bfloat16)
    dtype = reference.accumulation_dtype(weight.dtype)
    return weight.new_empty(panels, columns, reference.PANEL, dtype=dtype)


pack_panels = define(
    "pack_panels(Tensor weight, Tensor[] below, bool pairs) -> Tensor",
    reference=reference.pack_panels,
    fake=_pack_panels_fake,
)
