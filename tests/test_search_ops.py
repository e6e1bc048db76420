"""Exact search against a float64 brute force: values, order, limits, bounds, edges, and what it refuses."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import BACKENDS, Backend
from process_settings import threads
from torch import Tensor

from sentfast import native, registry
from sentfast.ops import search

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
every_metric = pytest.mark.parametrize("metric", search.METRICS)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are on the device of the backend."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend is not None and backend.name == "cuda":
        pytest.skip("search has no kernels in CUDA C++")
    with torch.device(backend.device if backend is not None else "cpu"):
        yield


# ---- data ----


def clusters(n: int, d: int) -> Tensor:
    return torch.randn(7, d)[torch.randint(7, (n,))] + 0.1 * torch.randn(n, d)


def near(distance: float) -> Callable[[int, int], Tensor]:
    return lambda n, d: torch.linspace(-1, 1, d) + distance * torch.randn(n, d)


def units(n: int, d: int) -> Tensor:
    """Scores differ in their last bits, of products by what rounding has left of the norms."""
    return torch.nn.functional.normalize(near(3e-4)(n, d))


def halfway(n: int, d: int) -> Tensor:
    """Products with each other lie on the middle of two float32 or beside it."""
    x = torch.zeros(n, d)
    x[:, 0] = 1 + torch.randint(4, (n,)) * 2.0**-23
    x[:, -1] += torch.randint(-8, 9, (n,)) * 2.0**-25
    x[:, d // 2] += torch.randint(2, (n,)) * 3 * 2.0**-14
    return x


def scaled(n: int, d: int) -> Tensor:
    return torch.randn(n, d) * 10.0 ** torch.randint(-44, 37, (n, 1))


def with_zeros(n: int, d: int) -> Tensor:
    return torch.randn(n, d) * (torch.rand(n, 1) < 0.8)


def with_odd_rows(n: int, d: int) -> Tensor:
    x = torch.randn(n, d)
    x[torch.rand(n) < 0.1] = NAN
    x[torch.rand(n, d) < 0.1 / d] = INF
    x[torch.rand(n, d) < 0.1 / d] = -INF
    return x


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "random": torch.randn,
    "clusters": clusters,
    "duplicates": lambda n, d: torch.randn(4, d)[torch.randint(4, (n,))],
    "near": near(1e-2),  # closer than the codes resolve without their center
    "close": near(2e-4),  # cosines of a few neighbouring float32
    "nearer": near(1e-6),  # closer than float32 resolves: most scores are equal
    "units": units,
    "halfway": halfway,
    "scaled": scaled,
    "zeros": with_zeros,
    "odd": with_odd_rows,
}
SHAPES = ((1, 1, 1), (64, 3, 7), (333, 1, 4), (700, 70, 13), (1500, 384, 3), (130, 1030, 20))
SMALL_SHAPES = ((1, 1, 1), (333, 5, 3), (200, 40, 33))  # for the interpreter


def draws(queries: int, rows: int, dim: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, make in KINDS.items():
        corpus = make(rows, dim)
        some = make(queries, dim)
        if rows >= queries and torch.rand(1) < 0.5:  # queries that are rows
            some = corpus[torch.randperm(rows)[:queries]].clone()
        yield name, some, corpus


# ---- the truth ----


def true_scores(queries: Tensor, corpus: Tensor, metric: str) -> Tensor:
    q, k = queries.double(), corpus.double()
    if metric == "euclidean":
        return -((q.unsqueeze(1) - k) ** 2).sum(-1).sqrt().float()
    products = (q.unsqueeze(1) * k).sum(-1)
    if metric == "cos":
        norms = [x.pow(2).sum(-1).sqrt().clamp(min=1e-12) for x in (q, k)]
        if queries.shape[1] > 1:  # PyTorch's normalize squares in float32, but not a row of one number
            norms = [x.masked_fill(x >= 2.0**64, INF) for x in norms]
        products = products / (norms[0].unsqueeze(1) * norms[1])
    return products.float()


def true_topk(scores: Tensor, k: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """By score, then by index; only where `allowed`, and never NaN."""
    best, ids = torch.full((len(scores), k), -INF), torch.full((len(scores), k), -1)
    for i, (row, keep) in enumerate(zip(scores, allowed & ~scores.isnan(), strict=True)):
        values = row.tolist()
        found = sorted(keep.nonzero().flatten().tolist(), key=lambda j, values=values: (-values[j], j))[:k]
        best[i, : len(found)], ids[i, : len(found)] = row[found], torch.tensor(found, dtype=torch.int64)
    return best, ids


def assert_scores(got: Tensor, want: Tensor, what: str) -> None:
    """Equal, or neighbours: a sum in another order may fall on the other side of a rounding."""
    up, down = (torch.nextafter(want, torch.full_like(want, limit)) for limit in (INF, -INF))
    assert ((got == want) | (got == up) | (got == down)).all(), what


def packs(corpus: Tensor) -> tuple[search.Packed | None, ...]:
    return None, search.pack(corpus), search.pack(corpus, "bf16")


# ---- values ----


@every_metric
@every_backend
def test_topk(backend: Backend, metric: str) -> None:
    for rows, dim, count in SMALL_SHAPES if backend.slow else SHAPES:
        for name, queries, corpus in draws(count, rows, dim):
            scores = true_scores(queries, corpus, metric)
            # The reference reads no packed rows.
            forms = packs(corpus)[: 2 if backend.name == "reference" else 3]
            for packed, k in itertools.product(forms, {1, min(5, rows), rows}):
                what = f"{name} {rows} x {dim}, {count} queries, k = {k}, {packed and packed.codes.dtype}"
                with backend.forced("search_topk"):
                    found = search.topk(queries, corpus, packed, k=k, metric=metric)
                want, ids = true_topk(scores, k, torch.ones_like(scores, dtype=torch.bool))
                assert torch.equal(found.ids, ids), what
                assert_scores(found.scores, want, what)
                assert found.statistics.nans == scores.isnan().sum(), what
                assert found.statistics.pairs == count * rows, what


@every_metric
@every_backend
def test_topk_within_limits(backend: Backend, metric: str) -> None:
    rows, count = 300, 9
    for name, queries, corpus in draws(count, rows, 24):
        scores = true_scores(queries, corpus, metric)
        some = scores.nan_to_num(0, 1, -1)
        excluded = torch.rand(count, rows) < 0.3
        ids = excluded.nonzero()[:, 1]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), excluded.sum(1).cumsum(0)])
        lowest, highest = some.quantile(0.3, dim=1), some.quantile(0.9, dim=1)
        for packed in packs(corpus):
            with backend.forced("search_topk"):
                found = search.topk(
                    queries,
                    corpus,
                    packed,
                    k=250,
                    metric=metric,
                    threshold=lowest,
                    highest=highest,
                    excluded=(offsets, ids),
                )
            allowed = ~excluded & (scores >= lowest.unsqueeze(1)) & (scores <= highest.unsqueeze(1))
            want, want_ids = true_topk(scores, 250, allowed)
            assert torch.equal(found.ids, want_ids), name
            assert_scores(found.scores, want, name)
            assert found.statistics.nans == (scores.isnan() & ~excluded).sum(), name


@every_metric
@every_backend
def test_pairs_and_counts(backend: Backend, metric: str) -> None:
    for rows, dim, count in ((1, 1, 1), (200, 17, 5 if backend.slow else 50), (700, 64, 3)):
        for name, queries, corpus in draws(count, rows, dim):
            scores = true_scores(queries, corpus, metric)
            # Thresholds that are scores: pairs on them count.
            lowest = scores.nan_to_num(0, 3e38, -3e38).sort(dim=1, descending=True)[0][:, rows // 20]
            want = scores >= lowest.unsqueeze(1)
            for packed in packs(corpus):
                with backend.forced("search_pairs", "search_count"):
                    found = search.pairs_above(queries, corpus, packed, threshold=lowest, metric=metric)
                    counts = search.count_above(queries, corpus, packed, threshold=lowest, metric=metric).counts
                assert torch.equal(counts, want.sum(1)), name
                assert torch.equal(found.offsets.diff(), want.sum(1)), name
                assert torch.equal(found.ids, want.nonzero()[:, 1]), name
                assert_scores(found.scores, scores[want], name)


@every_backend
def test_join_with_itself(backend: Backend) -> None:
    corpus = clusters(400, 16)
    scores = true_scores(corpus, corpus, "cos")
    want = (scores >= 0.9).triu(1)
    for packed, first in itertools.product(packs(corpus), (0, 130)):
        with backend.forced("search_pairs"):
            found = search.pairs_above(corpus[first : first + 200], corpus, packed, threshold=0.9, first=first)
        part = want[first : first + 200]
        assert torch.equal(found.offsets.diff(), part.sum(1))
        assert torch.equal(found.ids, part.nonzero()[:, 1])


@every_backend
def test_rows_at_any_distance(backend: Backend) -> None:
    wide = torch.randn(90, 50)
    for rows in (wide[::3, 5:38], wide.T[5:38], wide.T[::2], wide[:, ::2], wide[:1].expand(30, 50)):
        with backend.forced():
            for packed in packs(rows):
                found = search.topk(rows[:5], rows, packed, k=7, metric="dot")
                dense = search.topk(rows[:5].contiguous(), rows.contiguous(), packed, k=7, metric="dot")
                assert torch.equal(found.ids, dense.ids)
                assert torch.equal(found.scores, dense.scores)


@every_backend
def test_no_queries(backend: Backend) -> None:
    corpus = torch.randn(70, 8)
    for packed in packs(corpus):
        with backend.forced():
            assert search.topk(corpus[:0], corpus, packed, k=3).scores.shape == (0, 3)
            assert search.pairs_above(corpus[:0], corpus, packed, threshold=0.0).offsets.tolist() == [0]
            assert search.count_above(corpus[:0], corpus, packed, threshold=0.0).counts.shape == (0,)


# ---- the first pass ----


def triton_search(monkeypatch: pytest.MonkeyPatch, backend: Backend, **changed: float) -> None:
    """Sets what decides where the Triton kernels give up, and in what steps they work."""
    if backend.name != "triton":
        pytest.skip("of the Triton kernels")
    native.load_triton()
    module = importlib.import_module("sentfast.kernels.search")
    for name, value in changed.items():
        monkeypatch.setattr(module, name, value)


@every_metric
@every_backend
def test_blocks_in_small_steps(backend: Backend, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks are undecided: exact scores by blocks, of a few queries and a few blocks at a time."""
    triton_search(monkeypatch, backend, _DENSE=2.0, _BOUNDS=100, _SCORES=256)
    rows, count = 120, 5
    for name, queries, corpus in draws(count, rows, 9):
        if name not in ("random", "duplicates", "scaled", "odd"):
            continue
        scores = true_scores(queries, corpus, metric)
        some = scores.nan_to_num(0, 1, -1)
        excluded = torch.rand(count, rows) < 0.03
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), excluded.sum(1).cumsum(0)])
        highest = some.quantile(0.9, dim=1)
        limits = {"highest": highest, "excluded": (offsets, excluded.nonzero()[:, 1])}
        allowed = ~excluded & (scores <= highest.unsqueeze(1))
        lowest = some.quantile(0.95, dim=1)
        for packed in packs(corpus):
            with backend.forced("search_topk", "search_pairs", "search_count"):
                found = search.topk(queries, corpus, packed, k=5, metric=metric, **limits)
                pairs = search.pairs_above(queries, corpus, packed, threshold=lowest, metric=metric)
                counts = search.count_above(queries, corpus, packed, threshold=lowest, metric=metric)
            want, ids = true_topk(scores, 5, allowed)
            assert torch.equal(found.ids, ids), name
            assert_scores(found.scores, want, name)
            assert found.statistics.nans == (scores.isnan() & ~excluded).sum(), name
            reach = scores >= lowest.unsqueeze(1)
            assert torch.equal(pairs.offsets.diff(), reach.sum(1)), name
            assert torch.equal(pairs.ids, reach.nonzero()[:, 1]), name
            assert torch.equal(counts.counts, reach.sum(1)), name
            for done in (found, pairs, counts):
                assert done.statistics.fallbacks == 0, name
                assert done.statistics.pairs == count * rows, name
            assert pairs.statistics.nans == counts.statistics.nans == scores.isnan().sum(), name


@every_metric
@every_backend
def test_bounds_of_blocks_hold(backend: Backend, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every pair, with operands cut as the tensor cores may cut them: the interpreter does not."""
    triton_search(monkeypatch, backend)
    tiles = importlib.import_module("sentfast.kernels.search_tiles")
    number, rows = search.METRICS[metric], 200

    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & -(1 << 13)).view(torch.float32)

    for name, queries, corpus in draws(5, rows, 24):
        exact = true_scores(queries, corpus, metric).nan_to_num(-INF, INF, -INF)
        for packed in packs(corpus):
            shared = tiles.prepare(corpus, *(packed or (None, None, None)), number, 1)
            if shared.codes is None:
                factors = tiles._query_factors(queries, shared)[1]
                given = cut(queries), factors
                monkeypatch.setattr(tiles, "_query_factors", lambda *_, given=given: given)
                lower, upper = tiles.bounds(queries, shared._replace(values=cut(corpus)), None, True)
                monkeypatch.undo()
            else:
                lower, upper = tiles.bounds(queries, shared, None, True)
            padded = torch.nn.functional.pad(exact, (0, shared.blocks * shared.block - rows), value=-INF)
            best = padded.unflatten(1, (-1, shared.block)).amax(-1)
            assert (lower <= best).all() and (best <= upper).all(), name
            if name == "random":
                assert (upper - lower).mean() < 0.2 * (1 + best.abs().mean()), name


@every_backend
def test_blocks_leave_out_most_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_search(monkeypatch, backend)
    corpus, queries = torch.randn(1500, 150), torch.randn(4, 150)
    scores = true_scores(queries, corpus, "cos")
    for packed, k in itertools.product(packs(corpus), (1, 3)):  # blocks of 64 rows and of 16
        with backend.forced("search_topk"):
            found = search.topk(queries, corpus, packed, k=k)
        assert torch.equal(found.ids, true_topk(scores, k, torch.ones_like(scores, dtype=torch.bool))[1])
        assert found.statistics.scored < 0.2 * found.statistics.pairs
        assert found.statistics.fallbacks == 0


@every_backend
def test_join_in_small_steps(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_search(monkeypatch, backend, _DENSE=2.0, _BOUNDS=130)
    corpus = clusters(200, 9)
    want = (true_scores(corpus, corpus, "cos") >= 0.9).triu(1)[30:]
    for packed in packs(corpus):
        with backend.forced("search_pairs"):
            found = search.pairs_above(corpus[30:], corpus, packed, threshold=0.9, first=30)
        assert torch.equal(found.offsets.diff(), want.sum(1))
        assert torch.equal(found.ids, want.nonzero()[:, 1])
        assert found.statistics.pairs == 170 * 169 // 2


@pytest.mark.parametrize("precision", search.BITS)
@every_backend
def test_packed_rows_are_as_near_as_they_say(backend: Backend, precision: str) -> None:
    for rows, dim in ((1, 1), (130, 33), (65, 384)):
        for name, make in KINDS.items():
            corpus = make(rows, dim)
            with backend.forced("search_pack"):
                codes, factors, center = search.pack(corpus, precision)  # type: ignore[misc]
            assert (center.isfinite().all(), center.norm() < 1 + 1e-6, factors.shape[1]) == (True, True, 6)
            values = codes.transpose(1, 2).flatten(2).flatten(0, 1)[:, :dim].double()
            signed = values - 128 if precision == "int8" else values
            scale, residual, height, norm, tilt, rest = factors.transpose(0, 1).flatten(1).double()
            exact = corpus.double().norm(dim=1)
            usable = (exact > 0) & exact.isfinite()
            unit = corpus.double()[usable] / exact[usable].unsqueeze(1)
            keep = slice(0, rows)
            part = (scale.unsqueeze(1) * signed)[keep][usable]
            assert ((unit - center - part).norm(dim=1) <= residual[keep][usable] + 1e-12).all(), name
            assert (part.norm(dim=1) <= height[keep][usable]).all(), name
            most = scale * dim**0.5 * 0.51 if precision == "int8" else height * 2.0**-8
            assert (residual[keep][usable] <= most[keep][usable] + 1e-12).all(), name
            wanted = (unit - center.double()) @ center.double()
            torch.testing.assert_close(tilt[keep][usable], wanted, atol=1e-14, rtol=1e-6)
            assert torch.equal(norm[keep].float().nan_to_num(-1), exact.float().nan_to_num(-1)), name
            torch.testing.assert_close((norm + rest)[keep][usable], exact[usable], atol=1e-45, rtol=1e-14)
            assert (signed[rows:] == 0).all(), name
            assert (signed[keep][~usable] == 0).all(), name


def need_cpu() -> Backend:
    found = [backend for backend in BACKENDS if backend.name == "cpu"]
    if not found:
        pytest.skip("the compiled kernels are not there")
    return found[-1]


def test_bounds_leave_out_most_pairs() -> None:
    corpus, queries = torch.randn(20000, 128), torch.randn(40, 128)
    packed = search.pack(corpus)
    with need_cpu().forced("search_topk"):
        found = search.topk(queries, corpus, packed, k=5).statistics
        close = near(1e-2)(20040, 128)
        near_found = search.topk(close[:40], close[40:], search.pack(close[40:]), k=5).statistics
    assert found.scored < 0.05 * found.pairs
    assert near_found.scored < 0.2 * near_found.pairs


@pytest.mark.parametrize("precision", search.BITS)
@every_metric
def test_nearly_equal_scores_are_decided_by_codes(metric: str, precision: str) -> None:
    """What all rows share is not in the bounds, nor is what float32 does not tell apart."""
    rows = torch.nn.functional.normalize(near(1e-4)(4040, 128))
    with need_cpu().forced("search_topk"):
        found = search.topk(rows[:20], rows, search.pack(rows, precision), k=5, metric=metric)
    scores = true_scores(rows[:20], rows, metric)
    assert torch.equal(found.ids, true_topk(scores, 5, torch.ones_like(scores, dtype=torch.bool))[1])
    assert found.statistics.scored < 0.3 * found.statistics.pairs


def test_too_wide_bounds_fall_back() -> None:
    corpus = torch.cat([torch.randn(6000, 64), torch.ones(20000, 64), torch.randn(70000, 64)])
    queries = torch.ones(30, 64) + 1e-3 * torch.randn(30, 64)
    with need_cpu().forced("search_topk"):
        found = search.topk(queries, corpus, search.pack(corpus), k=10)
    assert found.statistics.fallbacks == 30
    assert found.statistics.scored < 0.5 * found.statistics.pairs  # and they come back from it
    assert torch.equal(found.ids, torch.arange(6000, 6010).expand(30, 10))


@pytest.mark.parametrize("count", [1, 5, 100])
def test_threads_change_nothing(count: int) -> None:
    corpus = clusters(40000, 20)
    queries, packed = clusters(count, 20), search.pack(corpus)
    corpus[::7] = corpus[3]
    packed = search.pack(corpus)
    found: list[Any] = []
    for number in (1, 2, 3):
        with threads(number), need_cpu().forced("search_topk", "search_pairs", "search_count"):
            found.append(
                (
                    search.topk(queries, corpus, packed, k=20)[:2],
                    search.pairs_above(queries, corpus, packed, threshold=0.99)[:3],
                    search.count_above(queries, corpus, packed, threshold=0.99)[:1],
                    search.pack(corpus),
                )
            )
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with registry.use_backend("reference"):
        assert torch.equal(search.topk(queries, corpus, k=20).ids, found[0][0][1])


def test_instruction_sets_agree_to_the_bit() -> None:
    queries, corpus = clusters(30, 77), clusters(3000, 77)
    results = []
    for backend in BACKENDS:
        if backend.name == "cpu":
            for metric, packed in itertools.product(search.METRICS, packs(corpus)):
                with backend.forced("search_topk"):
                    results.append((metric, search.topk(queries, corpus, packed, k=9, metric=metric)))
    for (metric, one), (other_metric, other) in itertools.combinations(results, 2):
        if metric == other_metric:
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.scores, other.scores)


# ---- as operators ----


def test_operators_are_registered_well() -> None:
    queries, corpus = torch.randn(5, 12), torch.randn(100, 12)
    packed = search.pack(corpus)
    lowest = torch.zeros(5)
    for arguments in ((*packed,), (None, None, None)):
        torch.library.opcheck(
            torch.ops.sentfast.search_topk.default, (queries, corpus, *arguments, 3, 0, lowest, None, None, None)
        )
        torch.library.opcheck(torch.ops.sentfast.search_count.default, (queries, corpus, *arguments, lowest, 1))
        torch.library.opcheck(torch.ops.sentfast.search_pairs.default, (queries, corpus, *arguments, lowest, 0, -1))
    torch.library.opcheck(torch.ops.sentfast.search_pack.default, (corpus, 8))


ROWS = torch.randn(10, 4)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"queries": ROWS.double()}, TypeError, "queries: expected dense float32, got torch.float64"),
    "not a tensor": ({"corpus": [1.0]}, TypeError, "corpus: expected a tensor, got list"),
    "rank": ({"queries": ROWS[0]}, ValueError, r"queries: expected shape \[rows, D\]"),
    "dimension": (
        {"corpus": torch.randn(10, 5)},
        ValueError,
        r"corpus: expected the dimension of queries \(4\), got 5",
    ),
    "empty": ({"corpus": ROWS[:0]}, ValueError, "corpus: expected at least one row"),
    "k": ({"k": 11}, ValueError, r"k: expected an integer from 1 to 10 \(the rows of corpus\), got 11"),
    "no k": ({"k": 0}, ValueError, "k: expected an integer from 1 to 10"),
    "metric": ({"metric": "manhattan"}, ValueError, r"metric: expected one of .*, got 'manhattan'"),
    "threshold": ({"threshold": NAN}, ValueError, "threshold: expected a number, got nan"),
    "highest": ({"highest": torch.zeros(3)}, ValueError, r"highest: expected float32 of shape \[10\]"),
    "packed": ({"packed": search.pack(torch.randn(70, 4))}, ValueError, "packed.codes: expected contiguous"),
    "excluded": (
        {"excluded": (torch.arange(11), torch.full((10,), 10))},
        ValueError,
        r"excluded\[1\]: expected rows from 0 to 9",
    ),
    "order": (
        {"excluded": (torch.tensor([0] * 10 + [2]), torch.tensor([3, 1]))},
        ValueError,
        r"excluded\[1\]: expected ids that rise within each query",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, error, message = BAD[name]
    arguments = {"queries": ROWS, "corpus": ROWS, "k": 2, **changed}
    with pytest.raises(error, match=message):
        search.topk(arguments.pop("queries"), arguments.pop("corpus"), **arguments)


def test_bad_packing() -> None:
    with pytest.raises(ValueError, match=r"precision: expected one of \('int8', 'bf16', 'fp32'\), got 'int4'"):
        search.pack(ROWS, "int4")
    with pytest.raises(ValueError, match="rows: expected at most 32768 dimensions for int8, got 32769"):
        search.pack(torch.zeros(1, 32769))
    with pytest.raises(ValueError, match=r"first: expected 0 to 5 .* got 6"):
        search.pairs_above(ROWS[:5], ROWS, threshold=0.0, first=6)
