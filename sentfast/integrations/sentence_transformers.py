"""Every attribute of sentence-transformers that is patched, in one table.

Methods are replaced on their class, so instances that exist already are reached and a subclass keeps its override.
Functions keep their identity and get another ``__code__``: sentence-transformers holds them as default arguments,
compares them by identity and pickles them by name, and each of those references has to be reached.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from sentfast import private
from sentfast.integrations import (
    evaluation,
    hidden_rows,
    layers,
    losses,
    mark,
    matryoshka,
    modules,
    originals,
    proofs,
    search,
    similarity,
    trampolines,
    workers,
)
from sentfast.integrations.guards import accelerated, accelerated_loop, ours, rewritten, with_original, within
from sentfast.integrations.versions import TESTED, Version, find, tested
from sentfast.report import fallback, warn
from sentfast.switch import Site

_SIMILARITY = "sentence_transformers.util.similarity"
_TENSOR = "sentence_transformers.util.tensor"
_RETRIEVAL = "sentence_transformers.util.retrieval"
_NEGATIVES = "sentence_transformers.util.hard_negatives"
_MERGED = "sentence_transformers.base.losses.merged_forward"


class Row(NamedTuple):
    """owner: a module for a function, module and class for a method. wrap: makes the replacement (``guards.py``).

    checked: what the original looks up is compared here; else the replacement sees to it.
    """

    owner: str
    attribute: str
    replacement: Callable
    wrap: Callable = accelerated
    checked: bool = True


def table(version: Version) -> tuple[Row, ...]:
    """What is patched. ``model.similarity`` and ``similarity_pairwise`` call the functions."""
    rows: tuple[Row, ...] = (
        Row(hidden_rows.forward_owner(version), "forward", hidden_rows.around_model, within),
        Row(f"{version.transformer}:Transformer", "forward", mark.around_forward, within),
        Row(f"{version.pooling}:Pooling", "forward", modules.pooling_forward),
        Row(f"{version.normalize}:Normalize", "forward", modules.normalize_forward),
        Row(_SIMILARITY, "cos_sim", similarity.cos_sim),
        Row(_SIMILARITY, "dot_score", similarity.dot_score),
        Row(_SIMILARITY, "pairwise_cos_sim", similarity.pairwise_cos_sim),
        Row(_SIMILARITY, "pairwise_dot_score", similarity.pairwise_dot_score),
        Row(_SIMILARITY, "pairwise_euclidean_sim", similarity.pairwise_euclidean_sim),
        Row(_SIMILARITY, "pairwise_manhattan_sim", similarity.pairwise_manhattan_sim),
        Row(_SIMILARITY, "pairwise_angle_sim", similarity.pairwise_angle_sim),
        Row(_TENSOR, "normalize_embeddings", similarity.normalize_embeddings),
        Row(version.worker.rpartition(".")[0], "start_multi_process_pool", workers.choices_noted, within),
    )
    rows += _losses(version) + _searches(version)
    return rows + (_loop(version) if version.inference else _encode(version))


def _losses(version: Version) -> tuple[Row, ...]:
    """The in-batch losses, and the one that calls them with prefixes of the embeddings."""
    rows = []
    for step in losses.steps(version):
        wrap = accelerated_loop if step.replacement is None else with_original
        replacement = step.replacement or step.with_prefixes
        rows.append(Row(f"{version.loss_module(step.loss)}:{step.loss}", step.method, replacement, wrap))
    module = version.loss_module("MatryoshkaLoss")
    rows.append(Row(f"{module}:MatryoshkaLoss", "forward", matryoshka.matryoshka_loss, with_original))
    rows.append(Row(f"{module}:CachedLossDecorator", "__call__", matryoshka.cached_matryoshka_loss, with_original))
    return tuple(rows)


def _searches(version: Version) -> tuple[Row, ...]:
    """Search and mining. ``paraphrase_mining`` and its evaluator call the function that takes embeddings."""
    rows = [
        Row(_RETRIEVAL, name, getattr(search, name), accelerated_loop)
        for name in ("semantic_search", "paraphrase_mining_embeddings", "community_detection")
    ]
    rows.append(Row(_NEGATIVES, "mine_hard_negatives", evaluation.search_through, rewritten))
    for name in version.evaluator_methods:
        owner = f"{version.evaluator}:InformationRetrievalEvaluator"
        rows.append(Row(owner, name, evaluation.retrieval_metrics, with_original))
    return tuple(rows)


def _encode(version: Version) -> tuple[Row, ...]:
    return (Row(f"{version.model}:SentenceTransformer", "encode", hidden_rows.around_encode, within),)


def _loop(version: Version) -> tuple[Row, ...]:
    """The loop of `encode`, which the versions before 6.2 do not have by itself."""
    from sentfast.integrations import encode

    owner = f"{version.model}:SentenceTransformer"
    return (
        Row(owner, "_inference", encode.loop, with_original, checked=False),
        Row(f"{version.multi_vector}:MultiVectorEncoder", "_inference", hidden_rows.around_encode, within),
        Row(owner, "encode", encode.batch_size_noted, within),
        Row(owner, "encode_query", encode.batch_size_noted, within),
        Row(owner, "encode_document", encode.batch_size_noted, within),
    )


def installed() -> str:
    return importlib.import_module("sentence_transformers").__version__


def resolve(text: str) -> Version | None:
    """The description of a version, ready to use; None if nothing is known of it."""
    version = find(text)
    if version is None:
        return None
    merged = importlib.import_module(_MERGED).embed_columns if version.first >= (6, 0) else None
    return replace(version, to_tensor=private.to_tensor(_TENSOR), embed_columns=merged)


def sites() -> Iterator[Site]:
    """The table as attributes to replace, for the installed version."""
    layers.forget_foreign()  # it holds what was put in their place the last time
    text = installed()
    version = resolve(text)
    if not tested(text):
        fallback("sentence_transformers", "SF111", f"{text}; tested are {TESTED}")
    if version is None:
        warn(
            f"sentence-transformers {text} is not known and not accelerated: it runs at stock speed. "
            f"Tested are {TESTED}; a newer sentfast may know it [SF111]"
        )
        return
    for row in table(version):
        site = _method(version, row) if ":" in row.owner else _function(version, row)
        if site is not None:
            yield site
    yield from _worker(version)


def _method(version: Version, row: Row) -> Site | None:
    module, _, cls = row.owner.partition(":")
    owner = getattr(importlib.import_module(module), cls)
    name = f"{cls}.{row.attribute}"
    original = vars(owner).get(row.attribute)
    if not isinstance(original, types.FunctionType) or original.__module__ != module:
        _foreign(name)
        return None
    if hasattr(original, "__wrapped__") and not ours(original) and not _decorated(original):
        _foreign(name)
        return None
    replacement = functools.partial(row.replacement, version)
    return Site(
        name,
        owner,
        row.attribute,
        lambda original: row.wrap(name, original, _checked(version, row, replacement, original, owner)),
    )


def _checked(version: Version, row: Row, attempt: Callable, original: Callable, *owners: type) -> Callable:
    """What runs around the original, or changes its arguments, needs no check: the original runs."""
    if not row.checked or row.wrap in (within, rewritten):
        return attempt
    name = ".".join([*(owner.__name__ for owner in owners), row.attribute])
    leading = (name, original) if row.wrap is with_original else ()
    prove = functools.partial(proofs.prove, name, version, original, functools.partial(attempt, *leading))
    inside = (*losses.MODULES, *matryoshka.decorators(version)) if proofs.key(name) else ()
    found = originals.Original([original], [*owners, *inside], prove, proofs.key(name))
    # A function of `util` is a copy, made whenever sentfast is switched on, for which nobody else asks. In the table of
    # weak keys it would stay for good, since what is noted of a function holds it.
    if owners:
        originals.note(original, found)
    return originals.as_long_as_same(found, attempt, len(leading))


def _decorated(function: types.FunctionType) -> bool:
    """The wrapper is one that sentence-transformers itself has put there, of its own or of PyTorch."""
    return function.__globals__["__name__"].partition(".")[0] in ("sentence_transformers", "torch")


def _worker(version: Version) -> Iterator[Site]:
    module, _, path = version.worker.partition(":")
    cls, _, attribute = path.partition(".")
    owner = getattr(importlib.import_module(module), cls)
    original = vars(owner).get(attribute)
    if isinstance(original, (classmethod, staticmethod)) and original.__func__.__module__ == module:
        yield Site(path, owner, attribute, workers.Worker)
    elif not isinstance(original, workers.Worker):
        _foreign(path)


def _function(version: Version, row: Row) -> Site | None:
    owner: Any = getattr(importlib.import_module(row.owner), row.attribute, None)
    known = isinstance(owner, types.FunctionType) and owner.__module__ == row.owner
    trampoline = trampolines.code_for(row.attribute, owner.__code__) if known else None
    if trampoline is None:
        _foreign(row.attribute)
        return None
    attempt = functools.partial(row.replacement, version)

    def build(code: types.CodeType) -> types.CodeType:
        original = types.FunctionType(code, owner.__globals__, owner.__name__, owner.__defaults__)
        functools.update_wrapper(original, owner)
        vars(original).pop("__wrapped__")
        replacement = row.wrap(row.attribute, original, _checked(version, row, attempt, original))
        return trampolines.put(row.attribute, trampoline, original, replacement)

    return Site(row.attribute, owner, "__code__", build)


def _foreign(name: str) -> None:
    fallback(name, "SF110")
    warn(f"{name} is not the one of sentence-transformers and is left as it is [SF110]")
