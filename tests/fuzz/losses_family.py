"""The losses over drawn pipelines: value, gradients, random numbers, and features that are used more than once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pipelines
import torch
from compare import Sized
from draw import Draw, Raised
from models_family import of_parameters
from sentence_transformers import losses, util
from sentence_transformers.util.similarity import euclidean_sim

DISTANCES = tuple(getattr(losses.TripletDistanceMetric, name) for name in ("COSINE", "EUCLIDEAN", "MANHATTAN"))
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def case(draw: Draw) -> dict[str, Any]:
    model = pipelines.sentence_transformer(draw)
    made = draw.attempt(loss_of, draw, model)
    if isinstance(made, Raised):
        return {"made": made}
    loss, columns, labels = made
    draw.coarse |= any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    draw.real(loss)
    loss.train(not draw.chance("evaluation mode", 0.3))
    rows = draw.one_of("batch", (4, 1, 2, 3, 9, 20))
    # Which of equal distances is the larger is left to rounding.
    same = draw.chance("equal texts", 0.2) and not isinstance(loss, losses.OnlineContrastiveLoss)
    texts = [pipelines.texts(draw, f"column {i}", rows) for i in range(columns)]
    texts = [[column[0]] * rows for column in texts] if same else texts
    features = [model.preprocess(column) for column in texts]
    seen: dict[str, Any] = {}
    for turn in range(draw.integer("steps", 1, 2)):
        model.zero_grad()
        again = features if draw.chance("features used again", 0.3) else fresh(features)
        seen[f"step {turn}"] = step(draw, loss, model, again, labels(rows), scale_of(loss), cancels=same)
        seen[f"keys {turn}"] = [list(each) for each in again]
    seen["without gradient"] = without_gradient(draw, loss, features, labels(rows))
    seen["modes"] = [module.training for module in loss.modules()]
    return seen


def fresh(features: list[Any]) -> list[Any]:
    """The same features as they were made, without what a model has put into them."""
    kept = ("input_ids", "attention_mask", "token_type_ids", "modality")
    return [{name: copy.copy(value) for name, value in each.items() if name in kept} for each in features]


def step(draw: Draw, loss: Any, model: Any, features: Any, labels: Any, large: float, cancels: bool) -> Any:
    # PyTorch's own autocast refuses to mix bfloat16 with float16.
    half = any(p.dtype == torch.float16 for p in model.parameters())
    cast = draw.chance("autocast", 0.08) and not half
    draw.coarse |= cast
    with torch.autocast("cpu", torch.bfloat16, enabled=cast and not draw.exact):
        value = draw.attempt(loss, features, labels)
    if isinstance(value, Raised):
        return value
    values = value if isinstance(value, dict) else {"loss": value}
    total = sum(values.values())
    error = draw.attempt(total.backward)
    seen = {"keys": list(values), "value": Sized(total.detach(), large)}
    seen["scalars"] = [(list(x.shape), draw.exact or str(x.dtype), x.requires_grad) for x in values.values()]
    seen["gradients"] = error if isinstance(error, Raised) else loose(of_parameters(model), large, cancels)
    return seen


def loose(found: dict[str, Any], large: float, cancels: bool) -> dict[str, Any]:
    """A softmax of scores as large as `large` multiplies their roundings; of equal texts the gradients cancel.

    Other texts may have equal embeddings too: of the first token of a model that looks back alone, or where an
    activation saturates.
    """
    if "values" in found:
        size = found["values"].size
        size = max(size, 1.0 if cancels or size < 1e-6 else 0.01)
        found["values"].size = size * max(1.0, large)
    return found


def without_gradient(draw: Draw, loss: Any, features: Any, labels: Any) -> Any:
    if not draw.chance("without gradient", 0.3):
        return None
    with torch.no_grad():
        value = draw.attempt(loss, fresh(features), labels)
    return Sized(value, scale_of(loss)) if isinstance(value, torch.Tensor) else value


def scale_of(loss: Any) -> float:
    inner = getattr(loss, "loss", loss)
    if isinstance(inner, (losses.BatchAllTripletLoss, losses.BatchHardTripletLoss)):
        # Their distance of two equal rows is the root of what rounding leaves of |x|^2 - 2xy + |y|^2, or of 0.
        return torch.finfo(torch.float32).eps ** -0.5
    return max(1.0, float(getattr(inner, "scale", 0) or 1 / getattr(inner, "temperature", 1.0)))


# The losses: each maker gives the loss, how many columns of texts it takes, and its labels


def no_labels(rows: int) -> None:
    return None


def floats(draw: Draw) -> Callable[[int], torch.Tensor]:
    return lambda rows: draw.real((torch.arange(rows) % 5) / 5)


def binary(draw: Draw) -> Callable[[int], torch.Tensor]:
    return lambda rows: torch.arange(rows) % 2


def ranking_options(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": draw.one_of("scale", (20.0, 1.0, 100.0))}
    functions = (util.cos_sim, util.dot_score, euclidean_sim, lambda a, b: a @ b.T / 3)
    options["similarity_fct"] = draw.one_of("similarity_fct", functions, p=0.3)
    return options


def mnrl_options(draw: Draw) -> dict[str, Any]:
    options = ranking_options(draw)
    if draw.chance("directions", 0.4):
        options["directions"] = ("query_to_doc", *draw.some_of("which directions", DIRECTIONS[1:], 0.5))
        options["partition_mode"] = draw.one_of("partition_mode", ("joint", "per_direction"))
    if draw.chance("hardness", 0.25):
        options["hardness_mode"] = draw.one_of("mode", ("in_batch_negatives", "hard_negatives", "all_negatives"))
        options["hardness_strength"] = draw.one_of("strength", (0.5, 5.0))
    return options


def gist_options(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": draw.one_of("temperature", (0.05, 0.01, 1.0))}
    options["margin_strategy"] = draw.one_of("margin_strategy", ("absolute", "relative"))
    options["margin"] = draw.one_of("margin", (0.0, 0.05, -0.1))
    options["contrast_anchors"] = not draw.chance("no anchors", 0.3)
    options["contrast_positives"] = not draw.chance("no positives", 0.3)
    return options


def guide_of(draw: Draw, model: Any) -> Any:
    kind = draw.one_of("guide", ("another", "the model itself", "a copy"), p=0.4)
    if kind == "the model itself":
        return model
    other = copy.deepcopy(model)
    return other if kind == "a copy" else draw.weights(other, "weights of the guide")


def mini_batch(draw: Draw) -> int:
    return draw.one_of("mini-batch", (32, 1, 2, 3))


def plain_loss(draw: Draw, model: Any) -> tuple[Any, int, Any]:
    columns = draw.one_of("columns", (2, 3, 4))
    makers: dict[str, Callable[[], tuple[Any, int, Any]]] = {
        "MNRL": lambda: (losses.MultipleNegativesRankingLoss(model, **mnrl_options(draw)), columns, no_labels),
        "cached MNRL": lambda: (
            losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch(draw), **mnrl_options(draw)),
            columns,
            no_labels,
        ),
        "symmetric": lambda: (
            losses.MultipleNegativesSymmetricRankingLoss(model, **ranking_options(draw)),
            columns,
            no_labels,
        ),
        "cached symmetric": lambda: (
            losses.CachedMultipleNegativesSymmetricRankingLoss(
                model, mini_batch_size=mini_batch(draw), **ranking_options(draw)
            ),
            columns,
            no_labels,
        ),
        "GIST": lambda: (losses.GISTEmbedLoss(model, guide_of(draw, model), **gist_options(draw)), columns, no_labels),
        "cached GIST": lambda: (
            losses.CachedGISTEmbedLoss(
                model, guide_of(draw, model), mini_batch_size=mini_batch(draw), **gist_options(draw)
            ),
            columns,
            no_labels,
        ),
        "CoSENT": lambda: (losses.CoSENTLoss(model), 2, floats(draw)),
        "AnglE": lambda: (losses.AnglELoss(model), 2, floats(draw)),
        "triplet": lambda: (
            losses.TripletLoss(model, draw.one_of("distance", DISTANCES)),
            3,
            no_labels,
        ),
        "cosine": lambda: (losses.CosineSimilarityLoss(model), 2, floats(draw)),
        "contrastive": lambda: (losses.ContrastiveLoss(model), 2, binary(draw)),
        "online contrastive": lambda: (losses.OnlineContrastiveLoss(model), 2, binary(draw)),
        "margin MSE": lambda: (losses.MarginMSELoss(model), 3, floats(draw)),
        "batch all": lambda: (losses.BatchAllTripletLoss(model), 1, binary(draw)),
        "batch hard": lambda: (losses.BatchHardTripletLoss(model), 1, binary(draw)),
        "orthogonal": lambda: (losses.GlobalOrthogonalRegularizationLoss(model), columns, no_labels),
        "mega batch": lambda: (losses.MegaBatchMarginLoss(model), 2, no_labels),
    }
    return makers[draw.one_of("loss", tuple(makers))]()


def loss_of(draw: Draw, model: Any) -> tuple[Any, int, Any]:
    loss, columns, labels = plain_loss(draw, model)
    if draw.chance("Matryoshka", 0.25):
        width = model.get_embedding_dimension() or 8
        dims = sorted({width, max(1, width // 2), draw.integer("prefix", 1, width)}, reverse=True)
        weights = [1.0, 0.5, 2.0][: len(dims)]
        loss = losses.MatryoshkaLoss(model, loss, dims, weights, draw.one_of("dims per step", (-1, 1), p=0.2))
    return loss, columns, labels
