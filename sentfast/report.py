"""What ran where: counters of operator calls by backend, and of calls handed to the original code by reason."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from sentfast import locks

logger = logging.getLogger("sentfast")
logger.addHandler(logging.NullHandler())

_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_IMPORTS = ("<frozen importlib", os.path.dirname(os.path.abspath(importlib.__file__)) + os.sep)

_lock = locks.new()
_calls: dict[str, dict[str, int]] = {}
_fallbacks: dict[str, dict[str, int]] = {}  # by patched function, then by reason
_logged: set[tuple[str, str]] = set()
_warned: set[str] = set()
_ran_before_reset = False

# Reason codes are stable: they may be matched by programs, and docs/reasons.md explains each.
REASONS = {
    "SF101": "module without an operator",
    "SF102": "dtype without a kernel",
    "SF103": "device without a kernel",
    "SF104": "form of the attention mask or of cu_seq_lens_q",
    "SF105": "tensor layout (sparse or nested)",
    "SF106": "features computed by another module (token_weights_sum, cls_token_embeddings)",
    "SF107": "input of another type or shape than the operator takes",
    "SF108": "adapter, quantised or other custom layer in place of the plain one",
    "SF109": "this version of sentence-transformers defines the result or the gradient differently",
    "SF110": "method overridden by a subclass or replaced by other code",
    "SF111": "version of sentence-transformers outside the tested range",
    "SF112": "no compiled kernels for this device",
    "SF114": "sharded parameters (FSDP, DTensor) or a replica of nn.DataParallel",
    "SF115": "inside tracing, a torch.func transform, forward-mode differentiation or a mode that watches operators",
    "SF116": "autocast, which decides the dtype",
    "SF117": "nothing to gain",
    "SF118": "turned off for this model by sentfast.restore",
    "SF119": "model that runs outside PyTorch (ONNX, OpenVINO)",
    "SF120": "hooks on modules inside the encoder",
    "SF121": "attentions, hidden states or another form of the outputs asked for",
    "SF122": "dropout active in a part of the model",
    "SF123": "model type that the encoder does not cover",
    "SF124": "attention implementation other than eager or sdpa",
    "SF125": "configuration that the encoder does not cover",
    "SF126": "ids, positions or length outside the model's tables",
    "SF127": "torch.compile",
    "SF128": "scores that are NaN",
    "SF129": "our result differs from the original's on what they are tried with",
    "SF130": "rows that the attention mask hides are read, and see no token",
    "SF131": "kernels for this processor that are not known to be faster",
    "SF132": "too small a call to gain",
    "SF133": "a GPU older than the kernels are made for",
}


class SentfastWarning(UserWarning):
    """Something is not as the user will expect: no kernels, a version that is not patched, a setting without effect."""


def warn(message: str) -> None:
    """Shows a :class:`SentfastWarning`, each text once, at the line outside this package that led to it.

    Not through logging: the handlers of a plain script show nothing of ours.
    """
    with _lock:
        if message in _warned:
            return
        _warned.add(message)
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_FOLDER, *_IMPORTS)):
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        f"sentfast: {message}",
        SentfastWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        names.get("__name__", "__main__"),
        names.setdefault("__warningregistry__", {}),
    )


def counters(op: str, backends: tuple[str, ...]) -> dict[str, int]:
    """The counters of an operator, by backend; its caller adds to them.

    Without a lock, which would cost more than the rest of a call's bookkeeping: ``counters[backend] += 1`` holds no
    call between its read and its write, and CPython changes threads only at calls and jumps.
    """
    return _calls.setdefault(op, dict.fromkeys(backends, 0))


@contextmanager
def uncounted() -> Iterator[None]:
    """What the operators run inside the block is not counted."""
    before = {op: dict(table) for op, table in _calls.copy().items()}
    try:
        yield
    finally:
        for op, table in _calls.copy().items():
            table.update(before.get(op) or dict.fromkeys(table, 0))


def reasons(site: str) -> dict[str, int]:
    """The counters of a patched function, by reason; who adds to one that is there needs no lock, as above."""
    with _lock:
        return _fallbacks.setdefault(site, {})


def fallback(site: str, code: str, detail: str = "") -> None:
    """Counts one call handed to the original code; logs the first of its kind.

    The others are counted without a lock, as by who has :func:`reasons`.
    """
    table = _fallbacks.get(site)
    if table is not None and code in table:
        table[code] += 1
        return
    with _lock:
        table = _fallbacks.setdefault(site, {})
        table[code] = table.get(code, 0) + 1
        first = (site, code) not in _logged
        _logged.add((site, code))
    if first:
        detail = f" ({detail})" if detail else ""
        logger.info("%s runs the original code: %s%s [%s]", site, REASONS[code], detail, code)


class Report:
    """Snapshot of the counters.

    Attributes:
        calls: (operator, backend) -> calls.
        fallbacks: (patched function, reason code) -> calls that ran the original code.
    """

    def __init__(self, calls: dict[tuple[str, str], int], fallbacks: dict[tuple[str, str], int]):
        self.calls, self.fallbacks = calls, fallbacks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Report(calls={self.calls!r}, fallbacks={self.fallbacks!r})"

    def __str__(self) -> str:
        lines = [f"{op:32} {backend:10} {calls:>10,}" for (op, backend), calls in sorted(self.calls.items())]
        lines += [
            f"{site:32} {code:10} {calls:>10,}  original code: {REASONS[code]}"
            for (site, code), calls in sorted(self.fallbacks.items())
        ]
        return "\n".join(lines) or "nothing ran yet"

    def to_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """{"calls": {operator: {backend: n}}, "fallbacks": {function: {code: n}}}, ready for JSON."""
        nested: dict[str, dict[str, dict[str, int]]] = {"calls": {}, "fallbacks": {}}
        for name, table in (("calls", self.calls), ("fallbacks", self.fallbacks)):
            for (key, inner), n in table.items():
                nested[name].setdefault(key, {})[inner] = n
        return nested


def anything_ran() -> bool:
    """Whether an operator has run in this process."""
    return _ran_before_reset or any(any(table.values()) for table in list(_calls.values()))


def report(*, reset: bool = False) -> Report:
    """Counts of what ran where since the start or the last reset."""
    global _ran_before_reset
    if not isinstance(reset, bool):
        raise TypeError(f"reset: expected True or False, got {type(reset).__name__}")
    with _lock:
        calls = {(op, backend): n for op, table in _calls.copy().items() for backend, n in table.items() if n}
        snapshot = Report(calls, {(site, code): n for site, table in _fallbacks.items() for code, n in table.items()})
        if reset:
            _ran_before_reset = anything_ran()
            for table in list(_calls.values()):
                table.update(dict.fromkeys(table, 0))
            for table in _fallbacks.values():
                table.clear()
            _logged.clear()
            _warned.clear()
    return snapshot
