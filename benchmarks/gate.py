"""Nothing is timed before its output is right and the backend that was asked for has made it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timing import Variant, run_once
from torch import Tensor
from workload import OURS, STOCK, Inputs, Workload

from sentfast.report import report

ALLOWED_EPS = 4  # err(variant) <= 2 * err(stock) + ALLOWED_EPS * eps of the output's dtype
SANE_EPS = 256  # a stock output farther than this from the oracle means that the oracle is wrong
# The backends that may run, by device, where none is asked for.
EXPECTED = {"cpu": {"cpu"}, "cuda": {"cuda", "triton"}}


class Refused(Exception):
    """The workload is not measured."""


@dataclass
class Checked:
    """What the gate saw.

    Attributes:
        errors: variant -> largest error of each output tensor, relative to the largest exact value.
        ran: variant -> counts by operator and backend, and of calls handed to the original code.
        output_bytes: size of the output.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    ran: dict[str, Any] = field(default_factory=dict)
    output_bytes: int = 0


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def error(got: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value; infinite where a NaN, an infinity or a shape differs."""
    if got.shape != exact.shape:
        return float("inf")
    got = got.detach().double()
    finite = exact.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), exact.isnan()):
        return float("inf")
    if not finite.all():
        if not torch.equal(got.nan_to_num(nan=0.0)[~finite], exact.nan_to_num(nan=0.0)[~finite]):
            return float("inf")
        got, exact = got[finite], exact[finite]
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((got - exact).abs().max() / scale).item()


def check(workload: Workload, variants: dict[str, Variant], inputs: Inputs, backends: set[str]) -> Checked:
    """Checks every variant against the float64 oracle, by the rule of the tests, with the stock output as measure."""
    exact = tensors(workload.exact(inputs))
    checked = Checked()
    checked.errors[STOCK] = _check_stock(workload, variants[STOCK], inputs, exact)
    for name, variant in variants.items():
        if variant.bound or name == STOCK:
            continue
        report(reset=True)
        output = tensors(run_once(variant, inputs))
        ran = report(reset=True)
        if name == OURS:
            checked.output_bytes = sum(x.numel() * x.element_size() for x in output)
        if name == OURS or variant.switched:
            # The drop-in may hand a call to the original code, which the row then says; what is called sentfast not.
            _check_backend(workload.name, name, {backend for _, backend in ran.calls}, backends, name == OURS)
            checked.ran[name] = ran.to_dict()
        errors = checked.errors[name] = [error(x, e) for x, e in zip(output, exact, strict=True)]
        for number, (mine, theirs) in enumerate(zip(errors, checked.errors[STOCK], strict=True)):
            allowed = 2 * theirs + ALLOWED_EPS * torch.finfo(output[number].dtype).eps
            if not mine <= allowed:
                raise Refused(
                    f"{workload.name}: output {number} of {name!r} has error {mine:.3g}, allowed is {allowed:.3g}"
                )
    return checked


def _check_stock(workload: Workload, variant: Variant, inputs: Inputs, exact: tuple[Tensor, ...]) -> list[float]:
    output = tensors(run_once(variant, inputs))
    errors = [error(x, e) for x, e in zip(output, exact, strict=True)]
    for x, e in zip(output, errors, strict=True):
        if not e <= SANE_EPS * torch.finfo(x.dtype).eps:
            raise Refused(f"{workload.name}: the stock output has error {e:.3g}, so the oracle or the inputs are wrong")
    return errors


def _check_backend(workload: str, variant: str, ran: set[str], wanted: set[str], must_run: bool) -> None:
    if must_run and not ran:
        raise Refused(f"{workload}: {variant!r} ran no sentfast operator")
    if not ran <= wanted:
        raise Refused(f"{workload}: {variant!r} ran on {sorted(ran)}, wanted {sorted(wanted)}")
