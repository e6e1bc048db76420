"""What ran where: counters of operator calls by backend, and of calls handed to the original code by reason."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger("sentfast")
logger.addHandler(logging.NullHandler())

_lock = threading.Lock()
_calls: dict[str, dict[str, int]] = {}
_fallbacks: Counter[tuple[str, str]] = Counter()
_logged: set[tuple[str, str]] = set()

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
    "SF115": "inside torch.jit tracing, a torch.func transform or forward-mode differentiation",
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
}


def counters(op: str, backends: tuple[str, ...]) -> dict[str, int]:
    """The counters of an operator, by backend; its caller adds to them.

    Without a lock, which would cost more than the rest of a call's bookkeeping: ``counters[backend] += 1`` holds no
    call between its read and its write, and CPython changes threads only at calls and jumps.
    """
    return _calls.setdefault(op, dict.fromkeys(backends, 0))


def fallback(site: str, code: str, detail: str = "") -> None:
    """Counts one call handed to the original code; logs the first of its kind."""
    with _lock:
        _fallbacks[site, code] += 1
        first = (site, code) not in _logged
        _logged.add((site, code))
    if first:
        detail = f" ({detail})" if detail else ""
        logger.info("%s runs the original code: %s%s [%s]", site, REASONS[code], detail, code)


@dataclass(frozen=True)
class Report:
    """Snapshot of the counters.

    Attributes:
        calls: (operator, backend) -> calls.
        fallbacks: (patched function, reason code) -> calls that ran the original code.
    """

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)

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


def report(*, reset: bool = False) -> Report:
    """Counts of what ran where since the start or the last reset."""
    with _lock:
        calls = {(op, backend): n for op, table in _calls.items() for backend, n in table.items() if n}
        snapshot = Report(calls, dict(_fallbacks))
        if reset:
            for table in _calls.values():
                table.update(dict.fromkeys(table, 0))
            _fallbacks.clear()
            _logged.clear()
    return snapshot
