"""Test session: fresh random inputs with a seed that is printed, and the backends that this machine has."""

from __future__ import annotations

import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules beside the tests; nothing else of the checkout

os.environ["SENTFAST_TEST_FILL"] = "1"  # the compiled kernels' new tensors hold NaN
os.environ["SENTFAST_TEST_ALL"] = "1"  # what the original does faster runs all the same

SEED = int(os.environ.get("SENTFAST_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"SENTFAST_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Each test draws from its own stream, the same one again with the same SENTFAST_TEST_SEED."""
    torch.manual_seed((SEED + hash_name(request.node.nodeid)) % 2**31)


def hash_name(name: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(name[-24:])) % 2**31


@pytest.fixture(autouse=True)
def environment():
    """Variables that a test sets end with it: transformers 4 leaves bf16=True there, and later trainers find it."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def fill_new_tensors():
    """PyTorch's new tensors hold NaN too, so an element that a kernel forgot is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def switched_on():
    """Starts with sentfast on and leaves it on; without compiled kernels our operators are asked for by name."""
    from backends import BACKEND

    import sentfast

    sentfast.enable()
    with sentfast.use_backend(BACKEND) if BACKEND == "reference" else nullcontext():
        yield
    sentfast.enable()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """The CPU counts as a device on which the encoder runs as steps."""
    import encoders

    from sentfast.encoder import device

    monkeypatch.setattr(device, "_COMPOSED", {"cpu", "cuda"})
    with encoders.surroundings():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base model on disk, without dropout."""
    from training_runs import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory):
    """Tiny base models on disk, by kind."""
    from encode_cases import save_bases

    return save_bases(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def makers(paths):
    """Functions that build models of sentence-transformers on them."""
    from encode_cases import makers_of

    return makers_of(paths)
