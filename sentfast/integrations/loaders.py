"""Lengths of the texts of training batches, noted where accelerate's data loader sends a batch to the GPU.

It is the last place that sees the attention mask on the host. Where it is not used, the encoder waits for the mask.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sentfast import switch
from sentfast.encoder import lengths
from sentfast.integrations.guards import mark

_MODULE, _FUNCTION = "accelerate.data_loader", "send_to_device"
_watched = False


def watch() -> None:
    """Patches the function, if accelerate is in use."""
    global _watched
    module = sys.modules.get(_MODULE)
    if _watched or not hasattr(module, _FUNCTION):
        return
    _watched = True
    switch.add(switch.Site(_FUNCTION, module, _FUNCTION, _build))


def _build(original: Callable) -> Callable:
    @functools.wraps(original)
    def send_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        sent = original(batch, *args, **kwargs)
        if switch.is_enabled() and isinstance(batch, Mapping) and isinstance(sent, Mapping):
            _note(batch, sent)
        return sent

    mark(send_to_device)
    return send_to_device


def _note(batch: Mapping, sent: Mapping) -> None:
    """Of every column: sentence-transformers calls its mask by the column's name and `attention_mask`."""
    for name, mask in batch.items():
        if isinstance(name, str) and name.endswith("attention_mask") and type(mask) is Tensor:
            found, there = lengths.of_mask(mask), sent.get(name)
            if found is not None and type(there) is Tensor:
                lengths.note(there, found)
