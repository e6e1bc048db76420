"""Which calls are too small to gain, so that the original runs: rules that benchmarks/never_slower.py checks.

They hold for the CPU alone, and not where a backend is asked for by name. Each takes the arguments of the function
whose name it has, and looks at types and sizes only: a call that the original does in microseconds must not wait for
more. What it cannot see, as the sizes of a list, is looked at again when the arguments have become tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, float32
from torch.nn import Parameter

from sentfast import native, private
from sentfast.registry import RUN_ALL, forced_backend

TOO_SMALL = "SF132"
on = not RUN_ALL

# A matrix of scores without norms is one call of a library. Of fewer scores it is done before ours is reached, and of
# narrower rows it is written, not computed. With few rows on one side the other is read, no more, unless its rows are
# wide, which the library packs first.
LEAST_SCORES, LEAST_COLUMNS = 1 << 16, 64
LEAST_ROWS, LEAST_WIDE_COLUMNS = 16, 256
# Ours saves a pass over both sides for their norms, which takes longer than the library's where they are this narrow
# and there are this many, and counts for nothing beside the writing of as many scores. With AVX2 so narrow halves are
# turned into numbers one by one.
NARROWEST, MOST_NARROW_ROWS, MOST_NARROW_SCORES = 4, 1 << 14, 1 << 16
MOST_NARROW_HALVES = 1 << 8
# A CPU with AMX is one of Intel's, and their library's product of float32 is there as fast as ours or faster.
TILES = bool(private.amx_tiles())
# Where the numbers of both sides multiply to less than this, there are fewer scores or narrower rows, in any shape.
_SURELY_SMALL = LEAST_SCORES * LEAST_COLUMNS**2
# A product and a sum, and a difference and its norm, of fewer numbers.
LEAST_NUMBERS, LEAST_DISTANCE_NUMBERS = 1 << 15, 1 << 13
# Several queries over fewer rows, without vectors of 512 bits: most time goes to pairs that enter the k best only until
# better ones come.
LEAST_SEARCHED_ROWS = 4096
# Of one number the cosines are 1 and -1, and all that are equal have to be told apart.
LEAST_SEARCHED_COLUMNS = 2
# Of fewer rows the original has its pairs before ours has set up a search. Of fewer wide rows, without vectors of 512
# bits, too many pairs are among the best of a row to leave many out.
LEAST_MINED_ROWS = 48
LEAST_MINED_WIDE_ROWS, WIDE = 8192, 512


def dot_score(a: Any, b: Any) -> bool:
    if type(a) is Tensor is type(b):  # the common case, in the fewest steps
        if not a.is_cpu:
            return False
        if a.numel() * b.numel() < _SURELY_SMALL or (TILES and a.dtype is float32):
            return on and forced_backend() is None
        try:
            count, width = a.shape
        except (ValueError, RuntimeError):  # other than two dimensions; nested tensors have no shape
            return False
        return _product_is_small(count, b.numel() // width if width else 0, width) and on and forced_backend() is None
    rows, others = _sizes(a), _sizes(b)
    if len(rows) != 2 or len(others) != 2:
        return False
    plain = TILES and str(a.dtype).endswith("float32")
    return (plain or _product_is_small(rows[0], others[0], rows[1])) and on and forced_backend() is None


def _product_is_small(rows: int, others: int, width: int) -> bool:
    if rows * others < LEAST_SCORES or width < LEAST_COLUMNS:
        return True
    return min(rows, others) < LEAST_ROWS and width < LEAST_WIDE_COLUMNS


def cos_sim(a: Any, b: Any) -> bool:
    rows = _sizes(a)
    if len(rows) != 2 or rows[1] >= NARROWEST:
        return False
    others = _sizes(b)
    if len(others) != 2:
        return False
    most = MOST_NARROW_HALVES if a.dtype.itemsize == 2 else MOST_NARROW_ROWS
    many = rows[0] + others[0] > most or rows[0] * others[0] > MOST_NARROW_SCORES
    return many and on and forced_backend() is None


def _of_fewer_numbers(least: int) -> Callable[[Any, Any], bool]:
    """The rule of a function of pairs."""

    def small(a: Any, b: Any) -> bool:
        if type(a) is Tensor:
            return a.is_cpu and a.numel() < least and on and forced_backend() is None
        return type(a) is np.ndarray and a.size < least and on and forced_backend() is None

    return small


pairwise_dot_score = _of_fewer_numbers(LEAST_NUMBERS)
pairwise_euclidean_sim = _of_fewer_numbers(LEAST_DISTANCE_NUMBERS)


def semantic_search(query_embeddings: Any, corpus_embeddings: Any, *rest: Any) -> bool:
    """The best rows of each query."""
    queries, rows = _sizes(query_embeddings), _sizes(corpus_embeddings)
    if len(queries) != 2 or len(rows) != 2:
        return False
    few = queries[0] > 1 and rows[0] < LEAST_SEARCHED_ROWS and not _wide_vectors()
    return (few or rows[1] < LEAST_SEARCHED_COLUMNS) and on and forced_backend() is None


def mining(embeddings: Any, *rest: Any) -> bool:
    """The best pairs of all rows, or their communities."""
    rows = _sizes(embeddings)
    if len(rows) != 2 or rows[0] >= LEAST_MINED_WIDE_ROWS:
        return False
    small = rows[0] < LEAST_MINED_ROWS or (rows[1] >= WIDE and not _wide_vectors())
    return small and on and forced_backend() is None


def _wide_vectors() -> bool:
    return native.isa().startswith("avx512")


def _sizes(x: Any) -> tuple[int, ...]:
    """The shape of a plain dense tensor on the CPU or of an array, () of anything else."""
    try:
        if type(x) is Tensor or type(x) is Parameter:
            return x.shape if x.is_cpu else ()
        return x.shape if type(x) is np.ndarray else ()
    except RuntimeError:  # nested tensors have none
        return ()


RULES: dict[str, Callable[..., bool]] = {
    "dot_score": dot_score,
    "cos_sim": cos_sim,
    "pairwise_dot_score": pairwise_dot_score,
    "pairwise_euclidean_sim": pairwise_euclidean_sim,
    "semantic_search": semantic_search,
    "paraphrase_mining_embeddings": mining,
    "community_detection": mining,
}
# Those whose originals call no other patched function, so that nothing has to be switched off around them.
LEAVES = frozenset({"dot_score", "pairwise_dot_score", "pairwise_euclidean_sim"})
