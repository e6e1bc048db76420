"""CUDA graphs of small batches, without CUDA: a "graph" calls the function again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import encoders
import pytest
import torch
from cuda_encoders import composed, interpreted, on_triton, packed_texts, without_graphs
from torch import Tensor

from sentfast import registry
from sentfast.encoder import composed as composed_module
from sentfast.encoder import graphs


class Repeating:
    """Stands for CUDA: a "graph" calls the function again, which finds the block as it is then."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.turns = 0, 0, 0

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        output = run().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output

    @contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield


@pytest.fixture
def capture(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repeating]:
    found = Repeating()
    monkeypatch.setattr(composed_module, "captures", lambda device: True)
    monkeypatch.setattr(composed_module, "CudaCapture", lambda device: found)
    # The compiled CPU kernels refuse offsets that leave tokens out; those of a GPU cannot look, and read the rows of
    # sequences alone. Attention leaves the others unwritten, which is NaN here.
    pool = composed_module._pool
    monkeypatch.setattr(composed_module, "_pool", lambda x, mask, ends, *o: pool(x[: ends[-1]], mask, ends, *o))
    with registry.use_backend("reference"):
        yield found


def test_buckets() -> None:
    assert graphs.shape_of(1, 1, 1) == (16, 2, 16)
    assert graphs.shape_of(16, 2, 14) == (16, 2, 16)
    assert graphs.shape_of(17, 4, 5) == (32, 4, 16)
    assert graphs.shape_of(300, 1, 300) == (512, 64, 512)
    assert graphs.shape_of(300, 60, 17) == (512, 64, 32)
    assert graphs.shape_of(graphs.MOST_TOKENS, 8, 256) == (2048, 256, 256)
    assert graphs.shape_of(graphs.MOST_TOKENS + 1, 8, 256) is None
    assert graphs.shape_of(30, 5, 16) is None  # more sequences than there is room for
    assert graphs.shape_of(0, 1, 0) is None


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "modernbert"])
def test_graphs_give_the_same_results(model_type: str, capture: Repeating) -> None:
    """Batches of one bucket, longer and shorter than the one it was made for, with more and fewer sequences.

    Each fills the block anew: offsets, ids and types of another batch would be seen.
    """
    made = encoders.model(model_type)
    encoder = composed(made)
    shapes = [[9, 3], [9, 3], [20], [16, 4, 1, 2], [1] * 4, [31], [5], [3, 28], [32], [2, 2, 28]]
    for text_lengths in shapes + shapes[::-1]:
        ids, ends = packed_texts(text_lengths)
        options: dict[str, Any] = {"modes": ("mean", "cls"), "prompt_length": 1, "normalize": True}
        if model_type == "bert" and len(text_lengths) > 1:
            options["token_type_ids"] = torch.randint(0, 2, ids.shape, dtype=torch.int32)
        result = encoder.run(ids, ends, **options)
        expected = without_graphs(encoder, ids, ends, **options)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert 0 < capture.recorded <= 4 and capture.replayed == capture.turns >= 14


def test_a_longer_text_gets_launches_of_its_own(capture: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest sequence is fixed when a graph is made. Each attention is told at least what its batch has."""
    told = []
    operator = composed_module._varlen_attention

    def attention(*args: Any) -> Tensor:
        told.append((args[4], int(args[3].diff().max())))
        return operator(*args)

    monkeypatch.setattr(composed_module, "_varlen_attention", attention)
    encoder = composed(encoders.model("bert"))
    for text_lengths in ([15, 15], [15, 15], [15, 15], [28, 2], [28, 2], [28, 2], [1, 16], [16, 16]):
        encoder.run(*packed_texts(text_lengths), modes=("mean",))
    assert capture.replayed == 6 and {bound for bound, _ in told} >= {16, 32}
    assert all(longest <= bound for bound, longest in told)


def test_graphs_of_other_options_are_apart(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    ids, ends = packed_texts([7])
    for options in ({"modes": ("mean",)}, {"modes": ("cls",)}, {"modes": ("mean",), "normalize": True}) * 3:
        result = encoder.run(ids, ends, **options)
        torch.testing.assert_close(result, without_graphs(encoder, ids, ends, **options), rtol=1e-5, atol=1e-5)
    assert capture.recorded == 3 and capture.replayed == 6


def test_results_are_not_overwritten_by_the_next_replay(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    texts = [packed_texts([8]) for _ in range(4)]
    results = [encoder.run(*text, modes=("mean",)) for text in texts]
    for text, result in zip(texts, results, strict=True):
        torch.testing.assert_close(result, without_graphs(encoder, *text, modes=("mean",)), rtol=1e-5, atol=1e-5)
    assert capture.replayed == 3


def test_only_so_many_graphs_are_kept(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    found = encoder._graphs
    assert found is not None
    found._most = 2
    for text_lengths in ([5], [5], [20], [20], [40], [40], [20], [5], [5]):
        encoder.run(*packed_texts(text_lengths), modes=("mean",))
        assert len(found) <= 2
    assert capture.recorded == 4  # the one of 5 tokens was dropped, the one of 20 was not


def test_new_weights_drop_the_graphs(capture: Repeating) -> None:
    made = encoders.model("bert")
    text = packed_texts([6])
    for _ in range(3):
        old = composed(made).run(*text, modes=("mean",))
    assert capture.recorded == 1
    made.encoder.layer[0].attention.self.query.weight.mul_(2)
    for _ in range(3):
        new = composed(made).run(*text, modes=("mean",))
    assert capture.recorded == 2
    assert not torch.allclose(old, new)
    torch.testing.assert_close(new, without_graphs(composed(made), *text, modes=("mean",)), rtol=1e-5, atol=1e-5)


def test_a_capture_that_fails_is_not_tried_again(capture: Repeating, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Any) -> Any:
        capture.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", record)
    encoder, text = composed(encoders.model("bert")), packed_texts([6])
    results = [encoder.run(*text, modes=("mean",)) for _ in range(4)]
    assert capture.recorded == 1 and all(torch.equal(result, results[0]) for result in results)


def test_large_batches_and_token_embeddings_use_no_graph(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    for _ in range(3):
        encoder.run(*packed_texts([6]))
        encoder.run(*packed_texts([60] * 35), modes=("mean",))
    assert not capture.recorded


def test_threads_do_not_disturb_each_other(capture: Repeating) -> None:
    encoder = composed(encoders.model("bert"))
    texts = [packed_texts([4 + i % 5]) for i in range(40)]
    expected = [without_graphs(encoder, *text, modes=("mean",)) for text in texts]

    def run(text: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad(), registry.use_backend("reference"):
            return encoder.run(*text, modes=("mean",))

    with ThreadPoolExecutor(4) as pool:
        for result, one in zip(pool.map(run, texts), expected, strict=True):
            torch.testing.assert_close(result, one, rtol=1e-5, atol=1e-5)
    assert capture.replayed >= 38


@interpreted
@pytest.mark.usefixtures("on_cpu")
def test_triton_interpreted_with_room_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a bucket: tokens that belong to no sequence and sequences without tokens, as the block of a graph has them."""
    monkeypatch.setattr(composed_module, "captures", lambda device: True)
    monkeypatch.setattr(composed_module, "CudaCapture", lambda device: found)
    found = Repeating()
    encoder = composed(encoders.model("mpnet"))
    for text_lengths in ([5], [3, 9], [4], [16]):
        text = packed_texts(text_lengths)
        with on_triton("varlen_attention", "pool"):
            result = encoder.run(*text, modes=("mean",))
        torch.testing.assert_close(result, without_graphs(encoder, *text, modes=("mean",)), rtol=1e-4, atol=1e-4)
    assert found.replayed == 3
