"""The fuzzer finds what it is there for: faults of every kind are put into one side of a case, and must be seen."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

import sides
from compare import Ranking, Sized, Steps, Tokens
from draw import Draw, Raised

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def wrong(x: torch.Tensor) -> torch.Tensor:
    """One element is off by a thousandth."""
    x = x.clone()
    x.view(-1)[0] += 1e-3
    return x


def warned(x: Any) -> Any:
    warnings.warn("only here", stacklevel=1)
    return x


def failed() -> None:
    raise KeyError("x")


# What happens to a tensor on our side.
FAULTS: dict[str, Any] = {
    "value": wrong,
    "dtype": lambda x: x.double(),
    "shape": lambda x: x[None],
    "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "memory": lambda x: torch.cat([x, x, x, x])[: len(x)],
    "type": lambda x: x.numpy(),
    "gradient": lambda x: x.clone().requires_grad_(),
    "nan": lambda x: x.where(x != x.max(), float("nan")),
    "error": lambda x: Raised(ValueError("x")),
    "missing": lambda x: None,
    "random number": lambda x: x + 0 * torch.rand(()),
    "random number of numpy": lambda x: x + 0 * np.random.rand(),
    "random number of Python": lambda x: x + 0 * random.random(),
    "warning": warned,
    "size": lambda x: Sized(wrong(x), 1.0),
    "tokens": lambda x: Tokens(wrong(x), MASK),
    "steps": lambda x: Steps((x * 10).int() + 2),
    "ranking": lambda x: Ranking([2, 1], [0.5, 0.25]),
    "ranking's scores": lambda x: Ranking([1, 2], [0.5, 0.26]),
    "key": lambda x: {"b": x, "a": x},
}
# Where it has to be something else than a tensor on stock's side too.
PLAIN: dict[str, Any] = {
    "size": lambda x: Sized(x, 1.0),
    "tokens": lambda x: Tokens(x, MASK),
    "steps": lambda x: Steps((x * 10).int()),
    "ranking": lambda x: Ranking([1, 2], [0.5, 0.25]),
    "ranking's scores": lambda x: Ranking([1, 2], [0.5, 0.25]),
    "key": lambda x: {"a": x, "b": x},
}


def seed_of() -> int:
    return int(torch.randint(2**31, ()))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_shrunk(name: str) -> None:
    def family(draw: Draw) -> dict[str, Any]:
        x = draw.normal("x", 2, 3, draw.one_of("width", (4, 9)))
        draw.some_of("of no importance", "abcdef", 0.9)
        plain = PLAIN.get(name, lambda x: x)
        return {"value": FAULTS[name](x) if draw.ours and draw.one_of("fault", (False, True), 1.0) else plain(x)}

    seed = seed_of()
    outcome = sides.check(family, seed, 3)
    assert outcome.differences, name
    assert sides.check(family, seed, 3, frozenset({"fault"})).differences == []
    # The fault is drawn on our side alone, so only the other draws can be made simple.
    simple = sides.shrink(family, seed, 3, list(outcome.drawn))
    assert simple == set(outcome.drawn) and sides.check(family, seed, 3, simple).differences


def test_the_same_is_the_same_and_repeats() -> None:
    def family(draw: Draw) -> dict[str, Any]:
        x = draw.normal("x", 2, 3, 4)
        return {
            "value": x,
            "tokens": Tokens(x * MASK[..., None] if draw.ours else x, MASK),
            "raised": draw.attempt(failed),
        }

    seed = seed_of()
    assert sides.check(family, seed, 5).differences == []
    runs = [sides.run(family, seed, 5, "stock", frozenset()).values["value"] for _ in range(2)]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], sides.run(family, seed, 6, "stock", frozenset()).values["value"])


def test_a_case_that_is_itself_broken_is_no_success() -> None:
    assert "the case is broken" in sides.check(lambda draw: failed(), seed_of(), 1).differences[0]  # type: ignore
