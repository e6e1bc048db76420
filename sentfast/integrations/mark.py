"""Around ``Transformer.forward``: its base model is allowed to run packed, and the original runs as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sentfast.encoder import adapters
from sentfast.integrations import hidden_rows, transformers
from sentfast.integrations.versions import Version


@contextmanager
def around_forward(version: Version, module: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """All bookkeeping stays with the original, which calls the base model's patched ``forward``."""
    if isinstance(module.auto_model, torch.nn.Module):
        transformers.mark(adapters.inside(module.auto_model))
    with hidden_rows.around_transformer():
        yield
