"""Throughput of encode: a model on short and long texts, stock and sentfast and OpenVINO, fp32 and bf16.

All variants take turns in one process on the same texts, tokenisation included. Tokens are real ones: padding is not
counted, special tokens are, and what a model cuts off is not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gate
import openvino_peer
import study
import texts
import torch
from encode_models import MODELS, base_of, flops, token_counts
from study import OURS, OURS_BF16, STOCK, Settings, Variant, judged, switched
from timing import ratio, spread, turns

TABLE = "encoder"
OPENVINO, OPENVINO_BF16 = openvino_peer.PRECISIONS
PEERED = ("minilm", "mpnet")  # the models that OpenVINO is measured on
ORACLE_TEXTS = {"short": 32, "long": 4}
ROUNDINGS = 16  # err(sentfast) <= 2 * err(stock) + ROUNDINGS * eps, the rule of the tests
WRONG = 10  # so many times above that rule a result is wrong, not imprecise
SAME_TEXT = 0.99  # mean cosine to stock below which a variant does not compute the same model
LEAST_COSINE, MEAN_COSINE_BF16 = 1 - 1e-6, 0.9995

# (model, text) -> times faster than stock fp32 that sentfast fp32 and bf16 promise.
SPEEDUP = {
    ("minilm", "short"): (1.9, 3.5),
    ("minilm", "long"): (1.9, 3.5),
    ("mpnet", "short"): (1.7, 3.3),
    ("mpnet", "long"): (2.8, 5.0),
    ("xtremedistil", "short"): (3.0, None),
    ("xtremedistil", "long"): (3.0, None),
    ("tiny", "short"): (3.0, None),
    ("tiny", "long"): (3.0, None),
}
OVER_OPENVINO = 1.65
PEAK_FRACTION = {"fp32": 0.82, "bf16": 0.72}


def measure(settings: Settings) -> dict[str, Any]:
    """name -> row, for both kinds of text."""
    rows = {}
    for name in settings.models:
        model, weights = MODELS[name].build()
        variants, missing = study.variants_of(model)
        more, why_not = _openvino(model, settings)
        variants.update(more)
        for kind, draw in texts.KINDS.items():
            count = settings.extra.get("texts") or MODELS[name].texts[kind]
            row = measure_texts(model, variants, draw(count, settings.seed), kind, settings)
            row.update(model=name, weights=weights, missing={**missing, **why_not}, seed=settings.seed)
            row["title"] = f"{MODELS[name].title}, {kind}"
            row["openvino"] = openvino_peer.VERSION if more else ""
            rows[f"encoder_{name}_{kind}"] = row
    return rows


def _openvino(model: Any, settings: Settings) -> tuple[dict[str, Variant], dict[str, str]]:
    path, why_not = settings.extra.get("openvino"), settings.extra.get("why_no_openvino", "")
    if not path:
        return {}, dict.fromkeys(openvino_peer.PRECISIONS, why_not) if why_not else {}
    found = {}
    for name, precision in openvino_peer.PRECISIONS.items():
        replaced = openvino_peer.in_place_of(model, Path(path), precision, settings.threads)
        found[name] = Variant(replaced, dtype="bfloat16" if precision == "bf16" else "float32")
    return found, {}


def measure_texts(
    model: Any, variants: dict[str, Variant], sample: Sequence[str], kind: str, settings: Settings
) -> dict[str, Any]:
    """Checks every variant on these texts, then times it."""
    lengths = token_counts(model, sample)
    errors = _against_oracle(model, variants, sample[: ORACLE_TEXTS[kind]])
    outputs, ran, once = {}, {}, {}
    for name, variant in variants.items():
        start = time.perf_counter()
        outputs[name], found = study.checked(name, variant, sample, settings.backends)
        once[name] = time.perf_counter() - start
        if variant.ours:
            ran[name] = found
    cosine = {name: study.cosines(outputs[STOCK], found) for name, found in outputs.items() if name != STOCK}
    for name, found in cosine.items():
        if not found["mean"] >= SAME_TEXT:
            # A peer that computes something else is left out, not what is measured against it.
            wrong = gate.Refused if variants[name].ours else RuntimeError
            raise wrong(f"{name}: its embeddings have mean cosine {found['mean']:.4f} to stock")
    del outputs
    repeats = {name: max(1, round(settings.seconds / seconds)) for name, seconds in once.items()}
    samples = _time(variants, sample, repeats, settings.rounds)
    return {
        "table": TABLE,
        "kind": kind,
        "texts": len(sample),
        "tokens": sum(lengths),
        "rounds": settings.rounds,
        "repeats": repeats,
        "errors": errors,
        "cosine": cosine,
        "ran": ran,
        "dtypes": {name: variant.dtype for name, variant in variants.items()},
        "seconds": {name: spread(taken) for name, taken in samples.items()},
        "ratios": {name: ratio(samples[STOCK], taken) for name, taken in samples.items() if name != STOCK},
        "over_openvino": _over_openvino(samples),
        "flops": flops(base_of(model).config, lengths),
    }


def _over_openvino(samples: dict[str, list[float]]) -> dict[str, float] | None:
    if OPENVINO_BF16 not in samples or OURS_BF16 not in samples:
        return None
    return ratio(samples[OPENVINO_BF16], samples[OURS_BF16])


def _against_oracle(model: Any, variants: dict[str, Variant], sample: Sequence[str]) -> dict[str, float]:
    """Errors of stock and sentfast fp32 against float64, and what the rule of the tests allows."""
    with switched(False):
        exact = study.encode(Variant(copy.deepcopy(model).double()), sample)
    errors = {}
    for name in (STOCK, OURS):
        with switched(variants[name].ours):
            found = study.encode(variants[name], sample)
        errors[name] = gate.error(found, exact)
    allowed = errors["allowed"] = 2 * errors[STOCK] + ROUNDINGS * torch.finfo(found.dtype).eps
    if not errors[OURS] <= WRONG * allowed:
        raise gate.Refused(f"{OURS}: error {errors[OURS]:.3g} against float64, allowed is {allowed:.3g}")
    return errors


def _time(
    variants: dict[str, Variant], sample: Sequence[str], repeats: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Seconds to encode the sample, one for each variant and round."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _, name in turns(list(variants), rounds):
        with switched(variants[name].ours):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                study.encode(variants[name], sample)
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return taken


# ---- in the process of bench.py ------------------------------------------------------------------------------------


def run(settings: Settings, timeout: float = 420.0) -> dict[str, Any]:
    """Measures each model in a process of its own."""
    rows: dict[str, Any] = {}
    for name in settings.models:
        rows.update(_run_model(name, settings, timeout))
    return rows


def _run_model(name: str, settings: Settings, timeout: float) -> dict[str, Any]:
    one = {**vars(settings), "models": (name,)}
    library, extra = None, dict(settings.extra)
    if name in PEERED and not settings.quick:
        try:
            library = openvino_peer.library()
            extra["openvino"] = str(openvino_peer.converted(name))
        except texts.Unavailable as reason:
            library, extra["why_no_openvino"] = None, str(reason)
    try:
        return study.in_child("encode", Settings(**{**one, "extra": extra}), timeout, library)
    except study.Failed as reason:
        if library is None or isinstance(reason, study.TooLong):
            raise
        # Whether OpenVINO was to blame shows without it.
        extra = {**settings.extra, "why_no_openvino": f"not without failing: {reason}"}
        return study.in_child("encode", Settings(**{**one, "extra": extra}), timeout)


def finish(row: dict[str, Any], limits: dict[str, float | None]) -> None:
    """Adds what follows from the machine's limits, and the targets."""
    row["rates"] = {name: row["tokens"] / taken["median"] for name, taken in row["seconds"].items()}
    row["fractions"] = {}
    for name, taken in row["seconds"].items():
        peak = limits[f"peak_{row['dtypes'][name]}"]
        row["fractions"][name] = row["flops"] / taken["median"] / peak if peak else None
    row["targets"] = _targets(row)


def _targets(row: dict[str, Any]) -> dict[str, Any]:
    found = {}
    wanted = SPEEDUP.get((row["model"], row["kind"]), (None, None))
    for name, dtype, least in zip((OURS, OURS_BF16), ("fp32", "bf16"), wanted, strict=True):
        if least:
            got = row["ratios"].get(name, {}).get("median")
            words = f"{dtype} at least {least:g} × faster than sentence-transformers"
            found[f"{dtype} speed"] = judged(words, least, got, "×")
    if row["model"] in PEERED:
        for name, dtype in ((OURS, "fp32"), (OURS_BF16, "bf16")):
            least = PEAK_FRACTION[dtype]
            words = f"{dtype} at least {least:.0%} of the multiply-add peak"
            found[f"{dtype} peak"] = judged(words, least, row["fractions"].get(name), "%")
        got = (row["over_openvino"] or {}).get("median")
        words = f"bf16 at least {OVER_OPENVINO:g} × faster than OpenVINO's bf16"
        found["over OpenVINO"] = judged(words, OVER_OPENVINO, got, "×")
    errors = row["errors"]
    words = "fp32: error against float64, of what the tolerance rule allows (at most 1)"
    found["fp32 error"] = judged(words, 1.0, errors[OURS] / errors["allowed"], "×", at_most=True)
    least = row["cosine"][OURS]["min"]
    found["fp32 cosine"] = judged("fp32: every cosine to stock at least 1 - 1e-6", LEAST_COSINE, least, "cosine")
    mean = row["cosine"].get(OURS_BF16, {}).get("mean")
    words = f"bf16: mean cosine to stock at least {MEAN_COSINE_BF16}"
    found["bf16 cosine"] = judged(words, MEAN_COSINE_BF16, mean, "cosine")
    return found


if __name__ == "__main__":
    study.serve(measure)
