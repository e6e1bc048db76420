"""What the tests of the encoder on a GPU share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import encoders
import ptx.settings
import pytest
import tiny_models
import torch
from torch import Tensor

import sentfast
from sentfast import registry
from sentfast.encoder import Composed, encoder_of

LENGTHS = [9, 3, 1, 17, 6]
GPU = torch.device("cuda", 0)
on_cpu_tensors = os.environ.get("TRITON_INTERPRET") == "1" or (ptx.settings.asked() or ("",))[0] == "triton"
interpreted = pytest.mark.skipif(not on_cpu_tensors, reason="neither TRITON_INTERPRET=1 nor SENTFAST_TEST_PTX is set")
needs_fused = pytest.mark.skipif(tiny_models.VERSION < (6, 2), reason="encode has no loop of its own")
# Of `encode`.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "batches of 7": {"batch_size": 7},
    "progress bar": {"show_progress_bar": True, "convert_to_tensor": True},
    "normalized": {"normalize_embeddings": True},
    "truncated": {"truncate_dim": 11, "normalize_embeddings": True},
    "prompt": {"prompt": "weather: "},
}


def composed(made: Any, precision: str = "match") -> Composed:
    found = encoder_of(made, precision)
    assert isinstance(found, Composed), found
    return found


def packed_texts(text_lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, encoders.VOCABULARY, (sum(text_lengths),), dtype=torch.int32)
    return ids, torch.tensor([0, *text_lengths]).cumsum(0).int()


def without_graphs(encoder: Composed, *args: Any, **options: Any) -> Tensor:
    found, encoder._graphs = encoder._graphs, None
    try:
        return encoder.run(*args, **options)
    finally:
        encoder._graphs = found


@contextmanager
def on_triton(*operators: str) -> Iterator[None]:
    """The block runs these operators on Triton and nothing on another backend."""
    sentfast.report(reset=True)
    with registry.use_backend("triton"):
        yield
    ran = sentfast.report().calls
    found = {name for name, backend in ran if backend == "triton"}
    assert {backend for _, backend in ran} <= {"triton"} and set(operators) <= found, ran
