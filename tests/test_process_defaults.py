"""What a program sets for all of PyTorch, its default dtype and device, changes nothing that the original keeps."""

from __future__ import annotations

import ast
from pathlib import Path

import encoders
import pytest
import torch
from process_settings import default_dtype
from sentence_transformers import util
from test_faithful import difference, drawn

import sentfast
from sentfast.encoder.verify import ALLOWED
from sentfast.search import top_pairs

LENGTHS = [9, 1, 5]


@pytest.fixture(autouse=True)
def surroundings():
    with encoders.surroundings():
        yield


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("kind", encoders.MODEL_TYPES)
@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_made_of_a_model_under_other_defaults_is_right(kind, name):
    """Weights that have moved are read anew, and what is made of them stays."""
    model, inputs = sentfast.accelerate(encoders.model(kind)), encoders.batch(LENGTHS)
    assert difference(model, inputs) < ALLOWED[torch.float32]
    for trains in (False, True):
        factor = 1.01 + 0.01 * drawn(5)
        with DEFAULTS[name](), torch.set_grad_enabled(trains):
            for parameter in model.parameters():
                parameter.data = parameter.data * factor
            assert difference(model, inputs) < ALLOWED[torch.float32]
        with encoders.ran():
            model(**inputs)
        assert difference(model, inputs) < ALLOWED[torch.float32]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_samples_of_many_rows_are_taken_under_other_defaults(name):
    rows = torch.nn.functional.normalize(torch.randn(3000 + drawn(2000), 24))

    def mined():
        found = top_pairs(rows, 50, metric="cos")
        return util.paraphrase_mining_embeddings(rows, top_k=5, max_pairs=50), found.first.tolist()

    expected = mined()
    with DEFAULTS[name]():
        assert mined() == expected


_NAMES = "arange as_tensor empty eye full linspace ones rand randint randn randperm tensor zeros"
FACTORIES = {f"torch.{name}" for name in _NAMES.split()}
SOURCES = sorted(Path(sentfast.__file__).parent.rglob("*.py"))


def test_every_tensor_is_made_on_a_device_that_is_named():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            made = isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES
            if made and "device" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)
