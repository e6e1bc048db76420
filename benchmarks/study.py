"""What the encoder's studies share: variants of a model, their checks, targets, and processes of their own.

A study is a family of rows that one process measures; it is a module of this folder with a `main` that reads its
settings as JSON and writes its rows as JSON, so that a crash, or memory that one model left behind, harms no other row.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS, STOCK = "sentfast", "stock"
OURS_BF16, STOCK_BF16 = "sentfast bf16", "stock bf16"
FOLDER = Path(__file__).resolve().parent


class Failed(Exception):
    """The process of a study ended without rows."""


class TooLong(Failed):
    """It was stopped: its time was over."""


@dataclass(frozen=True)
class Settings:
    """What a study is told.

    Attributes:
        threads: of every variant.
        backends: that the encoder may run on where a variant is called sentfast.
        seed: of the sample of texts.
        quick: small samples, few rounds.
        models: names in encode_models.MODELS; a test puts tiny ones there.
        seconds: a timed sample is repeated until it is at least so long.
        rounds: samples of each variant.
        extra: what one study tells its own process; `texts` overrides the size of every sample, `backend` forces one.
    """

    threads: int = 1
    backends: tuple[str, ...] = ("cpu",)
    seed: int = 0
    quick: bool = False
    models: tuple[str, ...] = ()
    seconds: float = 1.0
    rounds: int = 3
    extra: dict[str, Any] = field(default_factory=dict)


def in_child(module: str, settings: Settings, timeout: float, path: Path | None = None) -> dict[str, Any]:
    """The rows that `module` measures in a process of its own.

    path: a folder that only that process has on its path.

    Raises:
        Failed: it crashed, or took longer than `timeout` seconds.
        gate.Refused: an output is wrong.
    """
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if "backend" in settings.extra:
        environment["SENTFAST_BACKEND"] = settings.extra["backend"]
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(path)]))
    with tempfile.TemporaryDirectory() as name:
        told, rows = Path(name) / "settings.json", Path(name) / "rows.json"
        told.write_text(json.dumps(asdict(settings)))
        command = [sys.executable, str(FOLDER / f"{module}.py"), str(told), str(rows)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise TooLong(f"{module}: not done after {timeout:.0f} s") from error
        if done.returncode or not rows.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise Failed(f"{module}: exit {done.returncode}: {' / '.join(lines[-3:])}")
        found = json.loads(rows.read_text())
    if "refused" in found:
        from gate import Refused

        raise Refused(f"{module}: {found['refused']}")
    return found


def serve(measure: Callable[[Settings], dict[str, Any]]) -> None:
    """The main program of a study: SETTINGS.json ROWS.json."""
    from gate import Refused

    told = json.loads(Path(sys.argv[1]).read_text())
    told["models"], told["backends"] = tuple(told["models"]), tuple(told["backends"])
    settings = Settings(**told)
    torch.set_num_threads(settings.threads)
    try:
        rows = measure(settings)
    except Refused as reason:
        rows = {"refused": str(reason)}
    Path(sys.argv[2]).write_text(json.dumps(rows))


# ---- variants ----------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to encode.

    Attributes:
        model: something with an `encode`.
        ours: runs with sentfast switched on; the others run with it off and every attribute restored.
        dtype: whose multiply-add peak it is held against.
    """

    model: Any
    ours: bool = False
    dtype: str = "float32"


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """sentfast on or off in this process."""
    import sentfast

    (sentfast.enable if on else sentfast.disable)()
    try:
        yield
    finally:
        sentfast.disable()


def encode(variant: Variant, texts: Sequence[str] | str) -> Tensor:
    """The embeddings by one variant; the caller has switched sentfast."""
    return variant.model.encode(texts, convert_to_tensor=True, show_progress_bar=False)


def why_no_bf16() -> str:
    """Why sentfast computes nothing in bf16 here; empty if it does."""
    from sentfast import native

    if not native.cpu_loaded():
        return native.why_no_cpu()
    isa = native.cpu_isa()
    return "" if isa == "avx512_bf16" else f"no bf16 instructions ({isa})"


def variants_of(model: Any, stock_bf16: bool = True) -> tuple[dict[str, Variant], dict[str, str]]:
    """Stock and sentfast in fp32 (one model) and in bf16 (a copy each), and why one is missing."""
    from encode_models import Plain, base_of

    import sentfast

    found = {STOCK: Variant(model), OURS: Variant(model, ours=True)}
    missing = {}
    if isinstance(model, Plain):
        # Nothing of sentence-transformers is there to patch: the user asks for it.
        found[OURS] = Variant(copy.deepcopy(model), ours=True)
        sentfast.accelerate(base_of(found[OURS].model))
    if stock_bf16:
        found[STOCK_BF16] = Variant(copy.deepcopy(model).to(torch.bfloat16), dtype="bfloat16")
    reason = why_no_bf16()
    if reason:
        missing[OURS_BF16] = reason
    else:
        half = copy.deepcopy(model)
        sentfast.accelerate(base_of(half) if isinstance(model, Plain) else half, precision="bf16")
        found[OURS_BF16] = Variant(half, ours=True, dtype="bfloat16")
    return found, missing


# ---- checks ------------------------------------------------------------------------------------------------------


def checked(name: str, variant: Variant, texts: Sequence[str], backends: Sequence[str]) -> tuple[Tensor, Any]:
    """Embeddings and what ran; refuses a variant called sentfast whose encoder ran elsewhere than on `backends`."""
    from gate import Refused

    from sentfast.report import report

    with switched(variant.ours):
        report(reset=True)
        found = encode(variant, texts)
        ran = report(reset=True)
    if variant.ours:
        used = {backend for op, backend in ran.calls if op == "encoder"}
        if not used or not used <= set(backends):
            handed = sorted(f"{site} {code}" for site, code in ran.fallbacks)
            raise Refused(f"{name}: the encoder ran on {sorted(used)}, wanted {sorted(backends)}; original: {handed}")
    return found, ran.to_dict()


def cosines(stock: Tensor, other: Tensor) -> dict[str, float]:
    """Least and mean cosine over the texts, in float64. A NaN stays one."""
    found = torch.nn.functional.cosine_similarity(stock.double(), other.double(), dim=-1)
    return {"min": found.min().item(), "mean": found.mean().item()}


# ---- targets -----------------------------------------------------------------------------------------------------


def judged(words: str, wanted: float, got: float | None, unit: str, at_most: bool = False) -> dict[str, Any]:
    """A target of a row: what is wanted in words and as a number, what was measured (None: it could not be)."""
    met = None if got is None else bool(got <= wanted if at_most else got >= wanted)
    return {"words": words, "wanted": wanted, "got": got, "unit": unit, "met": met}
