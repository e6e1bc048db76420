"""The encoder's studies on a tiny model: they measure, refuse what is wrong, and their rows fill the tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
import encode
import encode_models
import encoder_report
import gate
import gemm
import latency
import limits
import machine
import openvino_peer
import quality
import report
import startup
import studies
import study
import texts
import timing
import trust
from study import OURS, OURS_BF16, STOCK, STOCK_BF16, Settings

import sentfast
from sentfast import native

BACKEND = "cpu" if native.cpu_loaded() else "reference"
LIMITS = dict.fromkeys(limits.LIMITS, 1e10)
SETTINGS = Settings(threads=1, backends=(BACKEND,), quick=True, models=("toy",), seconds=1e-3, rounds=2)
WORDS = ["river", "stone", "cat", "market", "winter", "engine", "paper", "garden", "doctor", "music", "window", "bread"]
GLOSSES = tuple(
    texts.Gloss((word, f"{word} {other}"), f"a {word} beside the {other}, seen in {k} places")
    for k, (word, other) in enumerate(zip(WORDS * 4, WORDS[3:] + WORDS * 4, strict=False))
)


def _toy():
    config = encode_models.bert(layers=1, hidden=64, heads=2)
    tail = lambda modules: [modules.Pooling(64, "mean"), modules.Normalize()]  # noqa: E731
    return encode_models._random(config, 32, tail), "random"


def _toy_plain():
    model, weights = _toy()
    return encode_models.Plain(encode_models.base_of(model), model.tokenizer, 32), weights


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A model and texts that need no network."""
    for name, build in (("toy", _toy), ("toy_plain", _toy_plain)):
        toy = encode_models.Model(name, 32, build, {"short": 6, "long": 4})
        monkeypatch.setitem(encode_models.MODELS, name, toy)
    monkeypatch.setattr(texts, "glosses", lambda: GLOSSES)
    monkeypatch.setattr(texts, "queries", lambda count, seed: [gloss.text for gloss in GLOSSES[:count]])
    for kind, repeats in (("short", 1), ("long", 4)):
        draw = lambda count, seed, repeats=repeats: [" ".join([x.text] * repeats) for x in GLOSSES[:count]]  # noqa: E731
        monkeypatch.setitem(texts.KINDS, kind, draw)
    before, threads = sentfast.is_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    timing.switch(before)


def finished(measured, rows):
    for row in rows.values():
        measured.finish(row, LIMITS)
        row.update(machine.commit(), study="encoder_minilm")
        json.dumps(row)
    return rows


def variants_here():
    return {STOCK, OURS, STOCK_BF16} | (set() if study.why_no_bf16() else {OURS_BF16})


def table_lines(text):
    """Without what is said below a table, such as why there is no bf16."""
    return sum(line.startswith("|") for line in text.splitlines())


@pytest.mark.parametrize("model", ["toy", "toy_plain"])
def test_throughput_rows(model):
    settings = Settings(**{**vars(SETTINGS), "models": (model,)})
    rows = finished(encode, encode.measure(settings))
    assert list(rows) == [f"encoder_{model}_short", f"encoder_{model}_long"]
    for row in rows.values():
        assert set(row["seconds"]) == set(row["rates"]) == set(row["fractions"]) == variants_here()
        assert set(row["ratios"]) == variants_here() - {STOCK}
        assert set(row["ran"][OURS]["calls"]["encoder"]) == {BACKEND}
        assert row["cosine"][OURS]["min"] > 1 - 1e-6 and row["targets"]["fp32 cosine"]["met"] is True
        assert row["targets"]["fp32 error"]["met"] is True
        assert row["flops"] > 0 and row["over_openvino"] is None
    assert rows[f"encoder_{model}_long"]["tokens"] > rows[f"encoder_{model}_short"]["tokens"]
    assert "random weights" in encoder_report.throughput(list(rows.values()))


def test_latency_rows(monkeypatch):
    monkeypatch.setattr(latency, "BLOCK", 5)
    rows = finished(latency, latency.measure(SETTINGS))
    (row,) = rows.values()
    assert row["calls"] == latency.QUICK_CALLS
    assert all(0 < found["p50"] <= found["p90"] for found in row["seconds"].values())
    assert set(row["ratios"]) == variants_here() - {STOCK, STOCK_BF16}
    assert table_lines(encoder_report.latency([row])) == 3


def test_quality_rows(monkeypatch):
    monkeypatch.setattr(quality, "QUICK_SIZE", (40, 10))
    (row,) = finished(quality, quality.measure(SETTINGS)).values()
    assert row["ndcg"][OURS] == pytest.approx(row["ndcg"][STOCK], abs=1e-6)
    assert row["targets"]["fp32 nDCG"]["met"] and row["targets"]["fp32 cosine"]["met"]
    assert row["glosses"] == 40 and row["queries"] == 10
    assert table_lines(encoder_report.quality([row])) == 2 + len(variants_here() - {STOCK_BF16})


def test_retrieval_scores_are_those_of_a_ranking_by_hand():
    corpus = torch.eye(3)
    queries = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    ndcg, accuracy = quality.scores(corpus, queries, [{0}, {1}])
    assert accuracy == 50.0
    assert ndcg == pytest.approx(100 * (1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 2)


def test_a_word_has_the_glosses_of_all_its_synsets():
    corpus, words, relevant = quality.task(len(GLOSSES), 10**6, 1)
    assert sorted(corpus) == sorted({gloss.text for gloss in GLOSSES})
    of = dict(zip(words, relevant, strict=True))
    assert {corpus[k] for k in of["cat"]} == {gloss.text for gloss in GLOSSES if "cat" in gloss.words}


@pytest.mark.skipif(bool(gemm.why_missing()), reason="no compiled library")
def test_gemm_rows(monkeypatch):
    monkeypatch.setattr(gemm, "QUICK_SECONDS", 1e-3)
    monkeypatch.setattr(gemm, "SHAPES", ((32, 64), (64, 32)))
    rows = finished(gemm, gemm.run(Settings(threads=2, quick=True, rounds=2)))
    assert "encoder_gemm_float32_128_1" in rows and "encoder_gemm_float32_1024_2" in rows
    for row in rows.values():
        assert list(row["rates"]) == ["32 × 64", "64 × 32"]
        assert all(rate > 0 for rates in row["rates"].values() for rate in rates.values())
    assert encoder_report.gemm(list(rows.values())).count("\n") == 2 + len(rows)


def test_trust_rows():
    rows = finished(trust, trust.measure(SETTINGS))
    row = rows["encoder_trust_toy"]
    assert 0 < row["seconds"]["compared"] < row["seconds"]["examined"]
    assert 0 < row["shares"]["query"] < 1 and row["tokens"]["batch"] > row["tokens"]["query"] > 0
    assert table_lines(encoder_report.trust([row])) == 3
    trust.finish(judged := {**row, "model": "minilm"}, {})
    assert judged["targets"]["compared"]["got"] == row["seconds"]["compared"] * 1e6


def test_startup_rows():
    told = {**vars(SETTINGS), "extra": {"model": "toy", "started": 0.0, "sample": texts.KINDS["long"](4, 0)}}
    found = {}
    for variant in (STOCK, OURS):
        timing.switch(variant == OURS)
        sentfast.report(reset=True)
        found[variant] = startup.measure({**told, "extra": {**told["extra"], "variant": variant}})
    startup._same(found)
    rows = {"memory": startup._memory_row("toy", "long", found), "start": startup._start_row("toy", [found, found])}
    finished(startup, rows)
    assert rows["memory"]["bytes"][OURS]["peak"] >= rows["memory"]["bytes"][OURS]["loaded"] > 0
    assert rows["start"]["runs"] == {STOCK: 2, OURS: 2}
    assert set(rows["start"]["ratios"][OURS]) == set(startup.TIMES)
    assert all(judged["got"] > 0 for row in rows.values() for judged in row["targets"].values())
    assert "toy, long" in encoder_report.memory([rows["memory"]])
    assert encoder_report.start([rows["start"]]).count("\n") == 4


class Changed:
    """A model that encodes in another way where sentfast is on."""

    def __init__(self, model, encode):
        self.model, self.other = model, encode

    def encode(self, *arguments, **options):
        return (self.other if sentfast.is_enabled() else self.model.encode)(*arguments, **options)


def changed(how):
    """Variants of a model of which ours is that way, and the model."""
    model, _ = _toy()
    ours = Changed(model, lambda *arguments, **options: how(model, *arguments, **options))
    return model, {STOCK: study.Variant(model), OURS: study.Variant(ours, ours=True)}


def test_an_error_above_the_rule_is_a_miss_and_far_above_it_refused():
    model, variants = changed(lambda model, *arguments, **options: model.encode(*arguments, **options) + 2e-6)
    row = encode.measure_texts(model, variants, texts.KINDS["short"](4, 0), "short", SETTINGS)
    encode.finish(row := {**row, "model": "toy"}, LIMITS)
    assert row["targets"]["fp32 error"]["met"] is False and row["errors"][OURS] > row["errors"]["allowed"]
    model, variants = changed(lambda model, *arguments, **options: model.encode(*arguments, **options) + 1e-4)
    with pytest.raises(gate.Refused, match="sentfast: error .* against float64"):
        encode.measure_texts(model, variants, texts.KINDS["short"](4, 0), "short", SETTINGS)


def test_embeddings_of_another_model_are_refused():
    model, variants = changed(lambda model, *arguments, **options: model.encode(*arguments, **options).roll(1, -1))
    with pytest.raises(gate.Refused, match="mean cosine"):
        latency.measure_queries(model, variants, texts.queries(4, 0), SETTINGS)


def test_stock_is_not_called_sentfast():
    def stock(model, *arguments, **options):
        with sentfast.disabled():
            return model.encode(*arguments, **options)

    _, variants = changed(stock)
    with pytest.raises(gate.Refused, match=r"the encoder ran on \[\]"):
        study.checked(OURS, variants[OURS], ["a cat"], [BACKEND])


def test_a_child_hands_back_rows_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    head = "import json, pathlib, sys\ntold = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
    write = "pathlib.Path(sys.argv[2]).write_text(json.dumps({'row': told['models']}))\n"
    (tmp_path / "good.py").write_text(head + write)
    (tmp_path / "bad.py").write_text("raise SystemExit('the model is missing')\n")
    (tmp_path / "wrong.py").write_text(head + "pathlib.Path(sys.argv[2]).write_text(json.dumps({'refused': 'off'}))\n")
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    assert study.in_child("good", SETTINGS, 30) == {"row": ["toy"]}
    with pytest.raises(study.Failed, match="the model is missing"):
        study.in_child("bad", SETTINGS, 30)
    with pytest.raises(gate.Refused, match="wrong: off"):
        study.in_child("wrong", SETTINGS, 30)
    with pytest.raises(study.TooLong, match="not done after 0 s"):
        study.in_child("slow", SETTINGS, 0.2)


def test_a_child_without_openvino_is_tried_where_one_with_it_fails(monkeypatch):
    tried = []

    def child(module, settings, timeout, library=None):
        tried.append(library)
        if library:
            raise study.Failed("killed")
        return {"row": settings.extra["why_no_openvino"]}

    monkeypatch.setattr(study, "in_child", child)
    monkeypatch.setattr(encode, "PEERED", ("toy",))
    monkeypatch.setattr(openvino_peer, "library", lambda: Path("somewhere"))
    monkeypatch.setattr(openvino_peer, "converted", lambda name: Path("somewhere/model.xml"))
    rows = encode.run(Settings(models=("toy",)))
    assert tried == [Path("somewhere"), None] and "killed" in rows["row"]


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTFAST_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(texts, "_SYSTEM", tmp_path / "none")
    with pytest.raises(texts.Unavailable, match=r"install Debian's wordnet-base, or put data\.noun"):
        texts._wordnet()


def test_a_sample_forms_the_batches_of_the_whole_job():
    pool = ["x" * k for k in range(1, 1025)]
    sample = texts.batches_of_a_job(pool, 64, 3)
    lengths = sorted(map(len, sample))
    assert len(sample) == 64 and [len(x) for x in sample] != lengths
    # Each half is a run of neighbours in length: what stock pads is what it pads in the large job.
    assert all(half[-1] - half[0] == 31 for half in (lengths[:32], lengths[32:]))
    assert texts.batches_of_a_job(pool, 64, 3) == sample != texts.batches_of_a_job(pool, 64, 4)


def test_studies_are_selected_kept_and_rendered(tmp_path):
    assert [x.name for x in studies.select(["encoder_gemm", "encoder_memory"], False)] == [
        "encoder_gemm",
        "encoder_startup",
    ]
    encoder = studies.select(["encoder*"], False)
    assert (
        all(x.name.startswith("encoder") for x in encoder)
        and len(encoder) > len(studies.select(["encoder*"], True)) > 0
    )
    workloads, chosen = bench.select(["pool_mean"], False)
    assert len(workloads) == 1 and chosen == []
    path, described = tmp_path / "result.json", machine.describe(torch.device("cpu"), 1)
    judged = study.judged("fp32 at least 2 × faster", 2.0, 1.5, "×")
    row = {"study": "encoder_minilm", "table": "encoder_share", "title": "toy"}
    row.update(shares={"gemm": 0.75, "norm": 0.25}, of_peak={"gemm": 0.5})
    row.update(targets={"speed": judged}, ran={}, weights="real", **machine.commit())
    bench.write(path, described, LIMITS, {}, {"encoder_toy": row})
    bench.write(path, described, LIMITS, {"pool_mean": {"table": "pooling", "targets": {}, **machine.commit()}})
    written = json.loads(path.read_text())
    assert list(written["workloads"]) == ["pool_mean"] and list(written["studies"]) == ["encoder_toy"]
    assert "| toy | 75% (50%) | 25% |" in report.render_block("encoder_share", None, {"here": written})
    targets = report.targets_table(written, "targets")
    assert "| fp32 at least 2 × faster | 1.50 × | **no** |" in targets
    assert "Not measured yet" in report.render_block("encoder_latency", None, {"here": written})
