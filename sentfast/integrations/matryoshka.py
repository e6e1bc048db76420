"""MatryoshkaLoss over an in-batch loss: one call for all lengths, where the original runs the inner loss once for each.

Everything else is left to the original's loop, in which the inner loss decides for itself.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from sentfast import private
from sentfast.encoder.structure import unmarked
from sentfast.integrations import layers, losses, originals
from sentfast.integrations.losses import Prefixes
from sentfast.integrations.versions import Version


def matryoshka_loss(
    version: Version, name: str, original: Callable, loss: Any, sentence_features: Any, labels: Any
) -> Tensor:
    sentence_features, state = list(sentence_features), random.getstate()
    result = _from_features(version, loss, sentence_features, labels)
    if result is None:
        random.setstate(state)
        return original(loss, sentence_features, labels)
    return result


def cached_matryoshka_loss(
    version: Version, name: str, original: Callable, decorator: Any, reps: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """What a cached loss calls in place of its ``calculate_loss``."""
    function, state = decorator.fn, random.getstate()
    step = _step(version, getattr(function, "__func__", None), getattr(function, "__self__", None))
    if step is not None:
        value = step(version, function.__self__, reps, *args, prefixes=_prefixes(decorator), **kwargs)
        if not isinstance(value, str):
            return value
        random.setstate(state)
    return original(decorator, reps, *args, **kwargs)


def decorators(version: Version) -> tuple[type, ...]:
    """Classes that the original cuts embeddings by."""
    module = importlib.import_module(version.loss_module("MatryoshkaLoss"))
    return tuple(getattr(module, name) for name in ("ForwardDecorator", "CachedLossDecorator") if hasattr(module, name))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Taken(NamedTuple):
    """What runs in place of the inner loss; guided: from the features on, else from their embeddings."""

    step: Callable
    guided: bool


def _taken(version: Version, loss: Any) -> _Taken | None:
    """None where the original's loop has to run."""
    inner = loss.loss
    if not all(isinstance(x, nn.Module) for x in (inner, loss.model)):
        return None
    if getattr(inner, "model", None) is not loss.model or "forward" in vars(inner):
        return None
    # The one is not called as a module, and who listens to the other would be told whole embeddings.
    if any(vars(x)[name] for x in (inner, loss.model) for name in _HOOKS) or private.any_global_hook():
        return None
    if layers.foreign(type(loss.model).__call__):
        return None
    guided = _step(version, type(inner).forward, inner)
    if guided is not None:
        # Before 6.0 a guide writes over the embeddings of all lengths but the first; with dropout each has its own. One
        # that runs the model itself gets what the loss makes of its output: one length.
        if version.embed_columns is None or _drops_out(inner.guide) or loss.model in inner.guide.modules():
            return None
        return _Taken(guided, True)
    ranking = _step(version, getattr(type(inner), "compute_loss_from_embeddings", None), inner)
    if ranking is None or "compute_loss_from_embeddings" in vars(inner):
        return None
    same = type(inner).forward.__module__ == type(inner).compute_loss_from_embeddings.__module__
    return _Taken(ranking, False) if same else None


def takes(version: Version, loss: Any) -> bool:
    """Whether a MatryoshkaLoss may run in one call."""
    return _taken(version, loss) is not None


def takes_step(version: Version, method: Any, loss: Any) -> bool:
    """Whether a step of a cached loss may."""
    return _step(version, method, loss) is not None


def _from_features(version: Version, loss: Any, sentence_features: list, labels: Any) -> Tensor | None:
    """The sum over the lengths; None where the original has to make it."""
    taken, inner = _taken(version, loss), loss.loss
    if taken is None:
        return None
    if taken.guided:
        value = taken.step(version, inner, sentence_features, labels, prefixes=_prefixes(loss))
        return None if isinstance(value, str) else value
    prefixes = _prefixes(loss)  # drawn before the model runs, as the original does, even if it raises
    embeddings = losses.embed_columns(version, inner.model, sentence_features)
    value = taken.step(version, inner, embeddings, labels, prefixes=prefixes)
    return _one_by_one(version, inner, embeddings, labels, prefixes) if isinstance(value, str) else value


def _one_by_one(version: Version, inner: Any, embeddings: list[Tensor], labels: Any, prefixes: Prefixes) -> Tensor:
    """The original's loop, over embeddings that are made already."""
    shrink = importlib.import_module(version.loss_module("MatryoshkaLoss")).shrink
    total: Any = 0.0
    for dim, weight in zip(*prefixes, strict=True):
        total += weight * inner.compute_loss_from_embeddings([shrink(x, dim) for x in embeddings], labels)
    return total


def _step(version: Version, method: Any, loss: Any) -> Callable | None:
    """What runs in place of a loss's method, if it is one of sentence-transformers' own and does what it did."""
    for step in losses.steps(version):
        names = version.loss_module(step.loss), f"{step.loss}.{step.method}"
        if names == (getattr(method, "__module__", None), getattr(method, "__qualname__", None)):
            original = unmarked(method)
            intact = originals.noted(original) and not originals.why_not(original, (loss,))
            return step.with_prefixes if intact else None
    return None


def _drops_out(guide: Any) -> bool:
    """Of code of which nothing is known, too."""
    if not isinstance(guide, nn.Module):
        return True
    return any(isinstance(x, private.AnyDropout) and x.training and x.p > 0 for x in guide.modules())


def _prefixes(loss: Any) -> Prefixes:
    """The lengths of this step and their weights."""
    dims, weights = loss.matryoshka_dims, loss.matryoshka_weights
    chosen: Any = range(len(dims))
    if 0 < loss.n_dims_per_step < len(dims):
        chosen = sorted(random.sample(chosen, loss.n_dims_per_step))
    return Prefixes([dims[i] for i in chosen], [weights[i] for i in chosen])
