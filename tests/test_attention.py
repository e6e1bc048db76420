"""Attention beyond the table of cases: several blocks of queries and keys, the mask, edges, reach of the offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from torch import Tensor

import sentfast.functional as F
from sentfast import registry
from sentfast.reference.random import kept
from sentfast.registry import ops

every_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cuda"], ids=str)
OPERATORS = "varlen_attention", "varlen_attention_backward"
ENDLESS = float("nan"), float("inf")


def lengths_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attend(backend: str, tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """Result and gradients of packed attention; the second tensor, if any, is the bias."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    with registry.use_backend(backend):
        bias = leaves[1] if len(leaves) > 1 else None
        out = F.varlen_attention_qkvpacked(leaves[0], bias=bias, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


SHAPES: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "plain": ((130, 0, 65, 1), 1, 32, {}),
    "dropout": ((64, 135), 1, 64, {"dropout_p": 0.3, "seed": 2**61 + 12345}),
    "causal": ((33, 129), 1, 20, {"causal": True}),
    "window": ((35, 0, 70), 2, 16, {"window_size": (20, 45), "dropout_p": 0.1, "seed": 3, "stream": 7}),
    # With a larger scale than about 1 / sqrt(d) the scores, and with them the error of exp(score - lse), pass the rule.
    "keys after": ((70,), 1, 128, {"window_size": (-1, 3), "softmax_scale": 0.1}),
}


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@every_backend
def test_several_blocks(backend: Backend, shape: str, dtype: torch.dtype, with_bias: bool) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")
    lengths, heads, dim, options = SHAPES[shape]
    total = sum(lengths)
    tensors = [torch.randn(total, 3, heads, dim, device=backend.device).to(dtype)]
    if with_bias:
        tensors.append(torch.randn(heads, 2 * max(lengths) + 5, device=backend.device).to(dtype))
    grad = torch.randn(total, heads, dim, device=backend.device).to(dtype)
    options = {**options, "cu_seqlens": lengths_of(*lengths).to(backend.device)}
    with backend.forced(*OPERATORS):
        result = attend(backend.name, tensors, grad, **options)
    eager = attend("reference", tensors, grad, **options)
    exact = attend("reference", [x.double() for x in tensors], grad, **options)
    for name, got, plain, true in zip(("out", "qkv", "bias"), result, eager, exact, strict=False):
        assert_accurate(got, plain, true, size=grad.abs().max().item(), what=f"{name}, {shape}")


@every_backend
def test_any_head_size(backend: Backend) -> None:
    """Tiles of every width beside whole ones."""
    for dim in [*(8 * torch.randint(1, 41, (3,))).tolist(), int(torch.randint(1, 200, ()))]:
        lengths, heads = torch.randint(0, 70, (3,)).tolist(), int(torch.randint(1, 3, ()))
        tensors = [torch.randn(sum(lengths), 3, heads, dim, device=backend.device)]
        grad = torch.randn(sum(lengths), heads, dim, device=backend.device)
        options = {"cu_seqlens": lengths_of(*lengths).to(backend.device)}
        with backend.forced(*OPERATORS):
            result = attend(backend.name, tensors, grad, **options)
        eager = attend("reference", tensors, grad, **options)
        exact = attend("reference", [x.double() for x in tensors], grad, **options)
        size = grad.abs().max().item() if grad.numel() else 0.0
        for name, got, plain, true in zip(("out", "qkv"), result, eager, exact, strict=True):
            assert_accurate(got, plain, true, size=size, what=f"{name}, {lengths} x {heads} x {dim}")


@every_backend
def test_scores_of_any_size(backend: Backend) -> None:
    """What is common to them goes before the exponential; its rounding is larger than any exponent."""
    for exponent in (torch.rand(3) * 24 + 6).tolist():
        lengths, heads = torch.randint(1, 70, (3,)).tolist(), 2
        sign = float(torch.randint(2, ()) * 2 - 1)
        bias = sign * 10**exponent * (1 + torch.randint(3, (heads, 2 * max(lengths) - 1)) / 8)
        qkv = torch.randn(sum(lengths), 3, heads, 16)
        qkv[:, 0] = 0  # so the scores are the bias, and exact
        tensors = [x.to(backend.device) for x in (qkv, bias)]
        ends = lengths_of(*lengths).to(backend.device)
        with backend.forced("varlen_attention"):
            result = F.varlen_attention_qkvpacked(tensors[0], ends, bias=tensors[1])
        with registry.use_backend("reference"):
            eager = F.varlen_attention_qkvpacked(tensors[0], ends, bias=tensors[1])
            exact = F.varlen_attention_qkvpacked(tensors[0].double(), ends, bias=tensors[1].double())
        assert_accurate(result, eager, exact, size=qkv.abs().max().item(), what=f"1e{exponent:.1f}, {lengths}")


@every_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_mask_is_that_of_the_definition(backend: Backend, dtype: torch.dtype) -> None:
    """With equal scores and unit vectors as values the result is the mask."""
    lengths, heads, p, seed, stream = (70, 100), 2, 0.4, 2**40 + 7, 5
    q = torch.zeros(sum(lengths), heads, max(lengths), device=backend.device, dtype=dtype)
    v = torch.cat([torch.eye(n, max(lengths)) for n in lengths]).to(q).unsqueeze(1).expand_as(q)
    with backend.forced("varlen_attention"):
        out = F.varlen_attention(q, q, v, lengths_of(*lengths).to(q.device), dropout_p=p, seed=seed, stream=stream)
    for start, length in ((0, 70), (70, 100)):
        rows = torch.arange(start, start + length).view(1, -1, 1)
        keep = kept(rows, torch.arange(length), p, seed, stream, torch.arange(heads).view(-1, 1, 1))
        assert torch.equal(out[start : start + length, :, :length].cpu() != 0, keep.transpose(0, 1))


@every_backend
def test_empty_batches(backend: Backend) -> None:
    for tokens, lengths in ((0, ()), (0, (0, 0)), (1, (0, 1, 0))):
        qkv = torch.randn(tokens, 3, 2, 8, device=backend.device, requires_grad=True)
        bias = torch.randn(2, 5, device=backend.device, requires_grad=True)
        with backend.forced(*OPERATORS):
            out = F.varlen_attention_qkvpacked(qkv, lengths_of(*lengths).to(qkv.device), bias=bias)
            grads = torch.autograd.grad(out.sum(), (qkv, bias))
        assert out.shape == (tokens, 2, 8)
        torch.testing.assert_close(out, qkv[:, 2])
        assert grads[0].isfinite().all()
        assert grads[1].abs().lt(1e-5).all()  # a single key has weight 1 whatever its bias


@every_backend
@pytest.mark.parametrize("value", ENDLESS)
def test_a_bad_sequence_spoils_no_other(backend: Backend, value: float) -> None:
    lengths = (70, 5, 66)
    qkv = torch.randn(sum(lengths), 3, 2, 16, device=backend.device)
    qkv[72] = value
    grad = torch.randn(sum(lengths), 2, 16, device=backend.device)
    out, grad_qkv = attend(backend.name, [qkv], grad, cu_seqlens=lengths_of(*lengths).to(qkv.device))
    for x in (out, grad_qkv):
        assert x[:70].isfinite().all()
        assert x[75:].isfinite().all()
    assert out[70:75].isnan().all()


@every_backend
def test_max_seqlen_does_not_change_the_result(backend: Backend) -> None:
    """Which it could where it chooses the size of blocks: an embedding's bits would depend on its neighbours."""
    qkv = torch.randn(66, 3, 2, 32, device=backend.device).half()
    grad = torch.randn(66, 2, 32, device=backend.device).half()
    results = [
        attend(backend.name, [qkv], grad, cu_seqlens=lengths_of(66).to(qkv.device), max_seqlen=longest)
        for longest in (66, 128, 300)
    ]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            # NumPy's product in the interpreter takes another order of sums for another number of rows.
            tolerance = 2e-3 if backend.interpreted else 0.0
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not any(b.name == "triton" for b in BACKENDS), reason="about the Triton kernels")
def test_too_small_max_seqlen_is_seen() -> None:
    """A stale value, as in a graph that is replayed, gives NaN and touches no memory but the result's."""
    device = next(b.device for b in BACKENDS if b.name == "triton")
    q, bias = torch.randn(200, 1, 16, device=device), torch.randn(1, 399, device=device)
    rest = lengths_of(200).to(device), 64, bias, 0.25, -1, -1, 0.0, 0, 0
    with registry.use_backend("triton"):
        out, lse = ops["varlen_attention_forward"](q, q, q, *rest)
        assert out[:64].isnan().all()
        ops["varlen_attention_backward"](q, q, q, q, out.zero_(), lse.zero_(), *rest)


CUDA = [b for b in BACKENDS if b.name == "cuda"]


@pytest.mark.skipif(not CUDA, reason="no compiled CUDA kernels")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradients_after_the_kernel_of_cuda(dtype: torch.dtype) -> None:
    """Its log-sum-exp is what Triton's gradient needs."""
    lengths, grad = (130, 0, 65, 300), torch.randn(495, 2, 64, device="cuda")
    qkv = torch.randn(495, 3, 2, 64, device="cuda").to(dtype)
    bias = torch.randn(2, 599, device="cuda").to(dtype)
    ends = lengths_of(*lengths).cuda()

    def gradients(forward: str, backward: str, qkv: Tensor, bias: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (qkv, bias)]
        with registry.use_backend(forward):
            out = F.varlen_attention_qkvpacked(leaves[0], ends, bias=leaves[1])
        with registry.use_backend(backward):
            return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))

    exact = gradients("reference", "reference", qkv.double(), bias.double())
    eager = gradients("reference", "reference", qkv, bias)
    for got, plain, true in zip(gradients("cuda", "triton", qkv, bias), eager, exact, strict=True):
        assert_accurate(got, plain, true, size=grad.abs().max().item())


@pytest.mark.skipif(not CUDA, reason="no compiled CUDA kernels")
def test_edges_of_the_kernel_of_cuda() -> None:
    """A NaN stays in its sequence, a stale length shows itself, and the bits do not depend on the longest sequence."""
    qkv, ends = torch.randn(200, 3, 2, 32, device="cuda").half(), lengths_of(70, 0, 130).cuda()
    with registry.use_backend("cuda"):
        expected = F.varlen_attention_qkvpacked(qkv, ends)
        for longest in (131, 512):
            assert torch.equal(F.varlen_attention_qkvpacked(qkv, ends, longest), expected)
        rest = None, 0.2, -1, -1, 0.0, 0, 0
        out, _ = ops["varlen_attention_forward"](*qkv.unbind(1), ends, 64, *rest)
        assert out[:64].isnan().all() and out[70:134].isnan().all()
        qkv[5, 1] = float("nan")
        spoiled = F.varlen_attention_qkvpacked(qkv, ends)
        assert spoiled[:70].isnan().all() and torch.equal(spoiled[70:], expected[70:])
        assert F.varlen_attention_qkvpacked(qkv[:0], lengths_of(0, 0).cuda()).shape == (0, 2, 32)


def test_what_the_kernel_of_cuda_refuses() -> None:
    """By the arguments alone, so that a call which asks for it fails, and any other goes to Triton."""
    x, ends = torch.zeros(2, 1, 64, dtype=torch.float16), lengths_of(2)
    plain = (x, x, x, ends, 512, None, 0.1, -1, -1, 0.0, 0, 0)
    refuses = ops["varlen_attention"].cuda_refuses
    assert refuses is not None and refuses(*plain) == ""
    for place, value, word in (
        (0, x.float(), "float32"),
        (0, x[..., :48], "heads"),
        (4, 513, "tokens"),
        (7, 3, "window"),
        (8, 0, "causal"),
        (9, 0.1, "dropout"),
    ):
        assert word in refuses(*plain[:place], value, *plain[place + 1 :])


@pytest.mark.skipif(not BACKENDS[0].slow, reason="4 GiB that cost nothing only where pages are not touched")
def test_offsets_are_64_bit() -> None:
    step = 2**31 + 8
    far = torch.zeros(step + 3 * 16, dtype=torch.float16)
    qkv = far.as_strided((2, 3, 1, 16), (step, 16, 16, 1))
    qkv.copy_(torch.randn(2, 3, 1, 16))
    near, grad = qkv.contiguous(), torch.randn(2, 1, 16)
    results = [attend("triton", [x], grad, cu_seqlens=lengths_of(2)) for x in (qkv, near)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
