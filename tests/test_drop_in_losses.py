"""The losses of sentence-transformers with sentfast on: same values and gradients, by our operator where it applies."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from sentence_transformers import SentenceTransformer, losses, models, util
from text_losses import (
    CACHED,
    CACHED_GIST,
    CACHED_SYMMETRIC,
    COUNT,
    GIST,
    MNRL,
    OPERATORS,
    SYMMETRIC,
    assert_same,
    columns,
    guide_of,
    ran,
    value_and_gradient,
)
from tiny_models import VERSION, build
from torch import nn

import sentfast

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
NEW = VERSION >= (6, 2)
COSENT, TRIPLET, CONTRASTIVE = losses.CoSENTLoss, losses.TripletLoss, losses.ContrastiveLoss
EVERYTHING = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.fixture(scope="module")
def model(path):
    return build(path).train()


@pytest.fixture(scope="module")
def guide(path):
    return guide_of(path)


RANKING = {
    "default": (2, {}),
    "one negative": (3, dict(scale=5.0)),
    "three negatives": (5, {}),
    "dot": (3, dict(similarity_fct=util.dot_score, scale=0.3)),
    "alias": (2, dict(similarity_fct=util.pytorch_cos_sim)),
    "gathered from one": (3, dict(gather_across_devices=True)),
}
DIRECTIONS = {
    "all directions": (4, dict(directions=EVERYTHING)),
    "all directions, dot, gathered": (
        3,
        dict(directions=EVERYTHING, similarity_fct=util.dot_score, scale=0.3, gather_across_devices=True),
    ),
    "two by themselves": (3, dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")),
    "two together": (3, dict(directions=("query_to_doc", "doc_to_query"))),
    "query to query": (2, dict(directions=("query_to_query", "query_to_doc"))),
    "harder in-batch negatives": (4, dict(hardness_mode="in_batch_negatives", hardness_strength=9.0)),
    "harder hard negatives": (4, dict(hardness_mode="hard_negatives", hardness_strength=5.0)),
    "harder negatives, all directions": (
        3,
        dict(hardness_mode="all_negatives", hardness_strength=3.0, directions=EVERYTHING),
    ),
    "no hardness": (3, dict(hardness_mode="all_negatives", hardness_strength=0.0)),
}
if "directions" in inspect.signature(MNRL).parameters:
    RANKING |= DIRECTIONS


@pytest.mark.parametrize("cls", [MNRL, CACHED], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("case", RANKING)
def test_ranking_losses(model, cls, case):
    count, options = RANKING[case]
    if cls is CACHED:
        options = {**options, "mini_batch_size": 3}
    assert_same(partial(cls, **options), model, columns(count))


@pytest.mark.parametrize("cls", [SYMMETRIC, CACHED_SYMMETRIC], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("options", [{}, dict(scale=7.0, gather_across_devices=True)], ids=["default", "gathered"])
@pytest.mark.parametrize("count", [2, 3])
def test_symmetric_losses(model, cls, options, count):
    options = {**options, **({"mini_batch_size": 3} if cls is CACHED_SYMMETRIC else {})}
    assert_same(partial(cls, **options), model, columns(count))


GUIDED = {
    "default": {},
    "warm": dict(temperature=0.05),
    "margin": dict(margin=0.15),
    "pairs only": dict(contrast_anchors=False, contrast_positives=False),
    "anchors": dict(contrast_positives=False, margin=-0.1),
    "positives": dict(contrast_anchors=False),
}
if NEW:
    GUIDED |= {
        "relative": dict(margin_strategy="relative", margin=0.1),
        "gathered from one": dict(gather_across_devices=True),
    }


@pytest.mark.parametrize("case", GUIDED)
@pytest.mark.parametrize("count", [2, 3])
def test_guided_losses(model, guide, case, count):
    assert_same(partial(GIST, **GUIDED[case]), model, columns(count), guide=guide)
    cached = partial(CACHED_GIST, **GUIDED[case], mini_batch_size=3)
    assert_same(cached, model, columns(count + 1), guide=guide)


def test_a_guide_with_another_tokenizer(model, guide, path, tmp_path):
    other = copy.deepcopy(guide)
    other.max_seq_length = model.max_seq_length - 20
    # The cached loss of sentence-transformers 6.0 and 6.1 stumbles over the strings that its own tokenize returns.
    for cls in (GIST,) if (6, 0) <= VERSION < (6, 2) else (GIST, CACHED_GIST):
        assert cls(model, other).must_retokenize
        assert_same(cls, model, columns(3), guide=other)


@pytest.mark.parametrize("cls", [GIST, CACHED_GIST], ids=lambda cls: cls.__name__)
def test_equal_texts_under_a_guide(model, guide, cls):
    """What is as near to the anchor as its positive is kept, whatever the last digits of the cosines say."""
    texts = columns(3)
    texts[1][2] = texts[1][4] = texts[2][5] = texts[1][0]
    texts[2][3] = texts[1][3]
    loss = cls(model, guide)
    with sentfast.disabled():
        eager = value_and_gradient(loss, texts)
    result = value_and_gradient(loss, texts)
    torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5)


SCORES = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.3, 0.4, 1.0])
CLASSES = torch.tensor([0, 1, 1, 0, 1, 0, 0])
ROWS = {"pairwise_similarity"}
# Loss, columns, labels, and the operators of the functions that it calls.
OTHERS = {
    "CosineSimilarity": (losses.CosineSimilarityLoss, 2, SCORES, set()),
    "CoSENT": (COSENT, 2, SCORES, ROWS),
    "AnglE": (losses.AnglELoss, 2, SCORES, ROWS if NEW else set()),
    "Triplet, cosine": (
        partial(TRIPLET, distance_metric=losses.TripletDistanceMetric.COSINE, triplet_margin=0.3),
        3,
        None,
        ROWS,
    ),
    "Triplet, Euclidean": (TRIPLET, 3, None, ROWS if NEW else set()),
    "Triplet, Manhattan": (
        partial(TRIPLET, distance_metric=losses.TripletDistanceMetric.MANHATTAN, triplet_margin=50),
        3,
        None,
        ROWS,
    ),
    "Contrastive": (CONTRASTIVE, 2, CLASSES, set()),
    "Contrastive, Euclidean": (
        partial(CONTRASTIVE, distance_metric=losses.SiameseDistanceMetric.EUCLIDEAN, size_average=False),
        2,
        CLASSES,
        set(),
    ),
    "OnlineContrastive": (losses.OnlineContrastiveLoss, 2, CLASSES, set()),
    "MSE": (losses.MSELoss, 2, torch.linspace(-1, 1, COUNT * 32).view(COUNT, 32), set()),
    "MarginMSE": (losses.MarginMSELoss, 3, SCORES, ROWS),
    "MarginMSE, negatives": (losses.MarginMSELoss, 4, torch.stack([SCORES, -SCORES], dim=1), ROWS),
}


@pytest.mark.parametrize("case", OTHERS)
def test_losses_that_run_their_own_code(model, case):
    cls, count, labels, operators = OTHERS[case]

    class Configured(cls.func if isinstance(cls, partial) else cls):
        """5.1 has losses that inherit no ``get_config_dict``."""

        def get_config_dict(self):
            return getattr(super(), "get_config_dict", dict)()

    make = partial(Configured, **cls.keywords) if isinstance(cls, partial) else Configured
    assert_same(make, model, columns(count), labels, operators | {"pool"})
    sentfast.report(reset=True)
    value_and_gradient(make(model), columns(count), labels)
    calls = {name for name, _ in sentfast.report().calls}
    assert not calls & OPERATORS and calls & ROWS == operators


@pytest.mark.parametrize("cls", [MNRL, CACHED, SYMMETRIC, CACHED_SYMMETRIC, GIST, CACHED_GIST])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_loss(path, guide, cls, autocast, dtype):
    model = build(path).to(dtype)
    loss = cls(model, copy.deepcopy(guide).to(dtype)) if "GIST" in cls.__name__ else cls(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with sentfast.disabled():
            eager = value_and_gradient(loss, columns(3))
        with ran():
            result = value_and_gradient(loss, columns(3))
    assert [x.dtype for x in result] == [x.dtype for x in eager]
    if "GIST" not in cls.__name__:  # half embeddings turn the guide's comparisons
        torch.testing.assert_close(result[0], eager[0], atol=0.15, rtol=0.05)


def test_learned_scale(model):
    def make(model):
        loss = MNRL(model)
        loss.scale = nn.Parameter(torch.tensor(11.0))
        return loss

    gradients = []
    for context in (sentfast.disabled(), ran()):
        with context:
            loss = make(model)
            value_and_gradient(loss, columns(3))
            gradients.append(loss.scale.grad)
    torch.testing.assert_close(*gradients)


def test_documents_are_normalised_once(model):
    """The cached loss makes one call of the operator, however many mini-batches there are."""
    sentfast.report(reset=True)
    value_and_gradient(CACHED(model, mini_batch_size=2), columns(3))
    assert sum(n for (name, _), n in sentfast.report().calls.items() if name in OPERATORS) == 1


class Doubled(MNRL):
    def compute_loss_from_embeddings(self, embeddings, labels):
        return 2 * super().compute_loss_from_embeddings(embeddings, labels)


class Replaced(MNRL):
    def compute_loss_from_embeddings(self, embeddings, labels):
        return embeddings[0].sum()


class OwnMatrix(GIST):
    def sim_matrix(self, embed1, embed2):
        return embed1 @ embed2.T


def test_subclasses(model):
    with sentfast.disabled():
        single, doubled = (value_and_gradient(cls(model), columns(2)) for cls in (MNRL, Doubled))
    with ran():
        torch.testing.assert_close(value_and_gradient(Doubled(model), columns(2)), doubled)
    torch.testing.assert_close(2 * single[0], doubled[0])
    with ran(set()):
        value_and_gradient(Replaced(model), columns(2))
        assert not {name for name, _ in sentfast.report().calls} & OPERATORS


def similarity_of_the_user(a, b):
    return util.cos_sim(a, b) * 0.5


def smoothed(loss):
    loss.cross_entropy_loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return loss


def with_scale(loss, scale):
    loss.scale = scale
    return loss


def with_directions(loss, *names):
    loss.directions = list(names)
    return loss


STEP, CACHED_STEP = "MultipleNegativesRankingLoss.compute_loss_from_embeddings", f"{CACHED.__name__}.calculate_loss"
GIST_STEP, CACHED_GIST_STEP = "GISTEmbedLoss.forward", "CachedGISTEmbedLoss.calculate_loss"
REFUSED = {
    "a similarity of the user": (lambda m, g: MNRL(m, similarity_fct=similarity_of_the_user), STEP, "SF101"),
    "the same, cached": (lambda m, g: CACHED(m, similarity_fct=similarity_of_the_user), CACHED_STEP, "SF101"),
    "another similarity": (lambda m, g: MNRL(m, similarity_fct=util.euclidean_sim), STEP, "SF101"),
    "scale below 0": (lambda m, g: with_scale(MNRL(m), -2.0), STEP, "SF107"),
    "endless scale": (lambda m, g: with_scale(MNRL(m), float("inf")), STEP, "SF107"),
    "scale of another shape": (lambda m, g: with_scale(MNRL(m), torch.ones(COUNT)), STEP, "SF107"),
    "another cross-entropy": (lambda m, g: smoothed(GIST(m, g)), GIST_STEP, "SF101"),
    "the same, cached guided": (lambda m, g: smoothed(CACHED_GIST(m, g)), CACHED_GIST_STEP, "SF101"),
    "a matrix of the user": (lambda m, g: OwnMatrix(m, g), GIST_STEP, "SF110"),
    "negative temperature": (lambda m, g: GIST(m, g, temperature=-0.1), GIST_STEP, "SF107"),
}
if VERSION < (5, 3):
    REFUSED |= {
        "smoothed": (lambda m, g: smoothed(MNRL(m)), STEP, "SF101"),
        "symmetric": (
            lambda m, g: smoothed(SYMMETRIC(m)),
            f"{SYMMETRIC.__name__}.compute_loss_from_embeddings",
            "SF101",
        ),
        "relative": (lambda m, g: GIST(m, g, margin_strategy="relative", margin=0.1), GIST_STEP, "SF109"),
        "gathered": (lambda m, g: CACHED_GIST(m, g, gather_across_devices=True), CACHED_GIST_STEP, "SF109"),
    }
if NEW:
    REFUSED |= {
        "without the first direction": (lambda m, g: with_directions(MNRL(m), "doc_to_query"), STEP, "SF107"),
        "an unknown direction": (lambda m, g: with_directions(MNRL(m), *EVERYTHING, "to_nobody"), STEP, "SF107"),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_left_to_the_original(model, guide, case):
    make, site, code = REFUSED[case]
    loss = make(model, guide)
    with sentfast.disabled():
        expected = value_and_gradient(loss, columns(2))
    with ran(set(), {site: code}):
        result = value_and_gradient(loss, columns(2))
        calls = {name for name, _ in sentfast.report().calls}
    size = max(1.0, expected[1].nan_to_num().abs().max().item())  # temperatures make gradients of thousands
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * size, equal_nan=True)
    assert not calls & OPERATORS and "pool" in calls
    if case == "a similarity of the user":
        assert "cosine_similarity" in calls, "what the original calls stays accelerated"


def test_float64_is_left_to_the_original(model, guide):
    double, double_guide = (copy.deepcopy(x).double() for x in (model, guide))
    for loss, site in ((MNRL(double), STEP), (CACHED(double), CACHED_STEP), (GIST(double, double_guide), GIST_STEP)):
        with sentfast.disabled():
            expected = value_and_gradient(loss, columns(2))
        with ran(set(), {site: "SF102"}):
            torch.testing.assert_close(value_and_gradient(loss, columns(2)), expected)


def test_errors_are_those_of_the_original(model, guide):
    for loss, texts in (
        (MNRL(model), columns(1)),
        (MNRL(model), [columns(1, rows=4)[0], columns(1, rows=3)[0]]),
        (GIST(model, guide), columns(4)),
    ):
        with sentfast.disabled(), pytest.raises(Exception) as expected:
            value_and_gradient(loss, texts)
        with pytest.raises(type(expected.value)) as found:
            value_and_gradient(loss, texts)
        assert str(found.value) == str(expected.value)


def test_more_documents_than_queries(model):
    """Not for training, but the original takes it where it needs no mask."""
    texts = [columns(1, rows=3)[0], columns(2, rows=5)[1]]
    with sentfast.disabled():
        expected = value_and_gradient(MNRL(model), texts)
    with ran(set(), {STEP: "SF107"}):
        torch.testing.assert_close(value_and_gradient(MNRL(model), texts), expected)


def test_off_and_on_again(model):
    loss = CACHED(model, mini_batch_size=3)
    wrapped = losses.MatryoshkaLoss(model, CACHED(model, mini_batch_size=3), [32, 8])  # holds a bound method
    assert "sentfast" not in repr(loss) and not any("sentfast" in name for name, _ in loss.named_modules())
    sentfast.disable()
    sentfast.report(reset=True)
    value_and_gradient(loss, columns(2))
    value_and_gradient(wrapped, columns(2))
    assert not sentfast.report().calls
    sentfast.enable()
    with ran():
        value_and_gradient(wrapped, columns(2))


def test_flattened_and_normalised_models(path):
    """A model that ends in Normalize, as most published ones do."""
    model = SentenceTransformer(modules=[*build(path), models.Normalize()], device="cpu").train()
    assert_same(MNRL, model, columns(3))
    assert_same(partial(CACHED, mini_batch_size=4), model, columns(2))
