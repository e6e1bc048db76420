"""Renders benchmarks/results/*.json into the marked blocks of README.md and docs/*.md, and draws the plots.

python benchmarks/report.py [--check]

A block is everything between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; `<!-- table:NAME MACHINE -->` takes
one result file only. NAME is a table of the workloads (pooling, similarity, overhead, model) or of the encoder's
studies (encoder, encoder_latency, encoder_trust, encoder_gemm, encoder_memory, encoder_startup, encoder_quality,
encoder_share) or of those of training (training, training_memory, training_curve, loss), `search`, `summary` for a row
of each kind, `limits` for what the machine can do at most, or `targets` for what was promised and whether it was met.
--check writes nothing and fails if a block is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_report
import never_slower_report
import search
import search_drop_in
import summary
import training_report
from words import duration, markdown, rate, three_digits, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

OURS, STOCK, DROP_IN = "sentfast", "stock", "drop-in"
_BLOCK = re.compile(r"(^<!-- table:(\w+)(?: ([\w-]+))? -->\n)(.*?)(^<!-- /table:(\w+) -->$)", re.DOTALL | re.MULTILINE)
_OPENING = re.compile(r"^<!-- table:", re.MULTILINE)
_NOTHING = "Not measured yet.\n"
_STUDIES = {
    **encoder_report.TABLES,
    **training_report.TABLES,
    search.TABLE: search.table,
    search_drop_in.TABLE: search_drop_in.table,
}

Result = dict[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Result]:
    """File name without suffix -> content of every result file; JSON of other kinds in the folder is left out."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if "workloads" in content}


def documents(root: Path = ROOT) -> list[Path]:
    """The files that may hold blocks."""
    return [path for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))] if path.exists()]


# ---- tables --------------------------------------------------------------------------------------------------------


def _workload_rows(result: Result, table: str) -> list[Result]:
    return [row for row in result["workloads"].values() if row["table"] == table]


def _study_rows(result: Result, table: str) -> list[Result]:
    return [row for row in result.get("studies", {}).values() if row["table"] == table]


def _baselines(rows: list[Result]) -> list[str]:
    """Variants to compare with, in order of appearance, the stock one first."""
    names = dict.fromkeys(name for row in rows for name in row["ratios"] if name not in row["bounds"])
    return [STOCK, *(name for name in names if name not in (STOCK, DROP_IN))]


def _against(row: Result, baseline: str) -> str:
    if baseline not in row["ratios"]:
        return ""
    return f"{times(row['ratios'][baseline])}, {duration(row['seconds'][baseline]['median'])}"


def _drop_in(row: Result) -> str:
    if DROP_IN not in row["seconds"]:
        return ""
    return f"{three_digits(row['seconds'][STOCK]['median'] / row['seconds'][DROP_IN]['median'])}×"


def _limit(row: Result) -> str:
    if not row["limit"]:
        return ""
    stand_in = any(name.startswith("gemm") for name in row["limit"]["rates"])
    return f"{row['limit']['fraction']:.0%}" + (" of torch.mm" if stand_in else "")


def _memory(row: Result) -> str:
    extra = row.get("extra_memory")
    if not extra:
        return ""
    return f"{extra[OURS] / row['output_bytes']:.2f} (stock {extra[STOCK] / row['output_bytes']:.2f})"


def workload_table(result: Result, table: str) -> str:
    """Speed-ups are over the named baseline, with quartiles over the rounds."""
    rows = _workload_rows(result, table)
    names = _baselines(rows)
    over = [f"over {'sentence-transformers' if name == STOCK else name}" for name in names]
    header = ["", "sentfast", *over, "through the switch", "of the limit", "peak memory / output"]
    body = [
        [
            row["title"],
            duration(row["seconds"][OURS]["median"]),
            *(_against(row, name) for name in names),
            _drop_in(row),
            _limit(row),
            _memory(row),
        ]
        for row in rows
    ]
    return markdown(header, body)


def limits_table(result: Result, table: str) -> str:
    rows = [[limit["what"], rate(limit["rate"], limit["unit"])] for limit in result["limits"].values()]
    return markdown(["limit", "rate"], rows)


def _target_words(name: str, wanted: float) -> tuple[str, Callable[[float], str]]:
    if name == "limit":
        return f"at least {wanted:.0%} of the machine's limit", lambda got: f"{got:.0%}"
    if name == "microseconds":
        return f"at most {wanted:g} µs", lambda got: f"{three_digits(got)} µs"
    if name == "extra_memory":
        return f"peak memory at most {wanted:g} × the output", lambda got: f"{got:.2f} ×"
    if name == "read":
        return f"at least {wanted:.0%} of the rate of torch.sum over the same bytes", lambda got: f"{got:.0%}"
    if name == "picked rows":
        return f"at least {wanted:.0%} of the rate of index_select of the same rows", lambda got: f"{got:.0%}"
    baseline = "sentence-transformers" if name == STOCK else name
    return f"at least {wanted:g} × faster than {baseline}", lambda got: f"{three_digits(got)} ×"


def targets_table(result: Result, table: str) -> str:
    rows = []
    for row in result["workloads"].values():
        for name, judged in row["targets"].items():
            words, show = _target_words(name, judged["wanted"])
            got = "not measured" if judged["got"] is None else show(judged["got"])
            met = {True: "yes", False: "**no**", None: ""}[judged["met"]]
            rows.append([f"{row['table']}: {row['title']}", words, got, met])
    rows += encoder_report.targets(list(result.get("studies", {}).values()))
    return markdown(["", "target", "measured", "met"], rows)


def study_table(result: Result, table: str) -> str:
    return _STUDIES[table](_study_rows(result, table))


def caption(result: Result, rows: list[Result]) -> str:
    """What the figures were measured on and with."""
    found, versions = result["machine"], result["versions"]
    parts = [found["name"]]
    if found.get("isa") and found["isa"] != "none":
        parts.append(found["isa"])
    parts += [f"{name} {versions[name]}" for name in ("torch", "sentence-transformers") if name in versions]
    commits = sorted({row["commit"][:9] + (" with changes" if row["dirty"] else "") for row in rows})
    reports = [ran for row in rows for ran in row.get("ran", {}).values()]
    others = {backend for ran in reports for calls in ran["calls"].values() for backend in calls}
    backends = "backend " + ", ".join(sorted(others)) if others else ""
    peers = sorted({f"OpenVINO {row['openvino']}" for row in rows if row.get("openvino")})
    return "; ".join([*parts, *peers, *filter(None, [backends]), "commit " + ", ".join(commits)]) + ".\n"


def table_names(result: Result) -> set[str]:
    names = {row["table"] for row in _all_rows(result)} | {"limits", "targets"}
    return names | {summary.TABLE} if summary.rows(result) else names


def _all_rows(result: Result) -> list[Result]:
    return [*result["workloads"].values(), *result.get("studies", {}).values()]


_RENDER: dict[str, Callable[[Result, str], str]] = {
    "limits": limits_table,
    "targets": targets_table,
    summary.TABLE: lambda result, table: summary.table(result),
    **dict.fromkeys(_STUDIES, study_table),
}


def render_block(name: str, machine: str | None, results: dict[str, Result]) -> str:
    """The text between two markers."""
    if name == never_slower_report.TABLE:
        found = never_slower_report.load(RESULTS)
        return "\n" + "\n".join(map(never_slower_report.block, found.values())) + "\n" if found else _NOTHING
    if not results:
        return _NOTHING
    chosen = {machine: results[machine]} if machine in results else results if machine is None else {}
    if not chosen:
        raise ValueError(f"table {name}: expected one of the machines {sorted(results)}, got {machine!r}")
    known = set().union(*(table_names(result) for result in chosen.values()))
    if name not in known:
        if name in _STUDIES:
            return _NOTHING
        raise ValueError(f"table: expected one of {sorted(known)}, got {name!r}")
    render = _RENDER.get(name, workload_table)
    parts = []
    for result in chosen.values():
        if name in table_names(result):
            picked = summary.rows(result) if name == summary.TABLE else []
            rows = picked or _workload_rows(result, name) or _study_rows(result, name) or _all_rows(result)
            parts.append(f"{caption(result, rows)}\n{render(result, name)}")
    return "\n" + "\n".join(parts) + "\n"


def render_document(text: str, results: dict[str, Result]) -> str:
    """The text with every block rendered anew."""

    def replace(match: re.Match[str]) -> str:
        opening, name, machine, _, closing, closed = match.groups()
        if closed != name:
            raise ValueError(f"block {name}: expected <!-- /table:{name} -->, got <!-- /table:{closed} -->")
        return opening + render_block(name, machine, results) + closing

    rendered = _BLOCK.sub(replace, text)
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise ValueError("a block is not closed, or its marker is not `<!-- table:NAME -->` on a line of its own")
    return rendered


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot(name: str, result: Result, folder: Path = IMAGES) -> Path:
    """Speed-up over sentence-transformers and fraction of the machine's limit, every workload of a result file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Without these every drawing of the same numbers is a different file.
    plt.rcParams.update({"svg.hashsalt": "sentfast", "font.size": 9, "svg.fonttype": "none"})
    rows = list(result["workloads"].values())[::-1]
    labels = [f"{row['table']}: {row['title']}" for row in rows]
    speed = [row["ratios"][STOCK]["median"] for row in rows]
    fraction = [100 * row["limit"]["fraction"] if row["limit"] else 0.0 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.2 + 0.28 * len(rows)), sharey=True, layout="constrained")
    colors = ["#2a6f97" if x >= 1 else "#c1553b" for x in speed]
    for bar, x in zip(left.barh(labels, [x - 1 for x in speed], left=1, color=colors), speed, strict=True):
        left.annotate(
            f"{three_digits(x)}×",
            (x, bar.get_y() + bar.get_height() / 2),
            (4 if x >= 1 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if x >= 1 else "right",
        )
    left.set_xscale("log")
    left.set_xlim(min(0.5, min(speed) / 3), max(2.0, max(speed) * 3))
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("times faster than sentence-transformers")
    for bar, x in zip(right.barh(labels, fraction, color="#6a994e"), fraction, strict=True):
        if x:
            right.annotate(
                f"{x:.0f}%", (x, bar.get_y() + bar.get_height() / 2), (4, 0), textcoords="offset points", va="center"
            )
    right.set_xlim(0, max(115.0, *(x * 1.15 for x in fraction)))
    right.axvline(100, color="black", linewidth=0.8)
    right.set_title("percent of the machine's limit")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result["machine"]["name"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"benchmarks-{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a block is out of date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw this result file and do nothing else")
    options = parser.parse_args(arguments)
    if options.plot:
        print(f"drew {plot(options.plot.stem, json.loads(options.plot.read_text()))}")
        return 0
    results = load()
    stale = []
    for path in documents():
        text = path.read_text()
        rendered = render_document(text, results)
        if rendered != text:
            stale.append(path.relative_to(ROOT))
            if not options.check:
                path.write_text(rendered)
    if not options.check:
        for name, result in results.items():
            if not result["workloads"]:  # some studies alone were run there
                continue
            print(f"drew {plot(name, result).relative_to(ROOT)}")
    print(f"{'out of date' if options.check else 'rendered'}: {', '.join(map(str, stale)) or 'nothing'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
