"""Every generic property of every operator, over the table of cases, on every backend of this machine."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS, Backend
from cases import CASES, DTYPES, HALF_DTYPES, VALUES, Call, Case
from torch import Tensor

from sentfast import registry

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def backends_of_the_case(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params
    backend, case = given.get("backend"), given.get("case")
    if backend is not None and case is not None and backend.name not in ("reference", "cpu", *case.gpu_backends):
        pytest.skip(f"{case.name} has no kernel on {backend}")


def leaves(call: Call) -> Call:
    return Call(tuple(x.detach().clone().requires_grad_() for x in call.tensors), call.options, call.label)


def gradients(case: Case, call: Call, grad: Tensor) -> tuple[Tensor, ...]:
    call = leaves(call)
    out = case.run(call)
    return torch.autograd.grad(out, call.tensors, grad.to(out.dtype))


def smallest_norm(call: Call) -> float:
    return min(x.double().norm(dim=-1).min().item() for x in call.tensors)


def check_values(case: Case, backend: Backend, call: Call) -> None:
    with backend.forced(case.operators[0]):
        result = case.run(call)
    with registry.use_backend("reference"):
        eager, exact = case.run(call), case.run(call.to(torch.float64))
    assert result.dtype == eager.dtype
    assert_accurate(result, eager, exact, size=case.size(call), what=f"{case.name} {call.label}")


def check_gradients(case: Case, backend: Backend, call: Call) -> None:
    with registry.use_backend("reference"):
        out = case.run(call)
        grad = torch.randn_like(out)
        eager = gradients(case, call, grad)
        exact = gradients(case, call.to(torch.float64), grad)
    with backend.forced(*case.operators):
        result = gradients(case, call, grad)
    for got, plain, true, x in zip(result, eager, exact, call.tensors, strict=True):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        # A gradient along the result cancels in the normalisation, so it is judged by what it was made of.
        size = grad.abs().max().item() / min(1.0, smallest_norm(call)) if grad.numel() else 0.0
        assert_accurate(got, plain, true, size=size, what=f"{case.name} {call.label}")


def skip_unsupported(backend: Backend, dtype: torch.dtype) -> None:
    if not backend.supports(dtype):
        pytest.skip(f"{backend} cannot compute {dtype}")


@every_dtype
@every_backend
@pytest.mark.parametrize("case", [*CASES, *VALUES], ids=lambda case: case.name)
def test_values(case: Case, backend: Backend, dtype: torch.dtype) -> None:
    skip_unsupported(backend, dtype)
    if case in VALUES and dtype not in HALF_DTYPES:
        pytest.skip("half precision alone")
    for call in case.calls(dtype, backend.device, backend.slow):
        check_values(case, backend, call)


@every_dtype
@every_backend
@every_case
def test_gradients(case: Case, backend: Backend, dtype: torch.dtype) -> None:
    skip_unsupported(backend, dtype)
    for call in case.calls(dtype, backend.device, backend.slow):
        check_gradients(case, backend, call)


@every_case
def test_reference_gradient_is_the_derivative(case: Case) -> None:
    for call in case.calls(torch.float64, "cpu", True):
        with registry.use_backend("reference"):
            call = leaves(call)
            if torch.isfinite(case.run(call)).all():
                torch.autograd.gradcheck(lambda *tensors, c=call: case.function(*tensors, **c.options), call.tensors)


def variants(x: Tensor) -> dict[str, Tensor]:
    """The same values with other strides and offsets."""
    spaced = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    offset, skipping = spaced.clone()[..., 1 : x.shape[-1] + 1], spaced[..., : 2 * x.shape[-1] : 2]
    transposed = x.mT.contiguous().mT if x.ndim > 1 else x
    return {"transposed": transposed, "offset": offset.copy_(x), "skipping": skipping.copy_(x)}


@every_backend
@every_case
def test_strides_do_not_matter(case: Case, backend: Backend) -> None:
    calls = [c for c in case.calls(torch.float32, backend.device, True) if c.tensors[0].ndim > 1]
    for call in calls[:: max(1, len(calls) // 12)]:
        grad = torch.randn_like(case.run(call))
        with backend.forced(*case.operators):
            expected = case.run(call), *gradients(case, call, grad)
            for name in ("transposed", "offset", "skipping"):
                strided = Call(tuple(variants(x)[name] for x in call.tensors), call.options)
                inputs = tuple(x.detach().requires_grad_() for x in strided.tensors)
                out = case.function(*inputs, **call.options)
                other = grad.new_zeros(*grad.shape, 2)[..., 0].copy_(grad)  # a strided gradient
                for got, want in zip((out, *torch.autograd.grad(out, inputs, other)), expected, strict=True):
                    # A library's product may take another order of sums for other strides.
                    size = max(1.0, want.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()) if want.numel() else 1.0
                    torch.testing.assert_close(
                        got,
                        want,
                        rtol=1e-5,
                        atol=4e-6 * size,
                        equal_nan=True,
                        msg=lambda text, label=f"{name} {call.label}": f"{label}: {text}",
                    )


@every_backend
@every_case
def test_expanded_inputs(case: Case, backend: Backend) -> None:
    for call in list(case.calls(torch.float32, backend.device, True))[-2:]:
        if call.tensors[0].ndim < 2:
            continue
        expanded = Call(tuple(x[:1].expand_as(x) for x in call.tensors), call.options)
        copied = Call(tuple(x.contiguous() for x in expanded.tensors), call.options)
        with backend.forced(case.operators[0]):
            torch.testing.assert_close(case.run(expanded), case.run(copied), equal_nan=True)


@every_backend
@every_case
def test_two_runs_are_bitwise_equal(case: Case, backend: Backend) -> None:
    for call in list(case.calls(torch.float32, backend.device, backend.slow))[-3:]:
        grad = torch.randn_like(case.run(call))
        with backend.forced(*case.operators):
            first, second = (torch.cat([g.flatten() for g in gradients(case, call, grad)]) for _ in range(2))
            one, two = case.run(call), case.run(call)
        assert torch.equal(one.nan_to_num(nan=9.0), two.nan_to_num(nan=9.0))
        assert torch.equal(first.nan_to_num(nan=9.0), second.nan_to_num(nan=9.0))


@every_backend
@every_case
def test_nan_and_inf_reach_the_result(case: Case, backend: Backend) -> None:
    for call in list(case.calls(torch.float32, backend.device, True))[-2:]:
        for value in (float("nan"), float("inf"), float("-inf")):
            spoiled = call.tensors[0].clone()
            spoiled[..., -1, 0] = value if spoiled.ndim > 1 else 0.0
            bad = Call((spoiled, *call.tensors[1:]), call.options)
            with backend.forced(case.operators[0]):
                result = case.run(bad)
            with registry.use_backend("reference"):
                eager, exact = case.run(bad), case.run(bad.to(torch.float64))
            # What cancels in a finite element next to the spoiled one is as large as the inputs.
            size = max(1.0, *(x.abs().max().item() ** 2 for x in call.tensors))
            assert_accurate(result, eager, exact, size=size, what=f"{case.name} {call.label} with {value}")


@every_case
def test_opcheck(case: Case) -> None:
    """Schema, fake kernel and tracing of the registered operators, through torch.library.opcheck."""
    recorded: list[tuple[registry.Op, tuple]] = []
    original = registry.Op.__call__

    direct = registry.Op.native

    def record(self: registry.Op, *args):
        recorded.append((self, args))
        return original(self, *args)

    def record_direct(self: registry.Op, *args):
        recorded.append((self, args))
        return direct(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.Op, "__call__", record)
        patch.setattr(registry.Op, "native", record_direct)
        calls = list(case.calls(torch.float32, "cpu", True))
        for call in calls[:: max(1, len(calls) // 3)][:3]:
            gradients(case, call, torch.randn_like(case.run(call)))
    assert {op.name.removesuffix("_forward") for op, _ in recorded} >= set(case.operators)
    seen = {op.name: (op, args) for op, args in recorded}
    for op, args in seen.values():
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.overload, args, test_utils=tests)


@every_case
def test_compiles_without_a_break(case: Case) -> None:
    torch._dynamo.reset()  # the cases share the functions whose recompilations are limited
    call = list(case.calls(torch.float32, "cpu", True))[-1]
    compiled = torch.compile(
        lambda *tensors: case.function(*tensors, **call.options), fullgraph=True, backend="aot_eager"
    )
    inputs, plain = leaves(call), leaves(call)
    out, expected = compiled(*inputs.tensors), case.run(plain)
    torch.testing.assert_close(out, expected, equal_nan=True)
    grad = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs.tensors, grad), torch.autograd.grad(expected, plain.tensors, grad), strict=True
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


@every_case
def test_autocast_does_not_change_the_result(case: Case) -> None:
    call = list(case.calls(torch.float32, "cpu", True))[-1]
    expected = case.run(call)
    with torch.autocast("cpu", torch.bfloat16):
        result = case.run(call)
    assert result.dtype == expected.dtype
    assert torch.equal(result.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@every_case
def test_functional_transforms_are_refused(case: Case) -> None:
    call = list(case.calls(torch.float32, "cpu", True))[-1]
    with pytest.raises(RuntimeError, match="setup_context|functorch|vmap"):
        torch.func.grad(lambda x: case.function(x, *call.tensors[1:], **call.options).sum())(call.tensors[0])


def curvature(case: Case, call: Call, grad: Tensor, directions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of the inputs and of `grad` of (gradients of the inputs) * directions; and those gradients."""
    call = leaves(call)
    out = case.run(call)
    grad = grad.to(out.dtype).requires_grad_()
    grads = torch.autograd.grad(out, call.tensors, grad, create_graph=True)
    product = sum((g * d.to(g.dtype)).sum() for g, d in zip(grads, directions, strict=True))
    again = torch.autograd.grad(product, (*call.tensors, grad), allow_unused=True, materialize_grads=True)
    return *again, *(g.detach() for g in grads)


@every_backend
@every_case
def test_gradients_of_gradients(case: Case, backend: Backend) -> None:
    """And of the gradients that are made differentiable: the same as without."""
    curved = False
    for call in case.calls(torch.float32, backend.device, True):
        with registry.use_backend("reference"):
            grad = torch.randn_like(case.run(call))
            if not torch.isfinite(case.run(call)).all():
                continue
            directions = tuple(torch.randn_like(x) for x in call.tensors)
            eager = curvature(case, call, grad, directions)
            exact = curvature(case, call.to(torch.float64), grad, directions)
        with registry.use_backend(backend.name):
            result = curvature(case, call, grad, directions)
        curved |= any(bool(x.any()) for x in result[: len(call.tensors) + 1])
        for got, plain, true in zip(result, eager, exact, strict=True):
            size = max(x.abs().max().item() if x.numel() else 0.0 for x in exact)
            assert_accurate(got, plain, true, size=size, what=f"{case.name} {call.label}")
    assert curved


@every_case
def test_reference_gradient_of_gradients_is_the_derivative(case: Case) -> None:
    for call in case.calls(torch.float64, "cpu", True):
        with registry.use_backend("reference"):
            call = leaves(call)
            if torch.isfinite(case.run(call)).all():
                function = lambda *tensors, c=call: case.function(*tensors, **c.options)  # noqa: E731
                torch.autograd.gradgradcheck(function, call.tensors, fast_mode=True)
