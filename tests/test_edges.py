"""Edge rows with a defined result, and bad input with an error that names the argument."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, Backend
from cases import MODES

import sentfast.functional as F
from sentfast import native, registry

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
SINGLE_MODES = [mode for mode in MODES if isinstance(mode, str)]
INF = float("inf")


def pool_on(backend: Backend, *args, **options) -> torch.Tensor:
    with backend.forced("pool"):
        return F.pool(*(x.to(backend.device) if x is not None else x for x in args), **options).cpu()


@every_backend
@pytest.mark.parametrize("mode", SINGLE_MODES)
def test_row_without_tokens(backend: Backend, mode: str) -> None:
    x = torch.randn(2, 3, 5)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    result = pool_on(backend, x, mask, mode=mode)[0]
    expected = {"max": torch.full((5,), -INF), "cls": x[0, 0]}.get(mode, torch.zeros(5))
    assert torch.equal(result, expected)


@every_backend
@pytest.mark.parametrize("mode", SINGLE_MODES)
def test_empty_sequence(backend: Backend, mode: str) -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 3], dtype=torch.int32).to(backend.device)
    result = pool_on(backend, torch.randn(3, 5), mode=mode, cu_seqlens=cu_seqlens)
    expected = torch.full((5,), -INF) if mode == "max" else torch.zeros(5)
    assert torch.equal(result[0], expected)
    assert torch.equal(result[2], expected)
    assert torch.isfinite(result[1]).all()


@every_backend
def test_empty_batches(backend: Backend) -> None:
    assert pool_on(backend, torch.randn(0, 3, 5)).shape == (0, 5)
    assert pool_on(backend, torch.randn(2, 0, 5)).equal(torch.zeros(2, 5))
    assert pool_on(backend, torch.randn(2, 3, 0), mode=("mean", "max")).shape == (2, 0)
    empty = torch.zeros(1, dtype=torch.int32, device=backend.device)
    assert pool_on(backend, torch.randn(0, 5), cu_seqlens=empty).shape == (0, 5)
    with backend.forced():
        no_columns = torch.randn(2, 3, 0, device=backend.device, requires_grad=True)
        F.pool(no_columns, mode=("mean", "cls")).sum().backward()
        assert no_columns.grad is not None
        assert F.l2_normalize(torch.randn(0, 4, device=backend.device)).shape == (0, 4)
        assert F.l2_normalize(torch.randn(3, 0, device=backend.device)).shape == (3, 0)
        a, none = torch.randn(3, 4, device=backend.device), torch.randn(0, 4, device=backend.device)
        assert F.cosine_similarity(a, none).shape == (3, 0)
        assert F.dot_similarity(none, a).shape == (0, 3)
        assert F.dot_similarity(a[:, :0], a[:, :0]).cpu().equal(torch.zeros(3, 3))
        assert F.pairwise_cosine_similarity(none, none).shape == (0,)


@every_backend
@pytest.mark.parametrize("mode", SINGLE_MODES)
def test_padding_is_never_read(backend: Backend, mode: str) -> None:
    x = torch.randn(3, 6, 9)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 1]])
    spoiled = x.masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    assert torch.equal(pool_on(backend, spoiled, mask, mode=mode), pool_on(backend, x, mask, mode=mode))


@every_backend
@pytest.mark.parametrize("mode", SINGLE_MODES)
def test_padded_and_packed_agree(backend: Backend, mode: str) -> None:
    x, lengths = torch.randn(4, 5, 7), torch.tensor([5, 1, 3, 2])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(backend.device)
    padded = pool_on(backend, x, mask, mode=mode, normalize=True)
    packed = pool_on(backend, x[mask], mode=mode, normalize=True, cu_seqlens=cu_seqlens)
    assert torch.equal(padded, packed)


@every_backend
def test_max_passes_the_gradient_to_the_first_of_equals(backend: Backend) -> None:
    x = torch.tensor([[[1.0], [3.0], [3.0], [2.0]]], device=backend.device, requires_grad=True)
    with backend.forced("pool", "pool_backward"):
        F.pool(x, mode="max").sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1, 0, 0]


@every_backend
def test_zero_vectors(backend: Backend) -> None:
    zero = torch.zeros(2, 9, device=backend.device, requires_grad=True)
    other = torch.randn(2, 9, device=backend.device)
    with backend.forced():
        assert F.l2_normalize(zero).eq(0).all()
        assert F.cosine_similarity(zero, other).eq(0).all()
        assert F.pairwise_cosine_similarity(zero, other).eq(0).all()
        F.l2_normalize(zero).backward(other)
        assert zero.grad is not None
        torch.testing.assert_close(zero.grad, other / 1e-12)  # below eps the denominator is a constant
        euclidean = F.pairwise_similarity(zero, zero.detach(), "euclidean")
        assert torch.autograd.grad(euclidean.sum(), zero)[0].eq(0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cuda"], ids=str)
def test_layers_of_no_rows_or_columns(backend: Backend) -> None:
    for shape in ((0, 5), (3, 0), (2, 0, 7)):
        x = torch.randn(*shape, device=backend.device, requires_grad=True)
        weight = torch.randn(shape[-1], device=backend.device, requires_grad=True)
        with backend.forced():
            for out in (
                F.dropout_add_layer_norm(x, x.detach(), weight, weight, dropout_p=0.5),
                F.bias_activation(x, weight),
                F.dropout(x, 0.5),
            ):
                grad_x, grad_weight = torch.autograd.grad(out.sum(), (x, weight), allow_unused=True)
                assert out.shape == grad_x.shape == x.shape
                assert grad_weight is None or grad_weight.eq(0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cuda"], ids=str)
def test_linear_activation_of_no_rows_columns_or_features(backend: Backend) -> None:
    for rows, columns, features in ((0, 5, 3), (4, 0, 3), (4, 5, 0)):
        x, weight = torch.randn(rows, columns, device=backend.device), torch.randn(features, columns)
        bias = torch.randn(features, device=backend.device)
        with backend.forced("linear_activation"):
            result = F.linear_activation(x, weight.to(backend.device), bias, "relu")
        assert torch.equal(result, bias.relu().expand(rows, features))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name == "triton"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bits_of_linear_activation_depend_on_no_other_row(backend: Backend, dtype: torch.dtype) -> None:
    if backend.interpreted:
        pytest.skip("the interpreter multiplies with NumPy, whose order of sums differs within a tile on some CPUs")
    x, weight = torch.randn(300, 130, device=backend.device).to(dtype), torch.randn(70, 130, device=backend.device)
    with backend.forced("linear_activation"):
        together = F.linear_activation(x, weight.to(dtype))
        for start, end in ((0, 1), (37, 166), (299, 300), (5, 300)):
            assert torch.equal(F.linear_activation(x[start:end], weight.to(dtype)), together[start:end])


@every_backend
def test_bfloat16_rows_an_odd_distance_apart(backend: Backend) -> None:
    if backend.supports(torch.bfloat16):
        wide = torch.randn(20, 33, dtype=torch.bfloat16, device=backend.device)
        a, b = wide[:9, :16], wide[9:, :16]
        with backend.forced("dot_similarity"):
            torch.testing.assert_close(F.dot_similarity(a, b), a.float() @ b.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")
def test_large_results_are_tensors_like_all_others(tmp_path: Path) -> None:
    """Though their memory is not PyTorch's: aligned, saved, shared between processes, outliving the tensor, freed."""
    x = torch.randn(2000, 300)
    result = F.l2_normalize(x)
    assert result.data_ptr() % 64 == 0
    torch.save(result, tmp_path / "result.pt")
    copies = torch.load(tmp_path / "result.pt"), F.l2_normalize(x).share_memory_(), F.l2_normalize(x)[1:].clone()
    assert torch.equal(copies[0], result) and torch.equal(copies[1], result) and torch.equal(copies[2], result[1:])
    array = F.l2_normalize(x).numpy()
    assert (array == result.numpy()).all()
    resident = [0, 0]
    for i in range(2):
        for _ in range(100):
            F.l2_normalize(x)  # 2.4 MB
        resident[i] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert resident[1] - resident[0] < 100 << 20


@pytest.mark.skipif(not native.cpu_loaded() or BACKENDS[0].slow, reason="about the compiled CPU kernels")
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets are 64-bit: one row of memory seen as 2^27 + 8 tokens, and a row far from the start of its storage."""
    tokens = 2**27 + 8
    x = torch.arange(16.0).expand(1, tokens, 16)
    far = torch.zeros(2**31 + 40, dtype=torch.bfloat16)  # pages that are never touched take no memory
    far[-16:] = torch.arange(16)
    distant = far.as_strided((2, 1, 16), (2**31 + 24, 16, 1))
    with registry.use_backend("cpu"):
        largest, last = F.pool(x, mode=("max", "lasttoken")).split(16, dim=-1)
        pooled = F.pool(distant)
        scores = F.dot_similarity(distant[:, 0], distant[1:, 0])
        ones = F.dot_similarity(torch.ones(1, 1).expand(2**31 + 5, 1)[-3:], torch.ones(2, 1))
    assert largest.equal(x[0, :1])
    assert last.equal(x[0, :1])
    assert pooled[1].equal(far[-16:])
    assert scores.flatten().tolist() == [0.0, float((torch.arange(16) ** 2).sum())]
    assert ones.equal(torch.ones(3, 2))


X = torch.randn(2, 3, 4)
CU = torch.tensor([0, 1, 3], dtype=torch.int32)
BAD = {
    "no tensor": (lambda: F.pool([[1.0]]), TypeError, "token_embeddings"),
    "integers": (lambda: F.pool(torch.ones(2, 3, 4, dtype=torch.int64)), TypeError, "token_embeddings"),
    "complex": (lambda: F.pool(X.to(torch.complex64)), TypeError, "token_embeddings"),
    "sparse": (lambda: F.l2_normalize(X[0].to_sparse()), TypeError, "x: expected a dense"),
    "rank": (lambda: F.pool(X[0]), ValueError, "token_embeddings"),
    "packed rank": (lambda: F.pool(X, cu_seqlens=CU), ValueError, "token_embeddings"),
    "mask shape": (lambda: F.pool(X, torch.ones(2, 4)[:, :3].long().T), ValueError, "attention_mask"),
    "mask dtype": (lambda: F.pool(X, torch.ones(2, 3)), TypeError, "attention_mask"),
    "mask type": (lambda: F.pool(X, [[1, 1, 1]] * 2), TypeError, "attention_mask"),
    "mask device": (lambda: F.pool(X, torch.ones(2, 3, dtype=torch.long, device="meta")), ValueError, "attention_mask"),
    "mask and lengths": (lambda: F.pool(X[0], X[0] > 0, cu_seqlens=CU), ValueError, "attention_mask"),
    "not from 0": (lambda: F.pool(X[0], cu_seqlens=CU + 1), ValueError, "cu_seqlens"),
    "decreasing": (lambda: F.pool(X[0], cu_seqlens=CU[[0, 2, 1, 2]]), ValueError, "cu_seqlens"),
    "wrong end": (lambda: F.pool(X[0], cu_seqlens=CU[:2]), ValueError, "cu_seqlens"),
    "past the end": (lambda: F.pool(X[0], cu_seqlens=CU * 2), ValueError, "cu_seqlens"),
    "int64 lengths": (lambda: F.pool(X[0], cu_seqlens=CU.long()), TypeError, "cu_seqlens"),
    "no lengths": (lambda: F.pool(X[0], cu_seqlens=CU[:0]), ValueError, "cu_seqlens"),
    "lengths rank": (lambda: F.pool(X[0], cu_seqlens=CU[None]), ValueError, "cu_seqlens: expected shape"),
    "lengths type": (lambda: F.pool(X[0], cu_seqlens=[0, 1, 3]), TypeError, "cu_seqlens: expected a tensor"),
    "lengths device": (lambda: F.pool(X[0], cu_seqlens=CU.to("meta")), ValueError, "cu_seqlens: expected the device"),
    "mode": (lambda: F.pool(X, mode="median"), ValueError, "mode: expected .*'median'"),
    "no mode": (lambda: F.pool(X, mode=()), ValueError, "mode"),
    "many modes": (lambda: F.pool(X, mode=["mean"] * 9), ValueError, "mode"),
    "prompt": (lambda: F.pool(X, prompt_length=-1), ValueError, "prompt_length"),
    "eps": (lambda: F.l2_normalize(X, eps=0.0), ValueError, "eps"),
    "eps nan": (lambda: F.cosine_similarity(X, X, eps=float("nan")), ValueError, "eps"),
    "scalar": (lambda: F.l2_normalize(torch.tensor(1.0)), ValueError, "x: expected"),
    "normalize integers": (lambda: F.l2_normalize(CU), TypeError, "x: expected float32"),
    "columns": (lambda: F.cosine_similarity(X, X[..., :3]), ValueError, "b: expected"),
    "vector": (lambda: F.dot_similarity(X[0, 0], X[0]), ValueError, "b: expected"),
    "batch": (lambda: F.dot_similarity(X, torch.randn(3, 3, 4)), ValueError, "b: expected batch"),
    "dtypes": (lambda: F.dot_similarity(X, X.bfloat16()), TypeError, "b: expected the dtype"),
    "devices": (lambda: F.dot_similarity(X, X.to("meta")), ValueError, "b: expected the device"),
    "linear rank": (lambda: F.linear_activation(X, X[0]), ValueError, "x: expected"),
    "linear dtype": (lambda: F.linear_activation(X[0], X[0].half()), TypeError, "weight: expected the dtype of x"),
    "linear columns": (lambda: F.linear_activation(X[0], X[0, :, :3]), ValueError, "weight: expected 4 columns"),
    "linear bias": (lambda: F.linear_activation(X[0], X[0], X[0, 0]), ValueError, "bias: expected shape .3., got .4."),
    "linear device": (lambda: F.linear_activation(X[0], X[0].to("meta")), ValueError, "weight: expected the device"),
    "activation": (lambda: F.linear_activation(X[0], X[0], None, "elu"), ValueError, "activation: expected .*'elu'"),
    "pair": (lambda: F.pairwise_cosine_similarity(X, torch.randn(5, 4)), ValueError, "b: expected"),
    "pair columns": (lambda: F.pairwise_cosine_similarity(X, X[..., :1]), ValueError, "b: expected 4 columns"),
    "metric": (lambda: F.pairwise_similarity(X, X, "hamming"), ValueError, "metric"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


RAW = {
    "mask": lambda op: op.pool(X, torch.ones(2, 9, dtype=torch.bool), None, [0], 0, False),
    "float64": lambda op: op.pool(X.double(), None, None, [0], 0, False),
    "mode": lambda op: op.pool(X, None, None, [17], 0, False),
    "modes": lambda op: op.pool(X, None, None, [], 0, False),
    "prompt": lambda op: op.pool(X, None, None, [0], -5, False),
    "cu_seqlens": lambda op: op.pool(X[0], None, CU * 100, [0], 0, False),
    "backward cu_seqlens": lambda op: op.pool_backward(X[0, :2], X[0], X[0], X[0], None, CU, [0], 0, 1, False),
    "backward norm": lambda op: op.pool_backward(X[0], X[0], X[0, 0, :1], X[0], None, None, [0], 0, 3, True),
    "backward argmax": lambda op: op.pool_backward(X[0], X[0], X[0], CU, None, None, [1], 0, 3, False),
    "normalize norm": lambda op: op.l2_normalize_backward(X, X, X[0, 0], 1e-12),
    "normalize grad": lambda op: op.l2_normalize_backward(X[0], X, X[..., 0], 1e-12),
    "matrix": lambda op: op.dot_similarity(X, X[..., :2]),
    "pairwise": lambda op: op.pairwise_similarity(X, X[0], 0, 1e-12),
    "metric": lambda op: op.pairwise_similarity(X, X, 7, 1e-12),
}


@pytest.mark.skipif(not any(backend.name == "cpu" for backend in BACKENDS), reason="about the compiled CPU kernels")
@pytest.mark.parametrize("name", RAW)
def test_raw_operators_refuse_what_would_be_undefined(name: str) -> None:
    with pytest.raises(RuntimeError, match="expected|unknown mode"):
        RAW[name](torch.ops.sentfast)


def expanded(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One number in any shape: its size says nothing about memory."""
    return torch.zeros([1] * len(sizes), dtype=dtype).expand(sizes)


@pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")
@pytest.mark.parametrize("power", (61, 62))
def test_sizes_beyond_memory_raise(power: int) -> None:
    """Bytes that pass 2^63, and such as come out small again in 64 bits."""
    huge = 2**power + int(torch.randint(2**30, ()))
    starts = torch.tensor([0, 1], dtype=torch.int32)
    calls = (
        lambda: F.l2_normalize(expanded(huge, 1)),
        lambda: F.cosine_similarity(expanded(huge, 1), expanded(3, 1)),
        lambda: F.cosine_similarity(expanded(huge, 1), expanded(huge, 1)),
        lambda: F.dot_similarity(expanded(2**32, 1), expanded(2**31, 1)),
        lambda: F.dot_similarity(expanded(3, huge), expanded(3, huge)),
        lambda: F.pairwise_similarity(expanded(huge, 1), expanded(huge, 1)),
        lambda: F.pairwise_cosine_similarity(expanded(huge, 1), expanded(huge, 1)),
        lambda: F.pool(expanded(huge, 1, 1), expanded(huge, 1, dtype=torch.int64)),
        lambda: F.pool(expanded(1, huge, 1), expanded(1, huge, dtype=torch.int64)),
        lambda: F.pool(expanded(1, 1, huge), expanded(1, 1, dtype=torch.int64), mode=("mean", "cls")),
        lambda: F.varlen_attention(*[expanded(1, huge, 1)] * 3, cu_seqlens=starts),
        lambda: F.varlen_attention(*[expanded(1, 1, huge)] * 3, cu_seqlens=starts),
        lambda: F.linear(expanded(huge, 1), torch.zeros(5, 1)),
        lambda: F.linear(torch.zeros(4, 1), expanded(huge, 1)),
        lambda: F.dropout_add_layer_norm(expanded(huge, 2), None, torch.ones(2), torch.zeros(2)),
        lambda: F.bias_activation(expanded(huge, 2), None, "gelu"),
        lambda: F.dropout(expanded(huge, 2), 0.5),
        lambda: F.contrastive_loss(expanded(huge, 1), expanded(huge, 1)),
        lambda: F.contrastive_loss(expanded(2, 1), expanded(huge, 1)),
    )
    with registry.use_backend("cpu"):
        for number, call in enumerate(calls):
            with pytest.raises((RuntimeError, ValueError, MemoryError), match=r"\d|overflow|memory") as caught:
                call()
            assert str(caught.value), f"call {number} says nothing"
        assert F.l2_normalize(torch.empty(0).expand(huge, 0)).shape == (huge, 0)


@pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")
def test_large_results_can_be_resized() -> None:
    """As PyTorch's own: another size of `out=`, and memory given back while the tensor stays."""
    a, ids = torch.randn(600, 700), torch.zeros(600, 1, 700)
    for result in (
        F.l2_normalize(a),
        F.dot_similarity(a, a),
        F.cosine_similarity(a, a),
        F.pool(ids, torch.ones(600, 1, dtype=torch.int64)),
    ):
        assert result.numel() * result.element_size() >= 2**20
        torch.cat([a, a], out=result.resize_(0))
        assert torch.equal(result[600:], a)
        result.untyped_storage().resize_(0)
        assert result.untyped_storage().nbytes() == 0
