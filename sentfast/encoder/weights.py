"""The operator's `weights` list, made of the model's own parameters.

Tables, norms and biases in the right dtype are the parameters themselves, and so are the matrices of a large model in
float32. Only other matrices are copied, into panels, and those that adapters add to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sentfast.encoder import adapters
from sentfast.encoder.examine import LayerParts, Parts
from sentfast.ops.encoder import pack_panels
from sentfast.reference import PANEL, Embedding, Layer

# From so many bytes on, float32 matrices stay where they are. Panels make a batch about 3% and a single query 5 to 15%
# faster, which is not worth a second copy of a large model.
LARGE = 64 << 20

Matrix = Callable[[Sequence[Tensor]], Tensor]


def _matrices(parts: Parts) -> list[Tensor]:
    matrices = [linear.weight for layer in parts.layers for linear in (*layer.qkv, layer.output, layer.up, layer.down)]
    return matrices + ([] if parts.projection is None else [parts.projection.weight])


def can_stay(parts: Parts, compute_dtype: torch.dtype) -> bool:
    """Whether the products can read the matrices where they are."""
    plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in _matrices(parts))
    return plain and compute_dtype == torch.float32


def large(parts: Parts) -> bool:
    return sum(x.nbytes for x in _matrices(parts)) >= LARGE


def pack(parts: Parts, compute_dtype: torch.dtype, small_too: bool = False) -> list[Tensor]:
    """compute_dtype: float32 or bfloat16, in which the products are computed.

    small_too: the matrices of a small model stay where they are as well.
    """
    stays = can_stay(parts, compute_dtype) and (small_too or large(parts))
    matrix: Matrix = _itself if stays else partial(panels, dtype=compute_dtype)
    head = Embedding(
        positions=_table(parts.positions),
        token_types=_table(parts.token_types),
        norm_weight=_float(parts.embedding_norm.weight),
        norm_bias=_float(parts.embedding_norm.bias),
        projection_weight=_empty() if parts.projection is None else matrix([adapters.weight(parts.projection)]),
        projection_bias=_empty() if parts.projection is None else _bias([parts.projection], always=True),
        attention_bias=_attention_bias(parts),
        rotary=_rotary(parts),
        final_norm_weight=_empty() if parts.final_norm is None else _float(parts.final_norm.weight),
        final_norm_bias=_empty() if parts.final_norm is None else _float(parts.final_norm.bias),
    )
    weights = list(head)
    for layer in parts.layers:
        weights += _layer(layer, matrix, stays)
    return weights


def _itself(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0].detach()


def panels(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The pieces' rows one below the other, in panels of `dtype`."""
    pieces = [piece.detach() for piece in pieces]
    if any(piece.shape[0] % PANEL for piece in pieces[:-1]):
        pieces = [torch.cat(pieces)]
    return pack_panels(pieces[0], pieces[1:], dtype == torch.bfloat16)


def _layer(layer: LayerParts, matrix: Matrix, stays: bool) -> Layer:
    first, second = layer.attention_norm, layer.feed_forward_norm
    query, *others = map(adapters.weight, layer.qkv)
    apart = stays and bool(others)  # key and value, which panels hold below the query
    return Layer(
        qkv_weight=matrix([query, *others]),
        key_weight=matrix(others[:1]) if apart else _empty(),
        value_weight=matrix(others[1:]) if apart else _empty(),
        qkv_bias=_bias(layer.qkv),
        output_weight=matrix([adapters.weight(layer.output)]),
        output_bias=_bias([layer.output]),
        attention_norm_weight=_empty() if first is None else _float(first.weight),
        attention_norm_bias=_empty() if first is None else _float(first.bias),
        up_weight=matrix([adapters.weight(layer.up)]),
        up_bias=_bias([layer.up]),
        down_weight=matrix([adapters.weight(layer.down)]),
        down_bias=_bias([layer.down]),
        feed_forward_norm_weight=_float(second.weight),
        feed_forward_norm_bias=_float(second.bias),
    )


def _empty() -> Tensor:
    return torch.empty(0)


def _table(embedding: nn.Embedding | None) -> Tensor:
    return _empty() if embedding is None else embedding.weight.detach().contiguous()


def _float(parameter: Tensor | None) -> Tensor:
    return _empty() if parameter is None else parameter.detach().float().contiguous()


def _bias(linears: Sequence[nn.Linear], always: bool = False) -> Tensor:
    """Side by side, zeros for one that has none; empty if none has one, unless it must be there."""
    if len(linears) == 1 and linears[0].bias is not None:
        return _float(linears[0].bias)
    if not always and all(linear.bias is None for linear in linears):
        return _empty()
    zeros = [torch.zeros(linear.out_features) for linear in linears]
    return torch.cat([_float(x.bias) if x.bias is not None else zero for x, zero in zip(linears, zeros, strict=True)])


def _attention_bias(parts: Parts) -> Tensor:
    """[heads, 2 * R - 1] for sequences of up to R tokens, by the model's own rule of buckets."""
    if parts.bias is None:
        return _empty()
    longest = parts.length - parts.position_offset
    distance = torch.arange(1 - longest, longest)
    table = parts.bias.relative_attention_bias.weight.detach().float()
    return table[parts.bias.relative_position_bucket(distance)].t().contiguous()


def _rotary(parts: Parts) -> Tensor:
    """[2, P, head size] by the model's own rule of angles; a cosine and its twin in the other half are the same."""
    if not parts.rotary:
        return _empty()
    positions = torch.arange(parts.length).unsqueeze(0)
    half = parts.hidden_size // parts.heads // 2
    tables = []
    for angles in parts.rotary:
        cosines, sines = angles(positions)
        tables.append(torch.cat([cosines[0, :, :half], sines[0, :, :half]], dim=-1).float())
    return torch.stack(tables)
