"""L2 normalisation and similarity of embeddings, as a matrix and row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sentfast import reference
from sentfast.ops import checks, twice
from sentfast.reference import NORMALIZE_EPS, PAIRWISE_METRICS, accumulation_dtype
from sentfast.registry import define, result_of

_HALF = (torch.bfloat16, torch.float16)  # Triton reaches the tensor cores; for float32 CUDA C++ comes first


_SMALLEST_EPS = 1e-38  # its reciprocal is a float32


def _l2_normalize_fake(x, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[:-1], dtype=accumulation_dtype(x.dtype)
    )


def _l2_normalize_backward_fake(grad, x, norm, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dot_similarity_fake(a, b):
    dtype = torch.promote_types(accumulation_dtype(a.dtype), accumulation_dtype(b.dtype))
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=dtype)


def _cosine_similarity_fake(a, b, eps):
    scores = _dot_similarity_fake(a, b)
    return scores, scores.new_empty(a.shape[:-1]), scores.new_empty(b.shape[:-1])


def _pairwise_fake(a, b, metric, eps):
    scores = a.new_empty(a.shape[:-1], dtype=accumulation_dtype(a.dtype))
    norms = a.shape[:-1] if metric == reference.COSINE else (0,)
    return scores, scores.new_empty(norms), scores.new_empty(norms)


def _pairwise_backward_fake(grad, a, b, scores, norm_a, norm_b, metric, eps):
    return _l2_normalize_backward_fake(grad, a, norm_a, eps), _l2_normalize_backward_fake(grad, b, norm_b, eps)


_l2_normalize_forward = define(
    "l2_normalize_forward(Tensor x, float eps) -> (Tensor, Tensor)",
    reference=reference.l2_normalize_forward,
    fake=_l2_normalize_fake,
)
_l2_normalize = result_of(_l2_normalize_forward)
_l2_normalize_backward = define(
    "l2_normalize_backward(Tensor grad, Tensor x, Tensor norm, float eps) -> Tensor",
    reference=reference.l2_normalize_backward,
    fake=_l2_normalize_backward_fake,
)
_dot_similarity = define(
    "dot_similarity(Tensor a, Tensor b) -> Tensor",
    reference=reference.dot_similarity,
    fake=_dot_similarity_fake,
    prefer_triton=_HALF,
)
_cosine_similarity_forward = define(
    "cosine_similarity_forward(Tensor a, Tensor b, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.cosine_similarity_forward,
    fake=_cosine_similarity_fake,
    prefer_triton=_HALF,
)
_cosine_similarity = result_of(_cosine_similarity_forward)
_pairwise_similarity_forward = define(
    "pairwise_similarity_forward(Tensor a, Tensor b, int metric, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.pairwise_similarity_forward,
    fake=_pairwise_fake,
)
_pairwise_similarity = result_of(_pairwise_similarity_forward)
_pairwise_similarity_backward = define(
    "pairwise_similarity_backward(Tensor grad, Tensor a, Tensor b, Tensor scores, Tensor norm_a, Tensor norm_b,"
    " int metric, float eps) -> (Tensor, Tensor)",
    reference=reference.pairwise_similarity_backward,
    fake=_pairwise_backward_fake,
)


class _L2Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, eps):
        y, norm = _l2_normalize_forward(x, eps)
        ctx.save_for_backward(x, norm)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad):
        x, norm = ctx.saved_tensors
        if twice.wanted():
            return *twice.gradients(_l2_normalize, (x,), (ctx.eps,), ctx.needs_input_grad[:1], grad), None
        return _l2_normalize_backward(grad, x, norm, ctx.eps), None


class _DotSimilarity(torch.autograd.Function):
    """Each side is kept for the gradient of the other alone."""

    @staticmethod
    def forward(ctx: Any, a, b):
        needs_a, needs_b = ctx.needs_input_grad
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.dtypes = a.dtype, b.dtype
        return _dot_similarity(a, b)

    @staticmethod
    def backward(ctx: Any, grad):
        a, b = ctx.saved_tensors
        product = twice.differentiable(_dot_similarity)
        grad_a = None if b is None else product(grad, b.mT).to(ctx.dtypes[0])
        grad_b = None if a is None else product(grad.mT, a.mT).to(ctx.dtypes[1])
        return grad_a, grad_b


def _kept(x: Tensor, needed: bool) -> Tensor:
    """What a cosine keeps of a side: where it needs no gradient a copy, in place of the original's unit vectors."""
    return x if needed else x.clone()


class _CosineSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b, eps):
        scores, norm_a, norm_b = _cosine_similarity_forward(a, b, eps)
        needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(_kept(a, needs_a), _kept(b, needs_b), norm_a, norm_b)
        ctx.eps = eps
        return scores

    @staticmethod
    def backward(ctx: Any, grad):
        a, b, norm_a, norm_b = ctx.saved_tensors
        eps = ctx.eps
        if twice.wanted():
            return *twice.gradients(_cosine_similarity, (a, b), (eps,), ctx.needs_input_grad[:2], grad), None
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:  # through the matrix to the unit vectors, then through the normalisation
            grad_unit_a = _dot_similarity(grad, _l2_normalize(b, eps).mT)
            grad_a = _l2_normalize_backward(grad_unit_a, a, norm_a, eps)
        if ctx.needs_input_grad[1]:
            grad_unit_b = _dot_similarity(grad.mT, _l2_normalize(a, eps).mT)
            grad_b = _l2_normalize_backward(grad_unit_b, b, norm_b, eps)
        return grad_a, grad_b, None


class _PairwiseSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b, metric, eps):
        scores, norm_a, norm_b = _pairwise_similarity_forward(a, b, metric, eps)
        needs_a, needs_b, *_ = ctx.needs_input_grad
        if metric == reference.DOT:
            # Each side is kept for the gradient of the other alone, and stands in for one that is not read.
            a, b = (a if needs_b else b), (b if needs_a else a)
        else:
            a, b = _kept(a, needs_a), _kept(b, needs_b)
        # A copy, because the caller may change the scores in place, as those of sentence-transformers.
        ctx.save_for_backward(a, b, scores.clone(), norm_a, norm_b)
        ctx.arguments = metric, eps
        return scores

    @staticmethod
    def backward(ctx: Any, grad):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if twice.wanted() and ctx.arguments[0] != reference.DOT:
            return *twice.gradients(_pairwise_similarity, saved[:2], ctx.arguments, needed, grad), None, None
        grads = twice.differentiable(_pairwise_similarity_backward)(grad, *saved, *ctx.arguments)
        return *(x if need else None for x, need in zip(grads, needed, strict=True)), None, None


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of the same distance that nobody else can change: a - b, as the original keeps it, and rows of zeros."""
    acc = accumulation_dtype(a.dtype)
    difference = a.to(acc) - b.to(acc)
    return difference, difference.new_zeros(difference.shape[-1]).expand_as(difference)


def _check_eps(eps: object) -> None:
    checks.finite("eps", eps, _SMALLEST_EPS)


def _check_pair(a: Tensor, b: Tensor, ndim: str) -> None:
    checks.floats("a", a, ndim)
    checks.floats("b", b, ndim)
    if a.dtype != b.dtype:
        raise TypeError(f"b: expected the dtype of a ({a.dtype}), got {b.dtype}")
    checks.same_device("b", b, "a", a)


def _matrices(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Checks a and b as operands of a batched matrix and broadcasts their batch dimensions."""
    _check_pair(a, b, "[..., N, D]")
    if a.ndim == 2 == b.ndim and a.shape[1] == b.shape[1]:
        return a, b
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"b: expected [..., M, D] with a as [..., N, D], got a of shape {list(a.shape)}, b of shape {list(b.shape)}"
        )
    if a.shape[:-2] == b.shape[:-2]:
        return a, b
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"b: expected batch dimensions that broadcast with those of a, got {list(a.shape)} and {list(b.shape)}"
        ) from None
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


def l2_normalize(x: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    r"""Scales each vector to unit length: :math:`x / \max(\lVert x \rVert_2, \text{eps})`.

    Args:
        x: [..., D]; float32, bfloat16, float16 (float64 by plain PyTorch); any strides.
        eps: the smallest denominator; a zero vector stays zero.

    Returns:
        [..., D], contiguous, in x's dtype. The norm accumulates in float32 (float64 for float64) and is not rounded
        to a half dtype, so the result is nearer to the exact one than PyTorch's.

    Gradients: to x, those of gradients by plain PyTorch; torch.func transforms are refused by PyTorch; autocast
    changes nothing.

    Follows ``torch.nn.functional.normalize(x, p=2, dim=-1)``.
    """
    checks.floats("x", x, "[..., D]")
    _check_eps(eps)
    return normalized(x, eps)


def normalized(x: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """:func:`l2_normalize` of what is known to be right."""
    return _L2Normalize.apply(x, eps) if checks.needs_function(x) else _l2_normalize(x, eps)


def cosine_similarity(a: Tensor, b: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    r"""Cosine of every row of a with every row of b, without normalised copies of either.

    .. math:: s_{ij} = \frac{a_i \cdot b_j}{\max(\lVert a_i \rVert, \text{eps}) \max(\lVert b_j \rVert, \text{eps})}

    Args:
        a: [..., N, D]; b: [..., M, D], the same dtype, batch dimensions that broadcast; any strides.
        eps: the smallest norm; a zero vector has similarity 0 with everything.

    Returns:
        [..., N, M]; float32 for float32 and half inputs (products and norms accumulate in float32), else float64.

    Gradients: to a and b, those of gradients by plain PyTorch; torch.func transforms are refused by PyTorch; autocast
    changes nothing.

    Follows ``sentence_transformers.util.cos_sim`` of 6.2, batched.
    """
    a, b = _matrices(a, b)
    _check_eps(eps)
    return cosines(a, b, eps)


def cosines(a: Tensor, b: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """:func:`cosine_similarity` of two matrices that are known to fit."""
    return _CosineSimilarity.apply(a, b, eps) if checks.needs_function(a, b) else _cosine_similarity(a, b, eps)


def dot_similarity(a: Tensor, b: Tensor) -> Tensor:
    r"""Dot product of every row of a with every row of b: :math:`s_{ij} = a_i \cdot b_j`.

    Args:
        a: [..., N, D]; b: [..., M, D], the same dtype, batch dimensions that broadcast; any strides.

    Returns:
        [..., N, M]; float32 for float32 and half inputs (products accumulate in float32), else float64.

    Gradients: to a and b, those of gradients by plain PyTorch; torch.func transforms are refused by PyTorch; autocast
    changes nothing.

    Follows ``sentence_transformers.util.dot_score`` of 6.2, batched.
    """
    return dots(*_matrices(a, b))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """:func:`dot_similarity` of two matrices that are known to fit."""
    return _DotSimilarity.apply(a, b) if checks.needs_function(a, b) else _dot_similarity(a, b)


def pairwise_similarity(a: Tensor, b: Tensor, metric: str = "cosine", eps: float = NORMALIZE_EPS) -> Tensor:
    r"""Similarity of row i of a with row i of b, in one pass over both.

    cosine: :math:`\hat a \cdot \hat b`; dot: :math:`a \cdot b`; euclidean: :math:`-\lVert a - b \rVert_2`;
    manhattan: :math:`-\lVert a - b \rVert_1`.

    Args:
        a, b: [..., D], the same dtype, shapes that broadcast; any strides.
        metric: "cosine", "dot", "euclidean" or "manhattan".
        eps: the smallest norm in a cosine.

    Returns:
        [...]; float32 for float32 and half inputs (sums accumulate in float32), else float64.

    Gradients: to a and b; 0 for euclidean where a = b; those of gradients by plain PyTorch. torch.func transforms are
    refused by PyTorch; autocast changes nothing.

    Follows the ``pairwise_*`` functions of ``sentence_transformers.util`` 6.2.
    """
    _check_pair(a, b, "[..., D]")
    _check_eps(eps)
    number = checks.one_of("metric", metric, PAIRWISE_METRICS)
    if a.shape != b.shape:
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(f"b: expected {a.shape[-1]} columns as a has, got {checks.describe(b)}")
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            raise ValueError(f"b: expected a shape that broadcasts with {list(a.shape)}, got {list(b.shape)}") from None
    return pairwise(a, b, number, eps)


def pairwise(a: Tensor, b: Tensor, metric: int, eps: float = NORMALIZE_EPS) -> Tensor:
    """:func:`pairwise_similarity` of operands of one shape that are known to fit; metric: its place in the list."""
    if checks.needs_function(a, b):
        if metric in (reference.EUCLIDEAN, reference.MANHATTAN):
            a, b = _difference(a, b)
        return _PairwiseSimilarity.apply(a, b, metric, eps)
    return _pairwise_similarity(a, b, metric, eps)


def pairwise_cosine_similarity(a: Tensor, b: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """Cosine of row i of a with row i of b: :func:`pairwise_similarity` with metric "cosine"."""
    return pairwise_similarity(a, b, "cosine", eps)
