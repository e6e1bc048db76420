"""What begins with an underscore in PyTorch, transformers, sentence-transformers and PEFT is named in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sentfast

PACKAGE = Path(sentfast.__file__).parent
LIBRARIES = ("torch", "transformers", "sentence_transformers", "peft", "tokenizers", "accelerate")


def private_names(source: str) -> Iterator[str]:
    """Of the libraries' modules, by import or as an attribute of what was imported."""
    tree = ast.parse(source)
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from filter(_private, names)
            known |= {alias.asname or alias.name.partition(".")[0] for alias in node.names if _of_library(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and _of_library(node.module):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from filter(_private, names)
            known |= {alias.asname or alias.name for alias in node.names if alias.name[:1].islower()}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in known and _private(".".join(parts)):
            yield f"{node.id}.{'.'.join(reversed(parts))}"


def _of_library(name: str) -> bool:
    return name.partition(".")[0] in LIBRARIES


def _private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_in_one_file(path):
    found = list(private_names(path.read_text()))
    assert bool(found) == (path.name == "private.py"), found


def test_private_names_are_found():
    source = (
        "import torch\nfrom torch import nn\nfrom torch.fx import _x\nimport torch._C as c\nnn.functional._y(torch.z)"
    )
    assert set(private_names(source)) == {"torch.fx._x", "torch._C", "nn.functional._y"}
