"""What runs in place of the in-batch losses' own code: ``contrastive_loss``, which never holds their score matrices.

Each function returns the loss, or the reason code why the original has to run; its parts then stay accelerated.
With `prefixes` it returns the weighted sum over prefixes of the embeddings (``matryoshka.py``).

The other losses need no replacement. CoSENT, AnglE, Triplet and MarginMSE call the ``pairwise_*`` functions, which are
replaced; CosineSimilarity, Contrastive and MSE are one pass over embeddings that the encoder has taken much longer to
make.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sentfast import functional, private, registry
from sentfast.integrations import guards, originals
from sentfast.integrations.versions import Version
from sentfast.ops.losses import LEAST_SCALE
from sentfast.reference import DIRECTIONS
from sentfast.report import fallback

_SIMILARITY = "sentence_transformers.util.similarity"
_SIMILARITIES: dict[str, Literal["cosine", "dot"]] = {
    "cos_sim": "cosine",
    "pytorch_cos_sim": "cosine",
    "dot_score": "dot",
}
# Two texts may be equal, and then equally near: a difference in the last digits is none.
_TIE = 4 * torch.finfo(torch.float32).eps
_MOST_SCALE = torch.finfo(torch.float32).max
_SYMMETRIC = ("query_to_doc", "doc_to_query")
# Of PyTorch, which losses call.
MODULES = (nn.CrossEntropyLoss, nn.CosineSimilarity)


class Prefixes(NamedTuple):
    """Lengths of the embeddings' prefixes and the weights of their losses."""

    dims: Sequence[int]
    dim_weights: Sequence[float]


class Step(NamedTuple):
    """A method of a loss, and what runs in its place: `with_prefixes` for several prefixes of the embeddings."""

    loss: str
    method: str
    with_prefixes: Callable
    replacement: Callable | None = None  # None: the same


def steps(version: Version) -> tuple[Step, ...]:
    """Of each in-batch loss the step that has embeddings already, where there is one."""
    found = [
        Step("MultipleNegativesRankingLoss", "compute_loss_from_embeddings", ranking_loss),
        Step("CachedMultipleNegativesRankingLoss", "calculate_loss", cached_ranking_loss),
        Step("CachedGISTEmbedLoss", "calculate_loss", cached_guided_loss),
    ]
    if version.guided_forward:
        found.append(Step("GISTEmbedLoss", "forward", guided_loss, guided_forward))
    if version.symmetric_class:
        name = "MultipleNegativesSymmetricRankingLoss"
        found.append(Step(name, "compute_loss_from_embeddings", symmetric_ranking_loss))
        found.append(Step(f"Cached{name}", "calculate_loss", cached_symmetric_ranking_loss))
    return tuple(found)


def ranking_loss(
    version: Version, loss: Any, embeddings: Any, labels: Any, prefixes: Prefixes | None = None
) -> Tensor | str:
    """MultipleNegativesRankingLoss, and since 5.3 the symmetric one."""
    return _ranking(version, loss, embeddings, getattr(loss, "directions", None), prefixes)


def symmetric_ranking_loss(
    version: Version, loss: Any, embeddings: Any, labels: Any, prefixes: Prefixes | None = None
) -> Tensor | str:
    """MultipleNegativesSymmetricRankingLoss where it is a class of its own."""
    return _ranking(version, loss, embeddings, _SYMMETRIC, prefixes)


def cached_ranking_loss(
    version: Version, loss: Any, reps: Any, *args: Any, prefixes: Prefixes | None = None, **kwargs: Any
) -> Tensor | str:
    value = _ranking(version, loss, _joined(reps), getattr(loss, "directions", None), prefixes)
    return _backward(value, args, kwargs)


def cached_symmetric_ranking_loss(
    version: Version, loss: Any, reps: Any, *args: Any, prefixes: Prefixes | None = None, **kwargs: Any
) -> Tensor | str:
    return _backward(_ranking(version, loss, _joined(reps), _SYMMETRIC, prefixes), args, kwargs)


def _joined(reps: Any) -> list[Tensor]:
    """The mini-batches of each column as one."""
    return [torch.cat(column) for column in reps]


def _backward(value: Tensor | str, args: tuple, kwargs: dict) -> Tensor | str:
    """The contract of ``calculate_loss(..., with_backward)``. Before 5.7 the flag may be positional."""
    if isinstance(value, str) or not kwargs.get("with_backward", any(value is True for value in args)):
        return value
    value.backward()
    return value.detach()


def _ranking(version: Version, loss: Any, columns: Any, directions: Any, prefixes: Prefixes | None) -> Tensor | str:
    similarity = _similarity(loss.similarity_fct)
    if not similarity:
        return "SF101"
    reason = _plain_cross_entropy(loss) or _columns(columns, prefixes) or _scale(loss.scale, columns[0])
    reason = reason or _known(directions)
    if reason:
        return reason
    queries, documents = columns[0], columns[1:]
    count, offset, everyone = len(queries), 0, None
    if loss.gather_across_devices:
        # Which columns are gathered, and in which order, is that of the original: the ranks have to agree.
        if directions is not None:
            everyone = _gather(queries)
        documents = [_gather(column) for column in documents]
        offset = _rank() * count
    if everyone is not None:
        queries = everyone[offset : offset + count]
    directions = DIRECTIONS[:1] if directions is None else tuple(directions)
    # Copies, as the original makes them: its callers may change the embeddings before the backward pass.
    value = functional.contrastive_loss(
        queries.clone(),
        torch.cat(documents),
        all_queries=everyone if {"query_to_query", "doc_to_query"} & set(directions) else None,
        offset=offset,
        positives=len(documents[0]),
        scale=loss.scale,
        similarity=similarity,
        directions=directions,
        partition_mode=_partition(loss, directions),
        hardness_mode=getattr(loss, "hardness_mode", None),
        hardness_strength=getattr(loss, "hardness_strength", 0.0),
        **_lengths(prefixes),
    )
    return value.to(_score_dtype(version, loss, queries))


def _known(directions: Any) -> str:
    """The original passes over a name that it does not know, and takes the first direction in any case."""
    known = directions is None or (DIRECTIONS[0] in directions and set(directions) <= set(DIRECTIONS))
    return "" if known else "SF107"


def _partition(loss: Any, directions: tuple) -> Literal["joint", "per_direction"]:
    return getattr(loss, "partition_mode", "per_direction" if directions == _SYMMETRIC else "joint")


def guided_forward(
    version: Version, name: str, original: Callable, loss: Any, sentence_features: Any, labels: Any
) -> Tensor | str:
    """GISTEmbedLoss, whose ``forward`` is one piece: from texts to loss."""
    reason = _guided_reason(version, loss) or _runs_on(loss.model)
    if reason:
        return reason
    columns = list(sentence_features)
    if len(columns) not in (2, 3):
        fallback(name, "SF107")
        return original(loss, columns, labels)
    embeddings, guided = _with_guide(version, loss, columns)
    reason = _columns(embeddings) or _columns(guided)
    if reason:
        fallback(name, reason)
        return _rest_of(original, loss, embeddings, guided, labels)
    return _guided(loss, embeddings, guided, None)


def _rest_of(original: Callable, loss: Any, embeddings: list, guided: list, labels: Any) -> Tensor:
    """What the original makes of embeddings; running model and guide again would draw other dropout."""
    twin = copy.copy(loss)
    vars(twin)["_modules"] = {name: x for name, x in loss._modules.items() if name not in ("model", "guide")}
    twin.must_retokenize = False
    twin.model = lambda features: {"sentence_embedding": features["embedding"]}
    twin.guide = lambda features: {"sentence_embedding": features["guided"]}
    columns = [{"embedding": x, "guided": y} for x, y in zip(embeddings, guided, strict=True)]
    return original(twin, columns, labels)


def guided_loss(
    version: Version, loss: Any, sentence_features: list, labels: Any, prefixes: Prefixes | None = None
) -> Tensor | str:
    """:func:`guided_forward` with prefixes."""
    reason = _guided_reason(version, loss) or _runs_on(loss.model)
    if reason or len(sentence_features) not in (2, 3):
        return reason or "SF107"
    embeddings, guided = _with_guide(version, loss, sentence_features)
    return _columns(embeddings, prefixes) or _columns(guided) or _guided(loss, embeddings, guided, prefixes)


def _with_guide(version: Version, loss: Any, sentence_features: list) -> tuple[list[Tensor], list[Tensor]]:
    # From 6.0 on the guide gets the features as they were; before, with what the model has written into them.
    guide_features = [dict(features) for features in sentence_features] if version.embed_columns else sentence_features
    embeddings = embed_columns(version, loss.model, sentence_features)
    with torch.no_grad():
        if loss.must_retokenize:
            guide_features = [_for_the_guide(loss, features) for features in sentence_features]
        return embeddings, embed_columns(version, loss.guide, guide_features)


def cached_guided_loss(
    version: Version,
    loss: Any,
    reps: Any,
    reps_guided: Any,
    *args: Any,
    prefixes: Prefixes | None = None,
    **kwargs: Any,
) -> Tensor | str:
    if len(reps) != len(reps_guided):
        return "SF107"
    columns, guided = _joined(reps), _joined(reps_guided)
    reason = _guided_reason(version, loss) or _columns(columns, prefixes) or _columns(guided)
    return _backward(reason or _guided(loss, columns, guided, prefixes), args, kwargs)


def _guided(loss: Any, columns: list[Tensor], guided: list[Tensor], prefixes: Prefixes | None) -> Tensor:
    anchors, *documents = columns
    guide_anchors, *guide_documents = guided
    offset = 0
    if loss.gather_across_devices:
        documents = [_gather(column) for column in documents]
        guide_documents = [_gather(column) for column in guide_documents]
        offset = _rank() * len(anchors)
    directions = ["query_to_doc"]
    directions += ["query_to_query"] if loss.contrast_anchors else []
    directions += ["doc_to_doc"] if loss.contrast_positives else []
    value = functional.contrastive_loss(
        anchors,
        torch.cat(documents),
        offset=offset,
        positives=len(documents[0]),
        scale=1 / loss.temperature,
        directions=directions,
        guide=(guide_anchors, torch.cat(guide_documents)),
        margin_strategy=loss.margin_strategy,
        margin=loss.margin - _TIE,
        **_lengths(prefixes),
    )
    # The original's cosines have the dtype of the embeddings.
    return value.to(_cross_entropy_dtype(anchors, anchors.dtype))


def embed_columns(version: Version, model: Any, sentence_features: list) -> list[Tensor]:
    """As the losses of this version do it."""
    if version.embed_columns is not None:
        return version.embed_columns(model, sentence_features)
    return [model(features)["sentence_embedding"] for features in sentence_features]


def _for_the_guide(loss: Any, features: Any) -> dict:
    """The texts of a batch once more, as the guide's own tokenizer reads them."""
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:
        flat, ends = ids[0].tolist(), features["cu_seq_lens_q"].tolist()
        ids = [flat[start:end] for start, end in itertools.pairwise(ends)]
    texts = loss.tokenizer.batch_decode(ids, skip_special_tokens=True)
    again = getattr(loss.guide, "preprocess", None) or loss.guide.tokenize
    device = loss.guide.device
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in again(texts).items()}


def _guided_reason(version: Version, loss: Any) -> str:
    function = loss.similarity_fct
    if type(function) is not nn.CosineSimilarity or (function.dim, function.eps) != (-1, 1e-8):
        return "SF101"
    if reason := _changed(function):
        return reason
    if "sim_matrix" in vars(loss) or type(loss).sim_matrix.__module__ != _module_of(version, loss):
        return "SF110"
    if not loss.temperature > 0:
        return "SF107"
    if not version.guide_as_reference and (loss.gather_across_devices or loss.margin_strategy == "relative"):
        return "SF109"
    return _plain_cross_entropy(loss)


def _module_of(version: Version, loss: Any) -> str:
    """The module of sentence-transformers that defines the loss, which may be a base of the loss's class."""
    known = {version.loss_module(name) for name in ("GISTEmbedLoss", "CachedGISTEmbedLoss")}
    return next(cls.__module__ for cls in type(loss).__mro__ if cls.__module__ in known)


def _runs_on(model: Any) -> str:
    """The reason that its embeddings would give, known before they are made."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return ""
    return guards.device(first.device.type) or ("" if first.dtype in registry.KERNEL_DTYPES else "SF102")


def _lengths(prefixes: Prefixes | None) -> dict[str, Any]:
    return {} if prefixes is None else prefixes._asdict()


def _columns(columns: Any, prefixes: Prefixes | None = None) -> str:
    """Two or more matrices of embeddings, all of one shape, dtype and device, and no shorter than the prefixes."""
    if len(columns) < 2:
        return "SF107"
    reason = next(filter(None, map(guards.tensor, columns)), "")
    if reason:
        return reason
    first = columns[0]
    if first.ndim != 2 or any(x.shape != first.shape for x in columns):
        return "SF107"
    if prefixes is not None and max(prefixes.dims) > first.shape[1]:
        return "SF107"
    if any(x.dtype != first.dtype for x in columns):
        return "SF102"
    return "SF103" if any(x.device != first.device for x in columns) else ""


def _similarity(function: Any) -> Literal["", "cosine", "dot"]:
    """Its name in our operator; "" for other functions than sentence-transformers' own."""
    module = importlib.import_module(_SIMILARITY)
    for name, ours in _SIMILARITIES.items():
        if function is getattr(module, name, None) and function is not None:
            return ours if originals.intact(function) else ""
    return ""


def _plain_cross_entropy(loss: Any) -> str:
    """The versions that call a module of PyTorch for it allow another one in its place."""
    function = getattr(loss, "cross_entropy_loss", None)
    if function is None:
        return ""
    plain = type(function) is nn.CrossEntropyLoss and function.weight is None
    settings = (function.reduction, function.label_smoothing, function.ignore_index) if plain else None
    return _changed(function) if settings == ("mean", 0.0, -100) else "SF101"


def _changed(module: nn.Module) -> str:
    """Somebody has put a function into this one module of PyTorch, or listens to it."""
    if not vars(module).keys().isdisjoint(("forward", "__call__")):
        return "SF110"
    listened = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return "SF120" if listened or private.any_global_hook() else ""


def _scale(scale: Any, queries: Tensor) -> str:
    """A positive number, or a parameter that is learned."""
    if isinstance(scale, Tensor):
        return "" if scale.ndim == 0 and scale.dtype.is_floating_point and scale.device == queries.device else "SF107"
    return "" if isinstance(scale, (int, float)) and LEAST_SCALE <= scale <= _MOST_SCALE else "SF107"


def _score_dtype(version: Version, loss: Any, x: Tensor) -> torch.dtype:
    """Of the original's loss, which is made of products: under autocast in its dtype until something needs float32."""
    if hasattr(loss, "cross_entropy_loss"):
        return _cross_entropy_dtype(x, torch.float32 if version.scores_float32 else x.dtype)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.float32 if device == "cuda" else torch.get_autocast_dtype(device)  # logsumexp
    return torch.float32 if version.scores_float32 else x.dtype


def _cross_entropy_dtype(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else otherwise


def _gather(x: Tensor) -> Tensor:
    """Of all ranks; the gradient comes back to the rank that it belongs to."""
    return importlib.import_module("sentence_transformers.util.distributed").all_gather_with_grad(x)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
