"""The linear layer of training: its product for every layout on every instruction set, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from process_settings import threads
from torch import Tensor

import sentfast
import sentfast.functional as F
from sentfast import native, registry
from sentfast.ops.layers import normed
from sentfast.ops.linear import _product, activation_linear, norm_linear

# Around the panels of 64 columns, the parts of 256 steps, the blocks of 192 rows, strips and vectors.
SIZES = [(1, 1, 1), (7, 5, 9), (6, 64, 256), (13, 65, 257), (200, 130, 300), (385, 17, 64), (3, 200, 700)]
ON_CPU = [backend for backend in BACKENDS if backend.name == "cpu"]
LAYOUTS = ("plain", "transposed", "offset", "skipping", "both apart")
on_every_isa = pytest.mark.parametrize("backend", ON_CPU, ids=str)


def laid_out(rows: int, columns: int, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).t()
    if layout == "both apart":  # where one of the sizes is 1, its stride may be anything
        return torch.randn(2 * rows, 3 * columns)[::2, ::3]
    if layout == "skipping":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns + 3)[:, 1 : columns + 1] if layout == "offset" else torch.randn(rows, columns)


@on_every_isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_product(backend: Backend, layout: str) -> None:
    drawn = torch.randint(1, 70, (12, 3)) ** (torch.rand(12, 3) < 0.7)  # or 1
    for rows, columns, depth in SIZES + drawn.tolist():
        for other in LAYOUTS:
            a, b = laid_out(rows, depth, layout), laid_out(depth, columns, other)
            bias = torch.randn(columns) if torch.rand(()) < 0.5 else None
            with backend.forced("product"):
                result = _product(a, b, bias)
            eager = a @ b if bias is None else a @ b + bias
            exact = a.double() @ b.double() + (0 if bias is None else bias)
            assert_accurate(result, eager, exact, size=depth**0.5, what=f"{rows}x{columns}x{depth} {other}")


@on_every_isa
def test_gradients(backend: Backend) -> None:
    for rows, columns, depth in SIZES:
        tensors = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
        grad = torch.randn(rows, columns)

        def gradients(function, grad: Tensor, *tensors: Tensor):
            leaves = [x.clone().requires_grad_() for x in tensors]
            return torch.autograd.grad(function(*leaves), leaves, grad)

        with backend.forced("product"):
            found = gradients(F.linear, grad, *tensors)
        eager = gradients(torch.nn.functional.linear, grad, *tensors)
        exact = gradients(torch.nn.functional.linear, grad.double(), *(x.double() for x in tensors))
        for got, plain, true in zip(found, eager, exact, strict=True):
            assert_accurate(got, plain, true, size=max(rows, columns) ** 0.5)


def assert_same_with_less_kept(backend: Backend, apart: Callable, together: Callable, tensors: list[Tensor]) -> None:
    """The gradients of two functions one after the other, to the bit."""
    found = []
    for function in (apart, together):
        leaves, kept = [x.clone().requires_grad_() for x in tensors], {}
        counted = torch.autograd.graph.saved_tensors_hooks(lambda x, k=kept: k.setdefault(x.data_ptr(), x), lambda x: x)
        with counted, backend.forced("product"):
            result = function(*leaves)
            memory = sum(x.numel() for x in kept.values())
            found.append((result, *torch.autograd.grad(result.square().sum(), leaves), memory))
    assert all(torch.equal(one, other) for one, other in zip(found[0][:-1], found[1][:-1], strict=True))
    assert found[1][-1] < found[0][-1]


@on_every_isa
def test_linear_of_an_activation(backend: Backend) -> None:
    def apart(x: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.bias_activation(x, x_bias, "gelu"), weight, bias)

    def together(x: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activation_linear(x, x_bias, "gelu", weight, bias)

    tensors = [torch.randn(shape) for shape in ((13, 70), (70,), (9, 70), (9,))]
    assert_same_with_less_kept(backend, apart, together, tensors)


@on_every_isa
def test_linear_of_a_norm(backend: Backend) -> None:
    """Whose output goes on as a residual too."""
    options = dict(dropout_p=0.3, seed=int(torch.randint(1000, ())))

    def apart(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.dropout_add_layer_norm(x, residual, scale, shift, 1e-5, **options)
        return torch.cat([F.linear(y, weight, bias), y], dim=1)

    def together(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = normed(x, residual, scale, shift, 1e-5, **options)
        return torch.cat([norm_linear(y, weight, bias), y.output], dim=1)

    tensors = [torch.randn(shape) for shape in ((13, 70), (13, 70), (70,), (70,), (9, 70), (9,))]
    assert_same_with_less_kept(backend, apart, together, tensors)


@pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")
def test_nothing_to_multiply_and_nan() -> None:
    assert torch.equal(_product(torch.randn(3, 0), torch.randn(0, 70), None), torch.zeros(3, 70))
    assert _product(torch.randn(0, 4), torch.randn(4, 5), None).shape == (0, 5)
    assert _product(torch.randn(4, 5), torch.randn(5, 0), None).shape == (4, 0)
    a = torch.ones(9, 300)
    a[4, 270] = float("nan")
    result = _product(a, torch.ones(300, 70), None)
    assert result[4].isnan().all() and (result[torch.arange(9) != 4] == 300).all()


@pytest.mark.skipif(not native.cpu_loaded(), reason="no compiled library")
def test_bits_depend_on_neither_threads_nor_other_rows() -> None:
    x, weight = torch.randn(401, 700), torch.randn(70, 700)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(F.linear(x, weight))
    assert all(torch.equal(results[0], other) for other in results)
    assert torch.equal(F.linear(x[200:], weight), results[0][200:])


def test_what_goes_to_pytorch() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
    sentfast.report(reset=True)
    assert F.linear(x, weight).shape == (2, 3, 4)
    assert F.linear(x[0].bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert F.linear(x[0].double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x[0], weight).dtype == torch.bfloat16
    assert not sentfast.report().calls
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        F.linear(x[0], weight[:, :5])


def test_opcheck() -> None:
    for bias in (None, torch.randn(5)):
        arguments = (torch.randn(3, 4), torch.randn(5, 4).t(), bias)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(registry.ops["product"].overload, arguments, test_utils=tests)


def test_compiles() -> None:
    x, weight, bias = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    compiled = torch.compile(F.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
