"""In-batch contrastive losses, a block of rows at a time: the matrix of all scores never exists.

The scores of a block are plain products; the norms of a cosine are factors of rows and columns. So nothing is
normalised beforehand, and the gradient of a block, times the same factors, gives both sides' gradients by products.

Of several prefixes each goes on from the products of the one before it. A column of the embeddings is in every prefix
that reaches it, so its gradient is one product with the sum of their scores' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sentfast.reference.loss_sides import Prefix, Side, prefixes_of, reciprocal, side_of, through_norms
from sentfast.reference.precision import accumulation_dtype
from sentfast.reference.similarity import dot_similarity

# The integers that stand for these in the operator's schema are their indices.
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
QUERY_TO_DOC, QUERY_TO_QUERY, DOC_TO_QUERY, DOC_TO_DOC = range(4)
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
NO_HARDNESS, IN_BATCH_NEGATIVES, HARD_NEGATIVES, ALL_NEGATIVES = range(4)


@dataclass
class Segment:
    """Scores of a block's rows with the columns of one direction; `row_scale` and `column_scale` are 1 / norms.

    Row i has its own columns at own + i + k * period: its positive first, or its own query. The first is never left
    out where `positive` says so; elsewhere all own columns are left out, with a guide only if it says so.
    """

    scores: Tensor  # [rows, columns] plain products, which become the gradient
    guide: Tensor | None  # [rows, columns]
    row_scale: Tensor | None
    column_scale: Tensor | None
    own_ids: Tensor | None  # [rows]
    ids: Tensor | None  # [columns]
    own: int
    period: int
    positive: bool
    hardness: int = NO_HARDNESS
    group: int = 0


@dataclass
class Row:
    """What is the same for every row."""

    scale: Tensor  # 0-d
    strength: float
    groups: int  # log-sum-exps, whose mean counts
    relative: bool
    margin: float


def _indices(segment: Segment) -> tuple[Tensor, Tensor]:
    """The first own column of each row, [rows, 1], and all columns, [columns]."""
    rows, columns = segment.scores.shape
    device = segment.scores.device
    return segment.own + torch.arange(rows, device=device).unsqueeze(1), torch.arange(columns, device=device)


def guide_limits(segment: Segment, row: Row) -> Tensor | None:
    """The guide's score of each row's positive less the margin, [rows]: what is above it counts as a positive."""
    if segment.guide is None:
        return None
    positive = segment.guide.diagonal(segment.own)[: len(segment.guide)]
    return positive - (positive.abs() * row.margin if row.relative else row.margin)


def _left_out(segment: Segment, limits: Tensor | None) -> Tensor:
    own, column = _indices(segment)
    first = column == own
    if segment.guide is not None and limits is not None:
        out = segment.guide > limits.unsqueeze(1)
        if segment.positive:
            out &= ~first
    elif segment.positive:
        out = torch.zeros_like(first)
    else:
        out = column % segment.period == own
    if segment.ids is not None and segment.own_ids is not None:
        out |= (segment.own_ids.unsqueeze(1) == segment.ids) & ~first
    return out


def _penalised(segment: Segment) -> Tensor:
    own, column = _indices(segment)
    first, of_row = column == own, column % segment.period == own
    if segment.hardness == IN_BATCH_NEGATIVES:
        return ~of_row
    return of_row & ~first if segment.hardness == HARD_NEGATIVES else ~first


def _similarities(segment: Segment) -> Tensor:
    if segment.row_scale is None or segment.column_scale is None:
        return segment.scores
    return segment.scores * segment.row_scale.unsqueeze(1) * segment.column_scale


def _top(logits: Tensor) -> Tensor:
    """The largest of each row, [rows, 1], as a constant; 0 where it is not finite."""
    return logits.detach().amax(dim=1, keepdim=True).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def contrastive_rows(segments: list[Segment], row: Row, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The losses of a block of rows, [rows], and their derivatives by the scale, [rows].

    With weights [rows] the scores become the derivatives of weights @ losses by the plain products.
    """
    limits = guide_limits(segments[0], row)
    similarities, logits, outs = [], [], []
    for segment in segments:
        similarity, out = _similarities(segment), _left_out(segment, limits)
        logit = similarity * row.scale
        if segment.hardness != NO_HARDNESS:
            logit = logit + torch.where(_penalised(segment), row.strength * similarity.detach(), 0)
        similarities.append(similarity)
        logits.append(logit.masked_fill(out, -torch.inf))
        outs.append(out)
    # Each group's largest logit stays apart from its sum of exponentials: of a small loss nothing is lost.
    groups = [[x for x, s in zip(logits, segments, strict=True) if s.group == g] for g in range(row.groups)]
    tops = [_top(torch.cat(group, dim=1)) for group in groups]
    sums = [torch.exp(torch.cat(group, dim=1) - top).sum(1) for group, top in zip(groups, tops, strict=True)]
    first = segments[0]
    own, column = _indices(first)
    positive = logits[0].gather(1, own)
    losses = torch.stack([(top - positive).squeeze(1) + x.log() for top, x in zip(tops, sums, strict=True)]).mean(dim=0)
    slopes = torch.zeros_like(losses)
    if weights is None:
        return losses, slopes
    for segment, similarity, logit, out in zip(segments, similarities, logits, outs, strict=True):
        total = sums[segment.group].unsqueeze(1) * row.groups
        gradient = torch.exp(logit - tops[segment.group]) / total
        if segment is first:
            gradient = gradient - (column == own).to(gradient.dtype)
        slopes += (gradient * similarity).masked_fill(out, 0).sum(dim=1)
        gradient = gradient * (weights * row.scale).unsqueeze(1)
        segment.scores = gradient
        segment.scores = _similarities(segment)
    return losses, slopes


Product = Callable[[Tensor, Tensor], Tensor]
Rows = Callable[[list[Segment], Row, "Tensor | None"], "tuple[Tensor, Tensor]"]


def score_matrices(prefixes: int) -> int:
    """Matrices that a block holds: scores; of several prefixes those of each, the plain products, and a work space."""
    return 1 if prefixes == 1 else prefixes + 2


@dataclass
class Batch:
    """The whole call."""

    prefixes: list[Prefix]
    queries: Side
    documents: Side
    all_queries: Side
    offset: int
    query_offset: int
    positives: int
    directions: list[int]
    per_direction: bool
    hardness: int
    workspace: int

    def columns(self, direction: int) -> Side:
        if direction in (QUERY_TO_QUERY, DOC_TO_QUERY):
            return self.all_queries
        # A guide compares positives with positives alone.
        guided = direction == DOC_TO_DOC and self.documents.guide is not None
        return self.documents.rows(0, self.positives) if guided else self.documents

    def left(self, direction: int, begin: int, end: int) -> Side:
        if direction in (QUERY_TO_DOC, QUERY_TO_QUERY):
            return self.queries.rows(begin, end)
        return self.documents.rows(self.offset + begin, self.offset + end)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows whose scores fit the workspace."""
        size = torch.finfo(accumulation_dtype(self.queries.x.dtype)).bits // 8
        columns = sum(len(self.columns(direction).x) for direction in self.directions)
        matrices = score_matrices(len(self.prefixes)) + (self.documents.guide is not None)
        bytes_of_row = columns * size * matrices
        rows = max(1, self.workspace // max(1, bytes_of_row))
        for begin in range(0, len(self.queries.x), rows):
            yield begin, min(begin + rows, len(self.queries.x))

    def segment(self, direction: int, begin: int, left: Side, right: Side, product: Product) -> Segment:
        """Without scores, and without the scales of a prefix."""
        to_queries = direction in (QUERY_TO_QUERY, DOC_TO_QUERY)
        own = (self.query_offset if to_queries else self.offset) + begin
        ids = None if right.ids is None else right.ids[own : own + len(left.x)]
        guide = None
        if left.guide is not None and right.guide is not None:
            assert left.guide_norm is not None and right.guide_norm is not None
            guide = product(left.guide, right.guide)
            guide *= reciprocal(left.guide_norm).unsqueeze(1)
            guide *= reciprocal(right.guide_norm)
        return Segment(
            scores=left.x.new_empty(0),
            guide=guide,
            row_scale=None,
            column_scale=None,
            own_ids=ids,
            ids=right.ids,
            own=own,
            period=len(self.all_queries.x) if to_queries else self.positives,
            positive=direction in (QUERY_TO_DOC, DOC_TO_QUERY),
            hardness=self.hardness if direction == QUERY_TO_DOC else NO_HARDNESS,
            group=self.directions.index(direction) if self.per_direction else 0,
        )


@dataclass
class Block:
    """Rows of the batch: for each direction its two sides and its segment, whose scores are those of one prefix."""

    sides: list[tuple[Side, Side]]
    segments: list[Segment]
    products: list[Tensor]  # plain ones, of the prefixes so far

    @staticmethod
    def of(batch: Batch, begin: int, end: int, product: Product) -> Block:
        sides = [(batch.left(d, begin, end), batch.columns(d)) for d in batch.directions]
        segments = [
            batch.segment(d, begin, left, right, product)
            for d, (left, right) in zip(batch.directions, sides, strict=True)
        ]
        return Block(sides, segments, [])

    def score(self, k: int, prefix: Prefix, keep: bool, product: Product) -> None:
        """Scores of prefix k, from the products before it; with `keep` the products stay as they are."""
        for n, (segment, (left, right)) in enumerate(zip(self.segments, self.sides, strict=True)):
            found = product(left.x[:, prefix.columns], right.x[:, prefix.columns])
            if k:
                self.products[n] += found
            else:
                self.products.append(found)
            segment.scores = self.products[n].clone() if keep else self.products[n]
            segment.row_scale = None if left.norms is None else reciprocal(left.norms[:, k])
            segment.column_scale = None if right.norms is None else reciprocal(right.norms[:, k])

    def add_moments(self, k: int) -> None:
        """What of the gradient of prefix k lies along the embeddings: the products, weighted by it."""
        for segment, plain, (left, right) in zip(self.segments, self.products, self.sides, strict=True):
            assert left.along is not None and right.along is not None
            moments = segment.scores * plain
            left.along[:, k] += moments.sum(dim=1)
            right.along[:, k] += moments.sum(dim=0)

    def add_gradients(self, gradients: list[Tensor], columns: slice, product: Product) -> None:
        for gradient, (left, right) in zip(gradients, self.sides, strict=True):
            assert left.gradient is not None and right.gradient is not None
            left.gradient[:, columns] += product(gradient, right.x[:, columns].mT)
            right.gradient[:, columns] += product(gradient.mT, left.x[:, columns].mT)


def _run(batch: Batch, row: Row, weights: Tensor | None, product: Product, rows: Rows) -> tuple[Tensor, Tensor]:
    """Losses [B] and slopes [B] of all rows; with weights the gradients are added to the sides'."""
    losses, slopes = [row.scale.new_zeros(0)], [row.scale.new_zeros(0)]
    with torch.autocast(row.scale.device.type, enabled=False):
        for begin, end in batch.blocks():
            block = Block.of(batch, begin, end, product)
            part = None if weights is None else weights[begin:end]
            loss, slope = _run_block(block, batch.prefixes, row, part, product, rows)
            losses.append(loss)
            slopes.append(slope)
    return torch.cat(losses), torch.cat(slopes)


def _run_block(
    block: Block,
    prefixes: list[Prefix],
    row: Row,
    weights: Tensor | None,
    product: Product,
    rows: Rows,
) -> tuple[Tensor, Tensor]:
    losses = slopes = row.scale.new_zeros(())
    gradients = []
    several = len(prefixes) > 1
    for k, prefix in enumerate(prefixes):
        block.score(k, prefix, several, product)
        loss, slope = rows(block.segments, row, None if weights is None else weights * prefix.factor)
        losses = losses + prefix.factor * loss
        slopes = slopes + prefix.factor * slope
        if weights is None:
            continue
        if several:
            block.add_moments(k)
        gradients.append([segment.scores for segment in block.segments])
    for k in reversed(range(len(gradients))):
        if k + 1 < len(gradients):
            for gradient, longer in zip(gradients[k], gradients.pop(), strict=True):
                gradient += longer
        block.add_gradients(gradients[k], prefixes[k].columns, product)
    return losses, slopes


def _prepare(
    gradient: bool,
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    cosine: bool,
    offset: int,
    positives: int,
    directions: list[int],
    per_direction: bool,
    hardness: int,
    strength: float,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    guide_all_queries: Tensor | None,
    relative: bool,
    margin: float,
    dims: list[int],
    dim_weights: list[float],
    workspace: int,
) -> tuple[Batch, Row]:
    prefixes = prefixes_of(dims, dim_weights)
    left = side_of(queries, prefixes, cosine, gradient, query_ids, guide_queries)
    right = side_of(documents, prefixes, cosine, gradient, document_ids, guide_documents)
    everyone = left
    if all_queries is not None:
        everyone = side_of(all_queries, prefixes, cosine, gradient, query_ids, guide_all_queries)
    query_offset = 0 if all_queries is None else offset
    batch = Batch(
        prefixes, left, right, everyone, offset, query_offset, positives, directions, per_direction, hardness, workspace
    )
    dtype = accumulation_dtype(queries.dtype)
    factor = torch.full((), scale, dtype=dtype, device=queries.device)
    if scale_tensor is not None:
        factor = factor * scale_tensor.to(dtype)
    return batch, Row(factor, strength, len(directions) if per_direction else 1, relative, margin)


def contrastive_loss(*arguments, product: Product = dot_similarity, rows: Rows = contrastive_rows) -> Tensor:
    """The losses [B] of :func:`sentfast.functional.contrastive_loss`, in the accumulation dtype."""
    batch, row = _prepare(False, *arguments)
    return _run(batch, row, None, product, rows)[0]


def contrastive_loss_forward(
    *arguments, product: Product = dot_similarity, rows: Rows = contrastive_rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses [B] and the gradients of weights @ losses to queries, documents, all_queries and scale.

    The last argument: weights [B], or None for those of the mean. The gradient to all_queries is empty without them.
    """
    *arguments, weights = arguments  # type: ignore[assignment]
    batch, row = _prepare(True, *arguments)
    count = len(batch.queries.x)
    if weights is None:
        weights = row.scale.new_full((count,), 1 / max(count, 1))
    losses, slopes = _run(batch, row, weights, product, rows)
    given = batch.all_queries is not batch.queries
    grad_queries, grad_documents = (through_norms(side, batch.prefixes) for side in (batch.queries, batch.documents))
    grad_all_queries = through_norms(batch.all_queries, batch.prefixes) if given else batch.queries.x.new_empty(0)
    return losses, grad_queries, grad_documents, grad_all_queries, (weights * slopes).sum()
