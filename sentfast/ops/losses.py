"""The in-batch contrastive losses of sentence-transformers as one operator that never holds the score matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
from sentfast.ops.similarity import l2_normalize
from sentfast.reference import DIRECTIONS, HARDNESS_MODES, accumulation_dtype
from sentfast.registry import define

WORKSPACE = 64 << 20
MARGIN_STRATEGIES = ("absolute", "relative")
SIMILARITIES = ("cosine", "dot")
LEAST_SCALE = 1e-38  # about the least normal float32

_ARGUMENTS = (
    "Tensor queries, Tensor documents, Tensor? all_queries, Tensor? scale_tensor, float scale, bool cosine, int offset,"
    " int positives, int[] directions, bool per_direction, int hardness, float strength, Tensor? query_ids,"
    " Tensor? document_ids, Tensor? guide_queries, Tensor? guide_documents, Tensor? guide_all_queries, bool relative,"
    " float margin, int[] dims, float[] dim_weights, int workspace"
)


def _fake(queries, *arguments):
    return queries.new_empty(queries.shape[0], dtype=accumulation_dtype(queries.dtype))


def _forward_fake(queries, documents, all_queries, *arguments):
    losses = _fake(queries)
    grad_all_queries = queries.new_empty(0) if all_queries is None else queries.new_empty(all_queries.shape)
    return (
        losses,
        queries.new_empty(queries.shape),
        queries.new_empty(documents.shape),
        grad_all_queries,
        losses.new_empty(()),
    )


_contrastive_loss = define(
    f"contrastive_loss({_ARGUMENTS}) -> Tensor", reference=reference.contrastive_loss, fake=_fake
)
# The losses and, for weights (None: those of the mean), the gradients of weights @ losses.
_contrastive_loss_forward = define(
    f"contrastive_loss_forward({_ARGUMENTS}, Tensor? weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.contrastive_loss_forward,
    fake=_forward_fake,
)


class _ContrastiveLoss(torch.autograd.Function):
    """The mean's gradient is known up to a factor, so its forward pass makes it too: three products, not four."""

    @staticmethod
    def forward(ctx: Any, mean, *arguments):
        ctx.settings = mean, arguments[4:12], arguments[17:]
        tensors = *arguments[:4], *arguments[12:17]
        if mean:
            losses, *gradients = _contrastive_loss_forward(*arguments, None)
            ctx.save_for_backward(*tensors, *gradients)
            return losses.mean()
        ctx.save_for_backward(*tensors)
        return _contrastive_loss(*arguments)

    @staticmethod
    def backward(ctx: Any, grad):
        mean, numbers, rest = ctx.settings
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:5]
        others = *numbers, *saved[4:9], *rest
        if twice.wanted():
            each = (grad / len(saved[0])).expand(len(saved[0])) if mean else grad
            gradients: Sequence[Tensor | None] = twice.gradients(_contrastive_loss, saved[:4], others, needed, each)
        elif mean:
            gradients = [gradient * grad.to(gradient.dtype) for gradient in saved[9:]]
        else:
            gradients = _contrastive_loss_forward(*saved[:4], *others, grad)[1:]
        given = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
        return None, *given, *(None for _ in range(18))


def _matrix(name: str, x: object, other_name: str, other: Tensor | None, dtype: bool = True) -> Tensor:
    checked = checks.floats(name, x, "[rows, D]", (2,))
    if other is not None:
        if checked.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name}: expected {other.shape[1]} columns as {other_name} has, got {checks.describe(checked)}"
            )
        if checked.dtype != other.dtype:
            raise TypeError(f"{name}: expected the dtype of {other_name} ({other.dtype}), got {checked.dtype}")
        checks.same_device(name, checked, other_name, other)
    return checked


def _ids(name: str, ids: object, count: int, queries: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {checks.describe(ids)}")
    if ids.shape != (count,):
        raise ValueError(f"{name}: expected {count} of them, got shape {list(ids.shape)}")
    checks.dense(name, ids)
    checks.same_device(name, ids, "queries", queries)


def _directions(directions: Sequence[str], partition_mode: str) -> list[int]:
    checks.sequence("directions", directions, "names")
    numbers = sorted({checks.one_of("directions", direction, DIRECTIONS) for direction in directions})
    if not numbers or numbers[0] != reference.losses.QUERY_TO_DOC:
        raise ValueError(f"directions: expected 'query_to_doc' among them, got {tuple(directions)!r}")
    if checks.one_of("partition_mode", partition_mode, ("joint", "per_direction")) and {1, 3} & set(numbers):
        raise ValueError(
            "partition_mode: expected 'joint' with the directions 'query_to_query' and 'doc_to_doc', which hold no"
            " positive, got 'per_direction'"
        )
    return numbers


def _scale(scale: object, queries: Tensor) -> tuple[Tensor | None, float]:
    if isinstance(scale, Tensor):
        if scale.is_nested or scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(f"scale: expected a number or a 0-d floating-point tensor, got {checks.describe(scale)}")
        checks.same_device("scale", scale, "queries", queries)
        if checks.values_readable(scale) and not scale.item() > 0:
            raise ValueError(f"scale: expected more than 0, got {scale.item()}")
        return scale.to(accumulation_dtype(queries.dtype)), 1.0
    return None, checks.finite("scale", scale, LEAST_SCALE)


def _guides(guide: Sequence[Tensor], queries: Tensor, documents: Tensor, all_queries: Tensor | None) -> list:
    if not isinstance(guide, (tuple, list)) or len(guide) not in (2, 3):
        raise TypeError(
            f"guide: expected (guide_queries, guide_documents[, guide_all_queries]), got {checks.describe(guide)}"
        )
    if len(guide) == 2 and all_queries is not None:
        raise ValueError("guide: expected guide_all_queries as the third, because there are all_queries")
    if len(guide) == 3 and all_queries is None:
        raise ValueError("guide: expected two of them, because there are no all_queries")
    first = _matrix("guide[0]", guide[0], "guide[0]", None)
    checks.same_device("guide[0]", first, "queries", queries)
    for i, (x, of) in enumerate(zip(guide, (queries, documents, all_queries), strict=False)):
        _matrix(f"guide[{i}]", x, "guide[0]", first)
        if of is not None and len(x) != len(of):
            raise ValueError(f"guide[{i}]: expected {len(of)} rows, got {len(x)}")
    return [guide[0].detach(), guide[1].detach(), guide[2].detach() if len(guide) == 3 else None]


def _dims(
    dims: Sequence[int] | None, dim_weights: Sequence[float] | None, columns: int
) -> tuple[list[int], list[float]]:
    """Ascending lengths and their weights."""
    if dims is None:
        if dim_weights is not None:
            raise ValueError("dim_weights: expected None without dims")
        return [columns], [1.0]
    if not checks.sequence("dims", dims, "whole numbers"):
        raise ValueError(f"dims: expected numbers from 1 to {columns}, got none")
    dims = [checks.whole("dims", dim, 1, columns) for dim in dims]
    if dim_weights is None:
        dim_weights = [1.0] * len(dims)
    if len(checks.sequence("dim_weights", dim_weights, "numbers")) != len(dims):
        raise ValueError(f"dim_weights: expected {len(dims)} of them, one for each of dims, got {len(dim_weights)}")
    totals = dict.fromkeys(sorted(dims), 0.0)
    for dim, weight in zip(dims, dim_weights, strict=True):
        totals[dim] += checks.finite("dim_weights", weight)
    return list(totals), list(totals.values())


def _check_counts(offset: int, positives: int, queries: Tensor, documents: Tensor, all_queries: Tensor | None) -> None:
    count = len(queries)
    if not 0 <= positives <= len(documents):
        raise ValueError(f"positives: expected at most the {len(documents)} documents, got {positives}")
    most = positives if all_queries is None else min(positives, len(all_queries))
    if not 0 <= offset <= most - count:
        raise ValueError(
            f"offset: expected {count} rows from it on among {positives} positives"
            + ("" if all_queries is None else f" and {len(all_queries)} all_queries")
            + f", got {offset}"
        )


def _check_workspace(
    workspace: int, numbers: list[int], everyone: int, positives: int, x: Tensor, guided: bool, prefixes: int
) -> None:
    columns = [len(x), everyone, everyone, positives if guided else len(x)]
    size = 8 if x.dtype == torch.float64 else 4
    matrices = reference.losses.score_matrices(prefixes) + guided
    needed = sum(columns[number] for number in numbers) * size * matrices
    if workspace < needed:
        raise ValueError(f"workspace: expected at least the {needed} bytes of one row's scores, got {workspace}")


def contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    all_queries: Tensor | None = None,
    offset: int = 0,
    positives: int | None = None,
    scale: float | Tensor = 20.0,
    similarity: Literal["cosine", "dot"] = "cosine",
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: Literal["joint", "per_direction"] = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    margin_strategy: Literal["absolute", "relative"] = "absolute",
    margin: float = 0.0,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    workspace: int = WORKSPACE,
) -> Tensor:
    r"""In-batch contrastive loss (InfoNCE) of queries and documents, without the matrix of their scores.

    .. math:: L_i = \frac{1}{|G|} \sum_{g \in G} \log \sum_{j \in g} e^{z_{ij}} - z_{i, \text{offset} + i},
              \qquad z_{ij} = \text{scale} \cdot s_{ij} + \text{strength} \cdot \text{stop\_grad}(s_{ij})

    The second term of z belongs to the negatives that `hardness_mode` names in "query_to_doc". Each direction gives row
    i candidates j; "joint" puts them in one group g, "per_direction" in one each:

    - "query_to_doc": query i with every document (always there);
    - "query_to_query": query i with all_queries, its own left out;
    - "doc_to_query": positive i with all_queries;
    - "doc_to_doc": positive i with every document, those of its own query left out.

    Args:
        queries: [B, D]; documents: [N, D]: `positives` positives, one per query of all processes, then as many first
            negatives, and so on; float32, bfloat16, float16 (float64 by plain PyTorch), the same dtype; any strides.
        all_queries: [B_all, D], the queries gathered from all processes, where `queries` are only this process's;
            None: queries.
        offset: row i's positive is documents[offset + i], its own query all_queries[offset + i] (queries[i]).
        positives: None: as many as all_queries, or else queries.
        scale: above 0; a 0-d tensor gets a gradient.
        similarity: "cosine" or "dot".
        hardness_mode: None, "in_batch_negatives" (documents of other queries), "hard_negatives" (own negatives) or
            "all_negatives" (all but the positive), with hardness_strength of at least 0.
        query_ids, document_ids: int64 or int32, [B_all] and [N]. A candidate whose id is that of the row's own query or
            positive counts as its duplicate and is left out, except the own query or positive itself.
        guide: (guide_queries [B, E], guide_documents [N, E][, guide_all_queries [B_all, E]]), embeddings of another
            model. A candidate whose cosine g by the guide is above the limit is left out, except the positive: with the
            guide's cosine t of query i and its positive, t - margin ("absolute") or t - margin |t| ("relative"). With a
            guide "doc_to_doc" has the positives alone as columns, and the limit alone leaves out a row's own.
        dims: prefix lengths; the loss is the sum over them, times dim_weights (None: 1), each prefix normalised by
            itself, with "dot" too. All are computed in one pass, with as many multiplications as the longest alone.
        reduction: "mean", or "none" for [B] losses.
        workspace: bytes of scores held at a time; at least one row's, which is 4 bytes per candidate (8 for float64),
            with n > 1 dims n + 2 times that, with a guide once more.

    Returns:
        0-d or [B]; float32 for float32 and half inputs (products, norms and sums accumulate in float32), else float64.
        The mean of no rows is NaN, as in PyTorch.

    Gradients: to queries, documents, all_queries and scale, those of gradients by plain PyTorch; with reduction
    "mean" they are computed in the forward pass. torch.func transforms are refused by PyTorch; autocast changes
    nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Follows ``MultipleNegativesRankingLoss``, ``GISTEmbedLoss`` and ``MatryoshkaLoss`` of sentence-transformers 6.2.
    """
    _matrix("queries", queries, "", None)
    _matrix("documents", documents, "queries", queries)
    everyone = len(queries)
    if all_queries is not None:
        everyone = len(_matrix("all_queries", all_queries, "queries", queries))
    positives = everyone if positives is None else checks.whole("positives", positives, 0)
    offset, workspace = checks.whole("offset", offset, 0), checks.whole("workspace", workspace, 0)
    _check_counts(offset, positives, queries, documents, all_queries)
    scale_tensor, factor = _scale(scale, queries)
    numbers = _directions(directions, partition_mode)
    hardness = checks.one_of("hardness_mode", hardness_mode, HARDNESS_MODES)
    hardness_strength = checks.finite("hardness_strength", hardness_strength, 0.0)
    if query_ids is not None:
        _ids("query_ids", query_ids, everyone, queries)
    if document_ids is not None:
        _ids("document_ids", document_ids, len(documents), queries)
    guides = [None] * 3 if guide is None else _guides(guide, queries, documents, all_queries)
    lengths, weights = _dims(dims, dim_weights, queries.shape[1])
    mean = checks.one_of("reduction", reduction, ("none", "mean")) == 1
    _check_workspace(workspace, numbers, everyone, positives, documents, guide is not None, len(lengths))
    cosine = checks.one_of("similarity", similarity, SIMILARITIES) == 0 or dims is not None
    sides = (queries, documents, all_queries)
    arguments = (
        offset,
        positives,
        numbers,
        partition_mode == "per_direction" and len(numbers) > 1,
        hardness if hardness_strength > 0 else 0,
        hardness_strength,
        query_ids,
        document_ids,
        *guides,
        checks.one_of("margin_strategy", margin_strategy, MARGIN_STRATEGIES) == 1,
        checks.finite("margin", margin),
    )
    differentiable = any(x is not None and checks.needs_function(x) for x in (*sides, scale_tensor))

    def of_prefixes(sides: Sequence[Tensor | None], cosine: bool, which: slice) -> Tensor:
        every = *sides, scale_tensor, factor, cosine, *arguments, lengths[which], weights[which], workspace
        if differentiable:
            return _ContrastiveLoss.apply(mean, *every)
        losses = _contrastive_loss(*every)
        return losses.mean() if mean else losses

    if not (differentiable and cosine and lengths[0] == 1):
        return of_prefixes(sides, cosine, slice(None))
    # A unit vector of one number does not change with it. Its gradient is 0, where the matrix of scores would leave
    # what is lost to rounding, divided by that number.
    units = [None if x is None else l2_normalize(x[:, :1]) for x in sides]
    first = of_prefixes(units, False, slice(1))
    return first if len(lengths) == 1 else first + of_prefixes(sides, cosine, slice(1, None))
