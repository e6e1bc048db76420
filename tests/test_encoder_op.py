"""The packed encoder's operator on every CPU instruction set: values, bits, edges, errors and threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import ROUNDINGS, assert_accurate
from backends import BACKENDS, Backend
from encoder_cases import CASES, CLS, MAX, MEAN, MODERN, VOCABULARY, Batch, Config, Model, packed, random_batch
from process_settings import threads
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sentfast.functional as F
from sentfast import reference, registry
from sentfast.ops.encoder import encoder

CPU = [backend for backend in BACKENDS if backend.device == "cpu" and not backend.slow]
COMPILED = [backend for backend in CPU if backend.name == "cpu"]
every_compiled = pytest.mark.parametrize("backend", COMPILED, ids=str)
every_panels = pytest.mark.parametrize(
    "panels", (torch.float32, torch.bfloat16, None), ids=("float32", "bfloat16", "matrices")
)
needs_compiled = pytest.mark.skipif(not COMPILED, reason="about the compiled CPU kernels")


def assert_same(result: Tensor, expected: Tensor, what: object = "") -> None:
    """Every element, NaN for NaN."""
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


# ---- values ----


class BFloat16Products(TorchFunctionMode):
    """Rounds to bf16 what is multiplied: the inputs of linear layers, queries, keys, values, attention weights.

    So the reference becomes the plain program that bf16 weights stand for, and its error the yardstick of kernels
    that read bf16 and sum in float32.
    """

    PRODUCTS = (torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = (*(x.bfloat16().to(x.dtype) for x in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


@every_panels
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, panels: torch.dtype) -> None:
    case = CASES[name]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    dtype = torch.float32 if torch.rand(()) < 0.5 else dtypes[int(torch.randint(1, 3, ()))]
    model = Model(replace(case.config, panels=panels, dtype=dtype))
    batch = random_batch(case.lengths, **case.inputs)
    with registry.use_backend("reference"):
        exact = model.double()(batch, **case.options)
        if panels == torch.bfloat16:
            with BFloat16Products():
                eager = model(batch, **case.options)
        else:
            eager = model(batch, **case.options)
    # Besides, the kernels' elementary functions may be off by a quarter of bf16's last place: one place in the result.
    size = 0.0
    if panels == torch.bfloat16:
        finite = exact[exact.isfinite()].abs()
        places = torch.finfo(torch.bfloat16).eps / (ROUNDINGS * torch.finfo(dtype).eps)
        size = places * finite.max().item() if finite.numel() else 0.0
    for backend in CPU:
        with backend.forced("encoder"):
            result = model(batch, **case.options)
        assert result.dtype == dtype
        assert_accurate(result, eager, exact, size=size, what=f"{name} on {backend}, {dtype}, {panels}")


# ---- bits ----


def alone(model: Model, sequences: Sequence[Tensor], **options: Any) -> Tensor:
    with threads(1):
        return torch.cat([model(packed([s]), **options) for s in sequences])


# From one group that all threads share step by step, to groups of which each thread carries its own; the last model
# has no layer that is worth a second thread.
LENGTHS = {"one": [150], "three": [140, 90, 139], "some": [1, 60, 33, 2, 120, 0, 17], "many": [3, 40, 18, 7, 25] * 8}
CONFIGS = {
    "relative bias": Config(reach=150, positions=150, heads=2, intermediate=128),
    "rotary": replace(MODERN, windows=(-1, 8), intermediate=128),
    "small": Config(hidden=8, heads=1, intermediate=8, positions=150, layers=1),
}


@every_panels
@every_compiled
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_do_not_depend_on_neighbours_or_threads(name: str, backend: Backend, panels: torch.dtype) -> None:
    model = Model(replace(CONFIGS[name], panels=panels))
    longest = 80 if model.config.rotary else 150
    with backend.forced("encoder"):
        for lengths in LENGTHS.values():
            sequences = random_batch([min(n, longest) for n in lengths]).sequences()
            for options in ({"modes": (MEAN,), "normalize": True}, {"modes": (CLS,)}):
                expected = alone(model, sequences, **options)
                order = torch.randperm(len(sequences))
                shuffled = packed([sequences[i] for i in order])
                for count in (1, 2, 3, 4):
                    with threads(count):
                        assert torch.equal(model(packed(sequences), **options), expected)
                        assert torch.equal(model(shuffled, **options), expected[order])


@every_panels
@every_compiled
def test_results_of_every_kind_agree_bitwise(backend: Backend, panels: torch.dtype) -> None:
    model = Model(replace(CONFIGS["relative bias"], panels=panels))
    for lengths in LENGTHS.values():
        batch = random_batch(lengths, token_types=True)
        with backend.forced():
            tokens = model(batch)
            for modes in (range(6), (CLS,), (MEAN,)):
                names = [reference.POOLING_MODES[mode] for mode in modes]
                for prompt_length, normalize in ((0, True), (2, False)):
                    options: dict[str, Any] = {"prompt_length": prompt_length, "normalize": normalize}
                    pooled = F.pool(tokens, mode=names, cu_seqlens=batch.cu_seqlens, **options)
                    assert_same(model(batch, modes=modes, **options), pooled, (names, options))
            for longest in (max(lengths), max(lengths) + 9):
                padded = model(batch, padded_length=longest)
                expected = torch.zeros(len(lengths), longest, tokens.shape[1])
                for row, rows in zip(expected, tokens.split(lengths), strict=True):
                    row[: len(rows)] = rows
                assert torch.equal(padded, expected)


@every_compiled
def test_nan_stays_in_its_sequence(backend: Backend) -> None:
    model = Model(CONFIGS["relative bias"])
    sequences = [s.clamp(max=VOCABULARY - 2) for s in random_batch([9, 30, 1, 17, 64]).sequences()]
    options = {"modes": (MEAN, MAX), "normalize": True}
    with backend.forced("encoder"):
        expected = model(packed(sequences), **options)
        model.words[-1, 3] = float("nan")
        for spoiled in range(len(sequences)):
            changed = [s.clone() for s in sequences]
            changed[spoiled][0] = VOCABULARY - 1
            result = model(packed(changed), **options)
            assert result[spoiled].isnan().all()
            others = torch.arange(len(sequences)) != spoiled
            assert torch.equal(result[others], expected[others])


# ---- errors ----


def without_last(model: Model, batch: Batch) -> None:
    model.weights.pop()


def weight(index: int, value: Tensor) -> Any:
    def change(model: Model, batch: Batch) -> None:
        model.weights[index] = value

    return change


def config(**changes: Any) -> Any:
    def change(model: Model, batch: Batch) -> None:
        model.config = replace(model.config, **changes)

    return change


def batch(name: str, value: Any) -> Any:
    def change(model: Model, batch: Batch) -> None:
        setattr(batch, name, value)

    return change


def words(value: Tensor) -> Any:
    def change(model: Model, batch: Batch) -> None:
        model.words = value

    return change


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


IDS = (7, 1, 0, 9, 4)  # a sequence of two and one of three
HEAD = 10  # tensors before those of the first layer
BAD: dict[str, tuple[Any, str]] = {
    "a weight too few": (without_last, "weights: expected 10 tensors and 14 for each layer, got 37"),
    "no layer": (lambda m, b: m.weights.__delitem__(slice(HEAD, None)), "weights: expected .* got 10"),
    "positions": (weight(0, torch.randn(80, 63)), r"weights\[0\]: expected a contiguous CPU table of 64 columns"),
    "types in half": (weight(1, torch.randn(2, 64).half()), r"weights\[1\]: .* dtype of word_embeddings"),
    "norm": (weight(2, torch.ones(63)), r"weights\[2\]: expected a contiguous float32 CPU tensor of 64"),
    "norm in half": (weight(2, torch.ones(64).half()), r"weights\[2\]: expected a contiguous float32"),
    "strided norm": (weight(3, torch.ones(128)[::2]), r"weights\[3\]: expected a contiguous float32"),
    "projection": (weight(4, torch.randn(1, 64, 63)), r"weights\[4\]: expected panels|heads"),
    "bias table": (weight(6, torch.randn(3, 159)), r"weights\[6\]: expected a contiguous .* of 636 elements"),
    "flat bias table": (weight(6, torch.randn(4 * 159)), "weights: expected attention_bias of shape"),
    "rotary": (weight(7, torch.randn(2, 80, 8)), r"weights\[7\]: expected a contiguous float32"),
    "flat rotary": (weight(7, torch.randn(80, 16)), "weights: expected rotary of shape"),
    "panels": (weight(HEAD, torch.randn(3, 63, 64)), r"weights\[10\]: expected panels of 192 by 64"),
    "matrix of other features": (
        weight(HEAD + 4, torch.randn(64, 65)),
        r"weights\[14\]: expected a contiguous float32",
    ),
    "panels of two dtypes": (weight(HEAD + 8, torch.randn(2, 32, 64, 2).bfloat16()), r"weights\[18\]: expected panels"),
    "down": (weight(HEAD + 10, torch.randn(64)), "weights: expected the down projection"),
    "down of others": (weight(HEAD + 10, torch.randn(1, 200, 64)), r"weights\[18\]: expected panels of 200 by 64"),
    "windows": (config(windows=(4,)), "windows: expected none or one per layer"),
    "activation": (config(activation=4), "activation: expected 0 to 3, got 4"),
    "heads": (config(heads=3), "heads: expected heads of a multiple of 8 columns, got 3 for 64"),
    "small heads": (config(heads=16), "heads: expected heads of a multiple of 8 columns"),
    "no heads": (config(heads=0), "heads: expected heads"),
    "words": (words(torch.randn(64)), r"word_embeddings: expected a contiguous \[V, E\]"),
    "transposed words": (words(torch.randn(64, 50).T), "word_embeddings: expected a contiguous"),
    "other words": (words(torch.randn(50, 72)), r"weights\[|heads"),
    "negative id": (batch("ids", ints(7, -1, 0, 9, 4)), "input_ids: expected 0 to 49, got -1"),
    "large id": (batch("ids", ints(7, 1, 0, 50, 4)), "input_ids: expected 0 to 49, got 50"),
    "long ids": (batch("ids", torch.tensor(IDS)), "input_ids: expected a contiguous int32"),
    "square ids": (batch("ids", ints(*IDS).view(1, 5)), "input_ids: expected a contiguous int32"),
    "no lengths": (batch("cu_seqlens", ints()), "cu_seqlens: expected shape"),
    "long lengths": (batch("cu_seqlens", torch.tensor([0, 5])), "cu_seqlens: expected a contiguous int32"),
    "falling": (batch("cu_seqlens", ints(0, 4, 3, 5)), "cu_seqlens: expected to rise from 0 to 5"),
    "past the end": (batch("cu_seqlens", ints(0, 6, 5)), "cu_seqlens: expected to rise from 0 to 5"),
    "not from 0": (batch("cu_seqlens", ints(1, 5)), "cu_seqlens: expected to rise from 0 to 5"),
    "not to the end": (batch("cu_seqlens", ints(0, 4)), "cu_seqlens: expected to rise from 0 to 5"),
    "overflow": (batch("cu_seqlens", ints(0, -(2**31), 2**31 - 1, 5)), "cu_seqlens: expected to rise"),
    "types": (batch("token_types", ints(0, 1, 2, 0, 0)), "token_type_ids: expected 0 to 1, got 2"),
    "number of types": (batch("token_types", ints(0, 1)), "token_type_ids: expected 5 elements, got 2"),
    "positions given": (batch("positions", ints(0, 1, 2, 0, 80)), "position_ids: expected 0 to 79, got 80"),
    "negative position": (batch("positions", ints(0, 1, 2, 0, -1)), "position_ids: expected 0 to 79, got -1"),
    "number of positions": (batch("positions", ints(0)), "position_ids: expected 5 elements, got 1"),
    "too long": (config(position_offset=78), "input_ids: expected sequences of at most 2 tokens, got 3"),
    "offset": (config(position_offset=-1), "input_ids: expected"),
    "largest offset": (config(position_offset=2**63 - 1), "input_ids: expected|position_offset: expected"),
    "too long for the bias": (weight(6, torch.randn(4, 3)), "input_ids: expected sequences of at most 2 tokens, got 3"),
    "too long for rotary": (weight(7, torch.randn(2, 2, 16)), "input_ids: expected sequences of at most 2 tokens"),
}
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"modes": (6,)}, "modes: unknown mode 6"),
    "negative mode": ({"modes": (0, -1)}, "modes: unknown mode -1"),
    "modes": ({"modes": (0,) * 9}, "modes: expected at most 8 modes, got 9"),
    "prompt": ({"prompt_length": -1}, "prompt_length: expected 0 or more, got -1"),
    "padded length": ({"padded_length": 2}, "padded_length: expected at least the longest sequence, got 2"),
}


@needs_compiled
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    model, five = Model(Config()), Batch(ints(*IDS), ints(0, 2, 5))
    with COMPILED[-1].forced("encoder"):
        assert model(five, modes=(MEAN,)).isfinite().all()
        change, message = BAD[name]
        change(model, five)
        with pytest.raises(RuntimeError, match=message):
            model(five, modes=(MEAN,))


@needs_compiled
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    options, message = BAD_OPTIONS[name]
    with COMPILED[-1].forced("encoder"), pytest.raises(RuntimeError, match=message):
        Model(Config())(Batch(ints(*IDS), ints(0, 2, 5)), **options)


@every_panels
def test_a_projection_of_odd_width(panels: torch.dtype) -> None:
    model, five = Model(Config(embedding=23, panels=panels)), Batch(ints(*IDS), ints(0, 2, 5))
    for backend in COMPILED:
        with backend.forced("encoder"):
            if panels != torch.bfloat16:
                assert model(five).isfinite().all()
                continue
            with pytest.raises(RuntimeError, match="word_embeddings: expected an even number of columns"):
                model(five)


# ---- PyTorch ----


@pytest.mark.parametrize("options", ({"modes": (MEAN, CLS)}, {"padded_length": 9}, {}), ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    arguments = Model(Config()).arguments(random_batch([4, 9], token_types=True), **options)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(encoder.overload, arguments, test_utils=tests)


def test_compiles_without_a_break() -> None:
    model, batch = Model(Config()), random_batch([4, 9])
    compiled = torch.compile(
        lambda ids, cu_seqlens: 2 * model(Batch(ids, cu_seqlens), modes=(MEAN,)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(batch.ids, batch.cu_seqlens), 2 * model(batch, modes=(MEAN,)))


# ---- threads and processes ----


@every_compiled
def test_python_threads_at_once(backend: Backend) -> None:
    model = Model(CONFIGS["relative bias"])
    batches = [random_batch(lengths) for lengths in LENGTHS.values()] * 4
    with backend.forced("encoder"):
        expected = [model(batch, modes=(MEAN,)) for batch in batches]
    overload = encoder.overload  # a forced backend belongs to the thread that forced it
    arguments = [model.arguments(batch, modes=(MEAN,)) for batch in batches]
    with backend.forced(), ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda args: overload(*args), arguments * 2))
    for result, want in zip(results, expected * 2, strict=True):
        assert torch.equal(result, want)


@needs_compiled
def test_fork_after_use() -> None:
    model, batch = Model(CONFIGS["relative bias"]), random_batch(LENGTHS["three"])
    with COMPILED[-1].forced("encoder"), threads(2):
        expected = model(batch, modes=(MEAN,))
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as a worker of a DataLoader
            os._exit(0 if torch.equal(model(batch, modes=(MEAN,)), expected) else 1)
    deadline, ended = time.monotonic() + 60, (0, 0)
    while ended == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
        ended = os.waitpid(child, os.WNOHANG)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


@needs_compiled
def test_other_python_threads_go_on() -> None:
    model, batch = Model(Config(hidden=256, intermediate=1024)), random_batch([60] * 30)
    seen: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    with COMPILED[0].forced("encoder"), threads(1):
        watcher.start()
        begin = time.perf_counter()
        model(batch, modes=(MEAN,))
        end = time.perf_counter()
    done.set()
    watcher.join()
    # Only the middle of the call: at its ends Python itself is at work.
    quarter = (end - begin) / 4
    assert any(begin + quarter < moment < end - quarter for moment in seen)
