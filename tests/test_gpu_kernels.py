"""A GPU's kernels with few drawn calls: on a GPU, and compiled in the interpreter of PTX (SENTFAST_TEST_PTX).

There copies and wgmma happen at both extremes of what the hardware may do, and races and bounds are watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import assert_accurate
from backends import BACKENDS
from cases import CASES, DTYPES, HALF_DTYPES, VALUES, Call, Case
from test_ops import check_gradients, check_values

import sentfast.functional as F
from sentfast import registry

TRITON = [backend for backend in BACKENDS if backend.name == "triton" and not backend.interpreted]
pytestmark = pytest.mark.skipif(not TRITON, reason="no compiled Triton kernels")


def drawn(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def one_of_each_kind(case: Case, dtype: torch.dtype) -> list[Call]:
    """A drawn call for each number of tensors: attention with a bias has a kernel more than without."""
    calls = list(case.calls(dtype, TRITON[0].device, True))
    kinds: dict[int, list[Call]] = {len(call.tensors): [] for call in calls}
    for call in calls:
        kinds[len(call.tensors)].append(call)
    return [kind[drawn(0, len(kind) - 1)] for kind in kinds.values()]


@pytest.mark.parametrize("case", [*CASES, *VALUES], ids=lambda case: case.name)
def test_drawn_calls(case: Case) -> None:
    """Values and gradients, in a drawn dtype."""
    dtypes = HALF_DTYPES if case in VALUES else DTYPES
    dtype = dtypes[drawn(0, len(dtypes) - 1)]
    for call in one_of_each_kind(case, dtype):
        check_values(case, TRITON[0], call)
        if case not in VALUES:
            check_gradients(case, TRITON[0], call)


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Float32 products are rounded to tf32 where the test's precision says so."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, request.node.callspec.params["precision"] == "tf32"
    yield
    matmul.allow_tf32 = before


PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("function", [F.dot_similarity, F.cosine_similarity])
@pytest.mark.usefixtures("tf32")
def test_similarity_of_long_rows(function: Callable, precision: str) -> None:
    # At least five steps of 64: one more than there are buffers. A multiple of eight lets copies be asynchronous.
    columns = 8 * drawn(41, 72)
    a, b = torch.randn(drawn(100, 129), columns), torch.randn(drawn(60, 129), columns)
    a, b = (x.to(PRECISIONS[precision]).to(TRITON[0].device) for x in (a, b))
    with TRITON[0].forced(function.__name__):
        result = function(a, b)
    with registry.use_backend("reference"):
        eager, exact = function(a, b), function(a.double(), b.double())
    # A product of two numbers of tf32 errs by 2^-10 of itself, and errors add up like a random walk.
    size = exact.abs().max().item()
    if precision == "tf32":
        spread = 1.0 if function is F.cosine_similarity else math.sqrt(columns)
        assert (result - exact).abs().max() < 8 * 2**-10 * spread
    else:
        assert_accurate(result, eager, exact, size=size)
