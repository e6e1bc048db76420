"""Edits and patches drawn from ``hostile.py``, before the first call and after it: the result is what stock gives."""

from __future__ import annotations

import hostile
import hostile_cases
import pytest
import torch
from hostile_cases import Case, attempt

from sentfast.integrations import gain

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("switched_on")]
DRAWN = 20


@pytest.fixture(autouse=True)
def small_too(monkeypatch):
    monkeypatch.setattr(gain, "on", False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Models by architecture, as they are asked for."""
    folder, made = tmp_path_factory.mktemp("hostile"), {}

    def of(kind):
        if kind not in made:
            with torch.random.fork_rng():
                made[kind] = hostile.made(kind, folder)
        return made[kind]

    return of


def test_drawn_edits_are_honoured(plain):
    """Every architecture, and as many kinds of edits as there are cases."""
    edits, first = list(hostile.EDITS), int(torch.randint(len(hostile.KINDS), ()))
    for i, number in enumerate(torch.randperm(len(edits))[:DRAWN].tolist()):
        kind = hostile.KINDS[(first + i) % len(hostile.KINDS)]
        seed = int(torch.randint(1 << 30, ()))
        state = torch.get_rng_state()
        attempt(
            Case.drawn(kind, edits[number : number + 1], hostile_cases.CALLS, seed), plain(kind), undone=seed % 4 == 0
        )
        torch.set_rng_state(state)


# What was ignored once.
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "name, call",
    [
        ("class_of_a_parameter", "encoded"),
        ("class_of_a_parameter", "gradient"),
        ("method_of_a_registry", "base_model"),
        ("step_that_reads_hidden_rows", "embedding"),
        ("Tensor.sum", "gradient"),
        ("Tensor.sum", "embedding"),
        ("a_buffer_with_gaps", "encoded"),
        ("a_mock", "encoded"),
        ("dropout_that_stays_on", "encoded"),
        ("forward_of_the_class_of_the_model", "encoded"),
        ("forward_that_reads_hidden_rows", "embedding"),
        ("gradient_asked_of_the_embeddings", "gradient"),
        ("gradient_asked_of_the_embeddings", "training"),
        ("memory_given_back", "encoded"),
        ("memory_given_back", "training"),
        ("method_of_one_object", "encoded"),
        ("module_that_comes_twice", "encoded"),
        ("names_that_the_model_is_given", "encoded"),
        ("activation_with_another_gradient", "gradient"),
        ("dropout_by_the_forward_of_another_class", "training"),
        ("no_gradient_through", "gradient"),
        ("tensor_for_a_parameter", "encoded"),
        ("tensor_for_a_parameter", "gradient"),
    ],
)
def test_edits_that_were_ignored(name, call, called, plain):
    for seed in range(2):
        attempt(Case("bert", name, call, called, seed), plain("bert"), undone=False)


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_every_dropout_has_its_own_mode(kind, plain):
    for call in ("embedding", "gradient") * 4:
        seed = int(torch.randint(1 << 30, ()))
        attempt(Case(kind, "modes_of_modules", call, seed % 2 == 0, seed), plain(kind), undone=False)
