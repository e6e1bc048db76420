"""L2 normalisation and similarity, as matrices and row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from sentfast.reference.precision import accumulation_dtype

# The integer that stands for a pairwise metric in an operator's schema is its index here.
PAIRWISE_METRICS = ("cosine", "dot", "euclidean", "manhattan")
COSINE, DOT, EUCLIDEAN, MANHATTAN = range(4)

NORMALIZE_EPS = 1e-12  # torch.nn.functional.normalize


def normalize_backward(grad: Tensor, y: Tensor, norm: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """(grad - y <y, grad>) / norm; below eps the denominator is a constant, so only grad / eps remains."""
    norm = norm.unsqueeze(-1)
    along = (y * grad).sum(dim=-1, keepdim=True)
    # The limit keeps the branch that is not taken finite: its own derivative would be NaN, and 0 times that as well.
    return torch.where(norm < eps, grad / eps, (grad - y * along) / norm.clamp(min=eps))


def l2_normalize_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / max(||x||, eps) along the last dimension, in x's dtype, and the norms [...] in the accumulation dtype."""
    values = x.to(accumulation_dtype(x.dtype))
    norm = torch.linalg.vector_norm(values, dim=-1)
    return (values / norm.clamp(min=eps).unsqueeze(-1)).to(x.dtype), norm


def l2_normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Gradient of :func:`l2_normalize_forward` to x, in x's dtype; grad may have another dtype."""
    y = x.to(norm.dtype) / norm.clamp(min=eps).unsqueeze(-1)
    return normalize_backward(grad.to(norm.dtype), y, norm, eps).to(x.dtype)


def dot_similarity(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T: [..., N, D], [..., M, D] -> [..., N, M], float32 for half inputs."""
    dtype = torch.promote_types(accumulation_dtype(a.dtype), accumulation_dtype(b.dtype))
    return torch.matmul(a.to(dtype), b.to(dtype).mT)


def cosine_similarity_forward(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine of every row of a with every row of b, [..., N, M], and the norms of both, [..., N] and [..., M]."""
    a, norm_a = l2_normalize_forward(a.to(accumulation_dtype(a.dtype)), eps)
    b, norm_b = l2_normalize_forward(b.to(accumulation_dtype(b.dtype)), eps)
    return dot_similarity(a, b), norm_a, norm_b


def pairwise_similarity_forward(a: Tensor, b: Tensor, metric: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise similarity [...] of a and b [..., D], and the norms of both ([...], empty unless cosine)."""
    acc = accumulation_dtype(a.dtype)
    a, b = a.to(acc), b.to(acc)
    none = a.new_empty(0)
    if metric == COSINE:
        a, norm_a = l2_normalize_forward(a, eps)
        b, norm_b = l2_normalize_forward(b, eps)
        return (a * b).sum(dim=-1), norm_a, norm_b
    if metric == DOT:
        return (a * b).sum(dim=-1), none, none.clone()
    if metric == EUCLIDEAN:
        return -torch.linalg.vector_norm(a - b, dim=-1), none, none.clone()
    return -(a - b).abs().sum(dim=-1), none, none.clone()


def pairwise_similarity_backward(
    grad: Tensor, a: Tensor, b: Tensor, scores: Tensor, norm_a: Tensor, norm_b: Tensor, metric: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pairwise_similarity_forward` to a and b, in their dtype; 0 for a euclidean distance of 0."""
    acc = accumulation_dtype(a.dtype)
    dtype, a, b = a.dtype, a.to(acc), b.to(acc)
    grad = grad.to(acc).unsqueeze(-1)
    if metric == COSINE:
        y_a = a / norm_a.clamp(min=eps).unsqueeze(-1)
        y_b = b / norm_b.clamp(min=eps).unsqueeze(-1)
        grad_a = normalize_backward(grad * y_b, y_a, norm_a, eps)
        grad_b = normalize_backward(grad * y_a, y_b, norm_b, eps)
    elif metric == DOT:
        grad_a, grad_b = grad * b, grad * a
    else:
        difference = a - b
        if metric == EUCLIDEAN:
            distance = -scores.to(acc).unsqueeze(-1)
            grad_a = torch.where(distance == 0, 0, -grad * difference / distance)
        else:
            grad_a = -grad * difference.sign()
        grad_b = -grad_a
    return grad_a.to(dtype), grad_b.to(dtype)
