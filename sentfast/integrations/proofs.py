"""Small examples on which ours has to give what sentence-transformers' own code gives, before it stands for it.

They draw no random number and take a millisecond or two. An example that ours does not take proves nothing. The
gradient is compared too, where there is one.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sentfast import private, switch
from sentfast.encoder.verify import gradients, twin, unseen
from sentfast.integrations import loss_proofs
from sentfast.integrations.modules import MODE_FLAGS
from sentfast.integrations.versions import Version
from sentfast.reference import POOLING_MODES
from sentfast.report import uncounted, warn

# As for models: two ways to round differ by some 1e-6 of the largest number.
ALLOWED = 1e-4
Examples = Callable[[Version, tuple], Iterator[tuple]]


def prove(name: str, version: Version, original: Callable, attempt: Callable, args: tuple) -> str:
    """Runs both on the examples of a patched function; args: those of the call for which ours is wanted."""
    examples = _EXAMPLES.get(name)
    if examples is None:
        return ""
    calls = [call for call, names in ((_plainly, _PLAINLY), (_with_gradient, _WITH_GRADIENT)) if name in names]
    with uncounted(), private.InferenceMode(False), torch.no_grad(), private.WithoutAutocast():
        for given, call in itertools.product(examples(version, args), calls):
            try:
                found = call(attempt, given)
            except Exception as error:  # the call that asks for the proof is the original's then
                return _told(name, f"ours does not run: {type(error).__name__}: {error}")
            if isinstance(found, str):
                continue
            try:
                expected = call(functools.partial(switch.run_original, original), given)
            except Exception as error:
                return _told(name, f"the original code does not run: {type(error).__name__}: {error}")
            difference = _difference(found, expected)
            if not difference <= ALLOWED:
                return _told(name, f"largest difference by the largest number: {difference:.2g}, allowed {ALLOWED:g}")
    return ""


def key(name: str) -> Callable[[tuple], Hashable] | None:
    """What tells calls of a function apart that have to be proven by themselves; None: the first proves for all."""
    return loss_proofs.settings if name in _BY_SETTINGS else None


def _plainly(function: Callable, given: tuple) -> Any:
    return _result(function(*_copied(given)))


def _result(result: Any) -> Any:
    # Before 5.4 Pooling writes into padded token embeddings, and ours does not.
    return {name: result[name] for name in result if name != "token_embeddings"} if type(result) is dict else result


def _with_gradient(function: Callable, given: tuple) -> Any:
    """The value, and the gradient of its numbers, weighted, by every number of the example."""
    given = _copied(given)
    leaves = [x.requires_grad_() for x in _tensors(given) if x.is_floating_point()]
    with torch.enable_grad(), unseen():
        value = _result(function(*_copied(given)))  # not the leaves themselves, which nobody may write into
        if isinstance(value, str):
            return value
        found = gradients(_tensors(value), leaves)
    return [value, [torch.zeros_like(x) if y is None else y for x, y in zip(leaves, found, strict=True)]]


def _told(name: str, detail: str) -> str:
    warn(f"{name} runs its own code: {detail} [SF129]")
    return "SF129"


def _difference(found: Any, expected: Any) -> float:
    x, y = (torch.tensor(list(_numbers(side)), dtype=torch.float64, device="cpu") for side in (found, expected))
    if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
        return float("inf")
    finite = y.isfinite()
    return float((x - y)[finite].abs().max() / y[finite].abs().max().clamp(min=1e-30)) if finite.any() else 0.0


def _numbers(result: Any) -> Iterator[float]:
    """Of a tensor, or of lists and dictionaries in each other."""
    if isinstance(result, Tensor):
        yield from result.detach().double().cpu().flatten().tolist()
    elif isinstance(result, Mapping):
        for name in sorted(result):
            yield from _numbers(result[name])
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _numbers(part)
    elif isinstance(result, (int, float)):
        yield float(result)


def _copied(given: Any) -> Any:
    """Modules write into the features, and a loss may write into embeddings."""
    if isinstance(given, dict):
        return {name: _copied(x) for name, x in given.items()}
    if type(given) in (list, tuple):
        return type(given)(map(_copied, given))
    return given.clone() if isinstance(given, Tensor) else given


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif type(given) in (list, tuple, dict):
        for part in given.values() if isinstance(given, dict) else given:
            yield from _tensors(part)


@functools.cache
def _rows(count: int, columns: int, step: float) -> Tensor:
    """[count, columns], no two numbers alike."""
    numbers = torch.arange(1, count * columns + 1, dtype=torch.float32, device="cpu") * step
    return torch.sin(numbers * numbers).view(count, columns)


def _cosine() -> Callable:
    return importlib.import_module("sentence_transformers.util.similarity").cos_sim


# ---- examples --------------------------------------------------------------------------------------------------------


def _matrices(version: Version, args: tuple) -> Iterator[tuple]:
    yield _rows(130, 8, 0.37), _rows(128, 8, 0.11)


def _pairs(version: Version, args: tuple) -> Iterator[tuple]:
    yield _rows(5, 8, 0.37), _rows(5, 8, 0.11)


def _one(version: Version, args: tuple) -> Iterator[tuple]:
    yield (_rows(5, 8, 0.37),)


def _search(version: Version, args: tuple) -> Iterator[tuple]:
    yield _rows(1, 8, 0.37), _rows(40, 8, 0.11), 100, 25, 5, _cosine()


def _mining(version: Version, args: tuple) -> Iterator[tuple]:
    yield _rows(40, 8, 0.11), 100, 1000, 30, 5, _cosine()


def _communities(version: Version, args: tuple) -> Iterator[tuple]:
    yield _rows(40, 4, 0.11), 0.7, 3, 1024, False


def _pooling(version: Version, args: tuple) -> Iterator[tuple]:
    """Every mode, of a ragged batch."""
    copy = twin(args[0])
    mask = (torch.arange(6, device="cpu") < torch.tensor([[6], [1], [4]], device="cpu")).long()
    for mode in POOLING_MODES:
        if version.mode_flags:
            for flag, name in MODE_FLAGS:
                setattr(copy, flag, name == mode)
        else:
            copy.pooling_mode = mode
        yield copy, {"token_embeddings": _rows(18, 8, 0.37).view(3, 6, 8), "attention_mask": mask}


def _normalize(version: Version, args: tuple) -> Iterator[tuple]:
    copy = twin(args[0])
    yield copy, {getattr(copy, "module_input_name", "sentence_embedding"): _rows(5, 8, 0.37)}


def _embeddings(step: float) -> Tensor:
    return _rows(5, 8, step)


_LOSSES = {
    "MultipleNegativesRankingLoss.compute_loss_from_embeddings": loss_proofs.ranking,
    "MultipleNegativesSymmetricRankingLoss.compute_loss_from_embeddings": loss_proofs.ranking,
    "CachedMultipleNegativesRankingLoss.calculate_loss": loss_proofs.cached,
    "CachedMultipleNegativesSymmetricRankingLoss.calculate_loss": loss_proofs.cached,
    "GISTEmbedLoss.forward": loss_proofs.guided,
    "CachedGISTEmbedLoss.calculate_loss": loss_proofs.cached_guided,
    "MatryoshkaLoss.forward": loss_proofs.matryoshka_loss,
    "CachedLossDecorator.__call__": loss_proofs.cached_matryoshka_loss,
}
_BY_SETTINGS = frozenset(_LOSSES)
_SEARCH: dict[str, Examples] = {
    "semantic_search": _search,
    "paraphrase_mining_embeddings": _mining,
    "community_detection": _communities,
}
_EXAMPLES: dict[str, Examples] = {
    **_SEARCH,
    "cos_sim": _matrices,
    "dot_score": _matrices,
    "pairwise_cos_sim": _pairs,
    "pairwise_dot_score": _pairs,
    "pairwise_euclidean_sim": _pairs,
    "pairwise_manhattan_sim": _pairs,
    "pairwise_angle_sim": _pairs,
    "normalize_embeddings": _one,
    "Pooling.forward": _pooling,
    "Normalize.forward": _normalize,
    **{name: functools.partial(examples, _embeddings) for name, examples in _LOSSES.items()},
}
_PLAINLY = _EXAMPLES.keys() - (_LOSSES.keys() - {"CachedLossDecorator.__call__"})
# The decorator goes backward by itself, into what its caller holds.
_WITH_GRADIENT = _EXAMPLES.keys() - {"CachedLossDecorator.__call__", *_SEARCH}
