"""Numbers and tables as text, for the report."""

from __future__ import annotations


def duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{three_digits(seconds * factor)} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def three_digits(x: float) -> str:
    """Three significant digits, whole from 100 on."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def times(ratio: dict[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"**{three_digits(ratio['median'])}×** ({three_digits(ratio['q1'])}–{three_digits(ratio['q3'])})"


def rate(per_second: float | None, unit: str) -> str:
    return "not measured" if per_second is None else f"{three_digits(per_second / 1e9)} G{unit}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; columns without any content are left out."""
    used = [k for k in range(len(header)) if k == 0 or any(row[k] for row in rows)]
    lines = [[header[k] for k in used], ["---"] + ["---:"] * (len(used) - 1)]
    lines += [[row[k] for k in used] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
