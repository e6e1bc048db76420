"""The packed encoder as it runs on a GPU: its code on CPU tensors, on fake CUDA tensors, and on a GPU where there is one.

On CPU tensors the results are real; on fake ones a tensor left on the wrong device, or a value that the host would have
to wait for, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import encoders
import pytest
import torch
from accuracy import assert_accurate

import sentfast
from sentfast import native
from sentfast.encoder import Composed, device, encoder_of

LENGTHS = [9, 3, 1, 17, 6]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a device on which the encoder runs as steps."""
    monkeypatch.setattr(device, "_COMPOSED", {"cpu", "cuda"})
    with encoders.surroundings():
        yield


def composed(made: Any, precision: str = "match") -> Composed:
    found = encoder_of(made, precision)
    assert isinstance(found, Composed), found
    return found


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("model_type", encoders.MODEL_TYPES)
def test_token_embeddings(model_type: str) -> None:
    for hidden, heads in encoders.SIZES:
        made, inputs = encoders.model(model_type, hidden, heads), encoders.batch(LENGTHS)
        if model_type in encoders.WITH_TOKEN_TYPES:
            inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape)
        encoder, _ = encoders.check(made, inputs)
        assert isinstance(encoder, Composed) and encoder.precision == "fp32"
