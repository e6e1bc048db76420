"""``torch.export`` and ``torch.jit`` get the original code of everything that is patched."""

from __future__ import annotations

import random

import pytest
import torch
from sentence_transformers import __version__, models, util
from torch import nn

import sentfast
from sentfast import private
from sentfast.integrations import guards
from sentfast.integrations import sentence_transformers as patches

pytestmark = pytest.mark.usefixtures("switched_on")

VERSION = patches.resolve(__version__)
# The others run the original in any case, with other arguments or inside a context.
WRAPS = (guards.accelerated, guards.accelerated_loop, guards.with_original)
ROWS = [row for row in patches.table(VERSION) if row.wrap in WRAPS]


@pytest.mark.parametrize("where", ["export", "trace"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.owner.rpartition('.')[2]}.{row.attribute}")
def test_every_patched_function(monkeypatch, row, where):
    def original(a, b):
        return a, b

    def replacement(*args, **kwargs):
        pytest.fail("our code ran")

    if where == "export":
        monkeypatch.setattr(guards, "is_compiling", lambda: True)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    else:
        monkeypatch.setattr(private, "is_tracing", lambda: True)
    wrapped = row.wrap(row.attribute, original, replacement)
    assert wrapped([], b=2) == ([], 2)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def operators(module, args, strict) -> list[str]:
    graph = torch.export.export(module, args, strict=strict).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def with_features(module, *names):
    return Calls(lambda *tensors: module(dict(zip(names, tensors, strict=True)))["sentence_embedding"])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_graphs_are_the_original_s(strict):
    draw = random.Random(torch.initial_seed())
    rows, columns = draw.randrange(2, 9), 2 * draw.randrange(1, 20)
    x, y = torch.randn(rows, columns), torch.randn(rows, columns)
    pairs = ["cos_sim", "dot_score", "pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim"]
    name = draw.choice([*pairs, "pairwise_manhattan_sim", "pairwise_angle_sim"])
    tokens, mask = torch.randn(rows, 5, columns), torch.ones(rows, 5, dtype=torch.long)
    cases = {
        name: (Calls(getattr(util, name)), (x, y)),
        "normalize_embeddings": (Calls(util.normalize_embeddings), (x,)),
        "Normalize": (with_features(models.Normalize(), "sentence_embedding"), (x,)),
        "Pooling": (with_features(models.Pooling(columns), "token_embeddings", "attention_mask"), (tokens, mask)),
    }
    for case, (module, args) in cases.items():
        torch.compiler.reset()
        ours = operators(module, args, strict)
        torch.compiler.reset()
        sentfast.disable()
        stock = operators(module, args, strict)
        sentfast.enable()
        assert ours == stock and stock, case
    torch.compiler.reset()
