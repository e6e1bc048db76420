"""What differs between the versions of sentence-transformers: where classes live and what their results are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

TESTED = "5.1 up to, not including, 6.3"


def _unresolved(x: Any) -> Any:
    raise RuntimeError("the version is not resolved yet")


@dataclass(frozen=True)
class Version:
    """One range of versions with the same behaviour, as far as the patched functions go.

    Attributes:
        first: the first version of the range.
        pooling, normalize, transformer: module of the class.
        model: module of the class SentenceTransformer.
        multi_vector: module of the class MultiVectorEncoder, where its loop is known.
        worker: module, class and name of the method that a process of a multi-process pool runs.
        inference: `encode` hands texts and resolved arguments to `_inference`.
        mode_flags: the pooling modes are one bool attribute each, with a fixed order.
        scores_float32: half embeddings give float32 scores, else scores in their dtype.
        prompt_as_reference: prompt exclusion is as our operator defines it; the older ones also rewrite the mask.
        first_column: modes whose result agrees with our operator's only if every row's first column is in use.
        normalizes_dimension_1: normalisation goes along dimension 1 instead of the last.
        euclidean_zero_gradient: the gradient of the pairwise Euclidean similarity is 0 at distance 0, else NaN.
        losses: package of the losses; `loss_module` gives the module of one.
        symmetric_class: the symmetric losses have code of their own.
        guided_forward: `forward` of GISTEmbedLoss is known, and does what ours does.
        guide_as_reference: with gathered documents or a relative margin, the guide leaves out what our operator does.
        angle_is_cosine_and_sine: the pairwise angle similarity is made of unit vectors: 0 for zero vectors, not NaN.
        pairs_once: paraphrase mining keeps each pair once, and a community belongs to its centre.
        evaluator: module of InformationRetrievalEvaluator; `evaluator_methods` compute its metrics.
        to_tensor: sentence-transformers' own conversion of lists and arrays.
        embed_columns: its own function that embeds several columns at once, where there is one.
    """

    first: tuple[int, int]
    pooling: str
    normalize: str
    transformer: str
    model: str
    worker: str
    losses: str = "sentence_transformers.sentence_transformer.losses."
    inference: bool = False
    multi_vector: str = ""
    mode_flags: bool = False
    scores_float32: bool = True
    prompt_as_reference: bool = False
    first_column: tuple[str, ...] = ()
    normalizes_dimension_1: bool = True
    euclidean_zero_gradient: bool = False
    angle_is_cosine_and_sine: bool = False
    symmetric_class: bool = False
    guided_forward: bool = True
    guide_as_reference: bool = True
    pairs_once: bool = False
    evaluator: str = "sentence_transformers.sentence_transformer.evaluation.information_retrieval"
    evaluator_methods: tuple[str, ...] = ("compute_all_metrics", "compute_metrices")
    to_tensor: Callable[[Any], Any] = _unresolved
    embed_columns: Callable[[Any, Any], Any] | None = None

    def loss_module(self, name: str) -> str:
        """The module that defines the loss of this name."""
        return self.losses + (name if self.losses == _OLD_LOSSES else _LOSS_FILES[name])


_OLD_LOSSES = "sentence_transformers.losses."
_LOSS_FILES = {
    "MultipleNegativesRankingLoss": "multiple_negatives_ranking",
    "CachedMultipleNegativesRankingLoss": "cached_multiple_negatives_ranking",
    "GISTEmbedLoss": "gist_embed",
    "CachedGISTEmbedLoss": "cached_gist_embed",
    "MatryoshkaLoss": "matryoshka",
}
_MODELS = "sentence_transformers.models."
_MODULES = "sentence_transformers.sentence_transformer.modules."
_BASE_MODULES = "sentence_transformers.base.modules."
_MODEL = "sentence_transformers.sentence_transformer.model"
_OLD_MODEL = "sentence_transformers.SentenceTransformer"

# `max` fills with -1e9 instead of -inf, which shows where a row has no token in use.
_OLD = Version(
    first=(5, 0),
    pooling=_MODELS + "Pooling",
    normalize=_MODELS + "Normalize",
    transformer=_MODELS + "Transformer",
    model=_OLD_MODEL,
    worker=f"{_OLD_MODEL}:SentenceTransformer._encode_multi_process_worker",
    losses=_OLD_LOSSES,
    evaluator="sentence_transformers.evaluation.InformationRetrievalEvaluator",
    evaluator_methods=("compute_metrices",),
    symmetric_class=True,
    mode_flags=True,
    scores_float32=False,
    guide_as_reference=False,
    first_column=("cls", "max", "weightedmean"),
)

# Newest first. Left padding: up to 5.6 `cls` is the first column; up to 6.1 `weightedmean` counts absolute columns.
VERSIONS = (
    Version(
        first=(6, 2),
        pooling=_MODULES + "pooling",
        normalize=_BASE_MODULES + "normalize",
        transformer=_BASE_MODULES + "transformer",
        model=_MODEL,
        worker="sentence_transformers.base.model:BaseModel._multi_process_worker",
        inference=True,
        multi_vector="sentence_transformers.multi_vector_encoder.model",
        prompt_as_reference=True,
        normalizes_dimension_1=False,
        euclidean_zero_gradient=True,
        angle_is_cosine_and_sine=True,
        pairs_once=True,
    ),
    Version(
        first=(6, 0),
        pooling=_MODULES + "pooling",
        normalize=_BASE_MODULES + "normalize",
        transformer=_BASE_MODULES + "transformer",
        model=_MODEL,
        worker=f"{_MODEL}:SentenceTransformer._multi_process_worker",
        first_column=("weightedmean",),
    ),
    Version(
        first=(5, 4),
        pooling=_MODULES + "pooling",
        normalize=_MODULES + "normalize",
        transformer=_BASE_MODULES + "transformer",
        model=_MODEL,
        worker=f"{_MODEL}:SentenceTransformer._multi_process_worker",
        scores_float32=False,
        first_column=("cls", "weightedmean"),
        guided_forward=False,
        guide_as_reference=False,
    ),
    replace(_OLD, first=(5, 3), symmetric_class=False),
    _OLD,
)


def number(version: str) -> tuple[int, int]:
    """(major, minor) of a version string; (0, 0) if it has another form."""
    parts = version.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return 0, 0
    return int(parts[0]), int(parts[1])


def tested(version: str) -> bool:
    return (5, 1) <= number(version) < (6, 3)


def find(version: str) -> Version | None:
    """The description that fits; None for a major version of which nothing is known."""
    found = number(version)
    if found[0] not in (5, 6):
        return None
    return next(description for description in VERSIONS if found >= description.first)
