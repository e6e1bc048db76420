"""Whether anybody reads the rows of token embeddings that the attention mask hides.

transformers computes numbers in them, from the padding token and its position. Where nobody reads them they are not
computed, and are 0. Who reads them depends on who calls: what a model of sentence-transformers consists of is known
while it runs, and the plain caller of an accelerated base model says what is wanted (``sentfast.accelerate``).
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from sentfast.encoder import adapters, choice
from sentfast.encoder.lookups import stranger
from sentfast.encoder.structure import has_hooks
from sentfast.integrations import layers, originals
from sentfast.integrations.versions import Version
from sentfast.report import warn

# Modules of sentence-transformers that give no hidden row's numbers to another row; those of the second kind leave
# them out of what they make, or make it of token ids.
_ROW_BY_ROW = ("Dense", "Dropout", "LayerNorm", "LogitScore", "Normalize", "SparseAutoEncoder")
_LEAVE_OUT = ("MultiVectorMask", "Pooling", "SpladePooling", "WordWeights", "StaticEmbedding", "SparseStaticEmbedding")
_HEADS = ("ForMaskedLM", "ForSequenceClassification")
_POSITIONS = "query_expansion_positions"  # expansion tokens are hidden from attention, and scored

# True while a model of sentence-transformers runs whose hidden rows nobody reads, False while another one runs.
_unread: ContextVar[bool | None] = ContextVar("sentfast_rows_unread", default=None)
# The caller of `encode` gets all that the modules have made.
_all_returned: ContextVar[bool] = ContextVar("sentfast_all_returned", default=False)
_OUTPUT_VALUE_POSITION = 6
_warned = False


def forward_owner(version: Version) -> str:
    """Module and class that define ``forward`` of the models."""
    model = importlib.import_module(version.model).SentenceTransformer
    owner = next(cls for cls in model.__mro__ if "forward" in vars(cls))
    return f"{owner.__module__}:{owner.__name__}"


@contextmanager
def around_model(version: Version, model: Any, features: Any = None, **kwargs: Any) -> Iterator[None]:
    """Around ``forward`` of a model of sentence-transformers."""
    token = _unread.set(not _all_returned.get() and _blind(model, features))
    try:
        yield
    finally:
        _unread.reset(token)


@contextmanager
def around_transformer() -> Iterator[None]:
    """Around ``Transformer.forward``: by other code than a model of sentence-transformers, its rows are read."""
    token = _unread.set(bool(_unread.get()))
    try:
        yield
    finally:
        _unread.reset(token)


@contextmanager
def around_encode(version: Version, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Around `encode` or its loop."""
    value = args[_OUTPUT_VALUE_POSITION] if len(args) > _OUTPUT_VALUE_POSITION else kwargs.get("output_value", "")
    token = _all_returned.set(_all_returned.get() or value is None)
    try:
        yield
    finally:
        _all_returned.reset(token)


def read(base: nn.Module) -> bool:
    """Whether this call of a base model has to give the numbers of hidden rows."""
    wanted, unread = choice.padded_rows(base), _unread.get()
    if wanted == "exact":
        return True
    if unread is not None:
        return not unread
    # A call by other code than sentence-transformers: of a base model that nobody has accelerated by name, or by the
    # one who has.
    return wanted is None


def left_zero(base: nn.Module) -> None:
    """Tells once who calls a base model by itself and has not said that zeros will do."""
    global _warned
    if not _warned and _unread.get() is None and choice.padded_rows(base) == choice.NOT_SAID:
        _warned = True
        warn(
            "last_hidden_state is 0 where the attention mask is 0; transformers computes numbers there. If something "
            'reads them: sentfast.accelerate(model, padded_rows="exact"); if not, padded_rows="zeros" ends this message'
        )


def _blind(model: Any, features: Any) -> bool:
    """Nothing in the model, and nobody who listens to it, reads hidden rows."""
    if _hooked(model) or not isinstance(features, Mapping) or _POSITIONS in features or _own_forward(model):
        return False
    return bool(_left_out(model._modules.values()))


def _own_forward(model: Any) -> bool:
    """Code of somebody else is around `forward` of the model: of its class, a base of it, or of this one object."""
    cls = type(model)
    if layers.foreign(cls.forward) or layers.foreign(cls.__call__):
        return True
    own = vars(model).get("forward")  # MatryoshkaLoss has put its decorator there, or accelerate what it wraps
    return own is not None and bool(stranger(own) or stranger(getattr(own, "fn", own)))


def _left_out(modules: Any) -> bool | None:
    """Whether hidden rows are left out of what the modules make, one after the other; None if one may read them."""
    left_out = False
    for module in modules:
        cls = type(module)
        if not cls.__module__.startswith("sentence_transformers.") or _listened(module):
            return None
        if cls.__name__ == "Router":
            routes = list(map(_left_out, module.sub_modules.values()))
            if None in routes:
                return None
            left_out = left_out or all(routes)
        elif hasattr(cls, "auto_model") or "auto_model" in module._modules:
            if not _plain_transformer(module):
                return None
            left_out = left_out or getattr(module, "module_output_name", "token_embeddings") != "token_embeddings"
        elif cls.__name__ == "Dense" and type(module.activation_function) not in layers.ROW_BY_ROW:
            if getattr(module, "module_input_name", "sentence_embedding") != "sentence_embedding":
                return None
        elif cls.__name__ not in (*_ROW_BY_ROW, *_LEAVE_OUT):
            return None
        if _hands_on(module):
            return None
        left_out = left_out or cls.__name__ in _LEAVE_OUT
    return left_out


def _hands_on(module: Any) -> bool:
    """The module makes of each row something of another name, in which nobody leaves rows out."""
    given = getattr(module, "module_input_name", None)
    return given == "token_embeddings" and getattr(module, "module_output_name", given) not in (None, given)


def _listened(module: nn.Module) -> bool:
    """The module's code is not sentence-transformers' own, or somebody listens to it or to its parts."""
    cls: Any = type(module)
    if layers.foreign(cls.forward) or not vars(module).keys().isdisjoint(_methods(cls)):
        return True
    if originals.why_not_class(cls, module):
        return True
    if "auto_model" in module._modules or "model" in module._modules or type(module).__name__ == "Router":
        return _hooked(module)
    return any(map(_hooked, module.modules()))


@functools.lru_cache(256)
def _methods(cls: Any) -> frozenset[str]:
    """Names under which an instance may have a step of its own."""
    kinds = types.FunctionType, classmethod, staticmethod
    return frozenset(name for kind in cls.__mro__ for name, x in vars(kind).items() if isinstance(x, kinds))


def _plain_transformer(module: Any) -> bool:
    """A base model of transformers, or one in a head that reads the first row or makes a row of each row."""
    outer = module.auto_model
    if not isinstance(outer, nn.Module):
        return False
    inner = adapters.inside(outer)
    base = getattr(inner, "base_model", inner)
    parts = [outer, inner, base, getattr(base, "pooler", None)]
    if any(_hooked(part) or "forward" in vars(part) for part in parts if part is not None):
        return False
    return _known_head(type(inner)) and type(base).__module__.startswith("transformers.")


def _known_head(cls: type) -> bool:
    name = cls.__name__
    return cls.__module__.startswith("transformers.") and name.endswith((*_HEADS, "Model"))


def _hooked(module: Any) -> bool:
    return has_hooks([vars(module)])
