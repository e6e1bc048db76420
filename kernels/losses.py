"""Contrastive loss in Triton: the rows of a block; the products around them are cuBLAS'."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sentfast import reference
from sentfast.reference.losses import Row, Segment, guide_limits
from sentfast.registry import implements

from .triton_utils import loop_bound, on_device

IN_BATCH_NEGATIVES = tl.constexpr(reference.losses.IN_BATCH_NEGATIVES)
HARD_NEGATIVES = tl.constexpr(reference.losses.HARD_NEGATIVES)
ALL_NEGATIVES = tl.constexpr(reference.losses.ALL_NEGATIVES)
INFINITY = tl.constexpr(float("inf"))
_HAS_MIXED_PRODUCT = hasattr(torch.ops.aten.mm, "dtype")


@triton.jit
def _logit(similarity, column, own, period, scale, strength, HARDNESS: tl.constexpr):
    value = similarity * scale
    if HARDNESS == IN_BATCH_NEGATIVES:
        value += tl.where(column % period != own, similarity * strength, 0.0)
    if HARDNESS == HARD_NEGATIVES:
        value += tl.where((column % period == own) & (column != own), similarity * strength, 0.0)
    if HARDNESS == ALL_NEGATIVES:
        value += tl.where(column != own, similarity * strength, 0.0)
    return value


@triton.jit(do_not_specialize=["first_own", "period"])
def _statistics_kernel(
    scores,
    guide,
    limits,
    row_scale,
    column_scale,
    ids,
    scale,
    tops,
    totals,
    means,
    positives,
    columns,
    first_own,
    period,
    strength,
    POSITIVE: tl.constexpr,
    HARDNESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: scores become similarities, -inf where left out.

    Of the logits the largest (0 where it is not finite) and the sum of exponentials of their distance from it, and the
    softmax mean of the similarities.
    """
    row = tl.program_id(0).to(tl.int64)
    own = row + first_own
    scores += row * columns
    lane = tl.arange(0, BLOCK)
    factor = tl.load(scale)
    if row_scale is not None:
        left = tl.load(row_scale + row)
    if guide is not None:
        guide += row * columns
        limit = tl.load(limits + row)
    if ids is not None:
        own_id = tl.load(ids + own)
    most = -INFINITY
    shift = 0.0
    total = 0.0
    moment = 0.0
    for block in range(0, loop_bound(columns), BLOCK):
        column = block + lane
        inside = column < columns
        value = tl.load(scores + column, mask=inside, other=-INFINITY)
        if row_scale is not None:
            value *= left * tl.load(column_scale + column, mask=inside, other=1.0)
        out = column != column
        if guide is not None:
            out = tl.load(guide + column, mask=inside, other=-INFINITY) > limit
            if POSITIVE:
                out = out & (column != own)
        elif not POSITIVE:
            out = column % period == own
        if ids is not None:
            out = out | ((tl.load(ids + column, mask=inside, other=0) == own_id) & (column != own))
        tl.store(positives + row + column * 0, value, mask=column == own)
        value = tl.where(out | (column >= columns), -INFINITY, value)
        tl.store(scores + column, value, mask=inside)
        logit = _logit(value, column, own, period, factor, strength, HARDNESS)
        top = tl.maximum(most, tl.max(logit, 0))
        new_shift = tl.where(tl.abs(top) < INFINITY, top, 0.0)
        kept = tl.where(most == -INFINITY, 0.0, tl.exp(shift - new_shift))
        exponential = tl.exp(logit - new_shift)
        total = total * kept + tl.sum(exponential, 0)
        moment = moment * kept + tl.sum(tl.where(exponential > 0, exponential * value, 0.0), 0)
        most = top
        shift = new_shift
    tl.store(tops + row, shift)
    tl.store(totals + row, total)
    tl.store(means + row, tl.where(total == 0, 0.0, moment / total))  # 0: all are left out


@triton.jit(do_not_specialize=["first_own", "period"])
def _gradient_kernel(
    scores,
    row_scale,
    column_scale,
    scale,
    tops,
    totals,
    weights,
    columns,
    first_own,
    period,
    strength,
    share,
    FIRST: tl.constexpr,
    HARDNESS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row and block of columns: similarities become derivatives by the plain products."""
    row = tl.program_id(0).to(tl.int64)
    own = row + first_own
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    scores += row * columns
    factor = tl.load(scale)
    value = tl.load(scores + column, mask=inside, other=-INFINITY)
    logit = _logit(value, column, own, period, factor, strength, HARDNESS)
    total = tl.load(totals + row)
    gradient = tl.exp(logit - tl.load(tops + row)) * share
    if FIRST:
        # Before the division, so that a row with no other candidate has a gradient of exactly zero.
        gradient -= tl.where(column == own, total, 0.0)
    gradient = gradient / total * (factor * tl.load(weights + row))
    if row_scale is not None:
        gradient *= tl.load(row_scale + row) * tl.load(column_scale + column, mask=inside, other=1.0)
    tl.store(scores + column, gradient, mask=inside)


def _block(columns: int) -> int:
    return min(max(triton.next_power_of_2(columns), 16), 1024)


def _statistics(segment: Segment, row: Row, limits: Tensor | None) -> Tensor:
    """Largest logit, sum of exponentials, softmax mean of the similarities, similarity of the own column: [4, rows]."""
    rows, columns = segment.scores.shape
    found = segment.scores.new_empty(4, rows)
    _statistics_kernel[(rows,)](
        segment.scores,
        segment.guide,
        limits,
        segment.row_scale,
        segment.column_scale,
        segment.ids,
        row.scale,
        *found,
        columns,
        segment.own,
        segment.period,
        row.strength,
        POSITIVE=segment.positive,
        HARDNESS=segment.hardness,
        BLOCK=_block(columns),
        num_warps=4,
    )
    return found


def _joined(tops: Tensor, totals: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over all segments, [segments, rows] each; a segment of which all is left out has the total 0."""
    tops = tops.masked_fill(totals == 0, -torch.inf)
    top = tops.amax(dim=0).nan_to_num(neginf=0.0)
    parts = totals * torch.exp(tops - top)
    total = parts.sum(dim=0)
    return top.expand_as(tops), total.expand_as(tops), (parts / total * means).sum(dim=0, keepdim=True)


def _differentiate(segment: Segment, row: Row, top: Tensor, total: Tensor, weights: Tensor, first: bool) -> None:
    rows, columns = segment.scores.shape
    block = _block(columns)
    _gradient_kernel[(rows, triton.cdiv(columns, block))](
        segment.scores,
        segment.row_scale,
        segment.column_scale,
        row.scale,
        top,
        total,
        weights,
        columns,
        segment.own,
        segment.period,
        row.strength,
        1.0 / row.groups,
        FIRST=first,
        HARDNESS=segment.hardness,
        BLOCK=block,
        num_warps=4,
    )


def contrastive_rows(segments: list[Segment], row: Row, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`sentfast.reference.losses.contrastive_rows`."""
    limits = guide_limits(segments[0], row)
    with on_device(segments[0].scores):
        found = torch.stack([_statistics(segment, row, limits) for segment in segments], dim=1)
        tops, totals, means, positives = found
        positive = positives[0]
        if row.groups == 1:
            tops, totals, means = _joined(tops, totals, means)
        groups = slice(row.groups)
        losses = (tops[groups] - positive * row.scale + totals[groups].log()).mean(dim=0)
        if weights is not None:
            weights = weights.contiguous()
            for i, segment in enumerate(segments):
                _differentiate(segment, row, tops[i], totals[i], weights, i == 0)
    return losses, means.mean(dim=0) - positive


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T in float32: half numbers on the tensor cores."""
    half = torch.float32 not in (a.dtype, b.dtype)
    if not half and b.dtype == torch.bfloat16:  # a gradient, whose rounding is that of the result
        a, half = a.to(torch.bfloat16), True
    if half and a.is_cuda and _HAS_MIXED_PRODUCT:
        return torch.mm(a, b.mT, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float().mT)


@implements("contrastive_loss")
def contrastive_loss(*arguments) -> Tensor:
    return reference.contrastive_loss(*arguments, product=product, rows=contrastive_rows)


@implements("contrastive_loss_forward")
def contrastive_loss_forward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.contrastive_loss_forward(*arguments, product=product, rows=contrastive_rows)
