"""The cells of never_slower.py: calls of patched functions by sizes, widths and dtypes."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Cell:
    """make: () -> the call to time, the same with sentfast on and off. quick: part of the short form.

    function: under which it stands in the table; site: by which name the report counts calls that the original takes.
    """

    name: str
    make: Callable[[], Call]
    quick: bool = False

    @property
    def function(self) -> str:
        return re.split(r"[, ]+(?=[0-9a-z_]*\d)", self.name)[0]

    @property
    def site(self) -> str:
        name = self.function.split(",")[0].split()[0]
        return f"{name}.forward" if name in ("Pooling", "Normalize") else name


def _rows(count: int, width: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def _util(function: str, *operands: tuple[int, int], dtype: str = "float32", **arguments: Any) -> Callable[[], Call]:
    """A call of a function of sentence_transformers.util with random rows."""

    def make() -> Call:
        from sentence_transformers import util

        rows = [_rows(*size, dtype, seed) for seed, size in enumerate(operands)]
        return lambda: getattr(util, function)(*rows, **arguments)

    return make


def _matrices() -> Iterator[Cell]:
    quick = {(1, 1, 384), (300, 300, 2), (10, 1000, 384), (1000, 1000, 384)}
    sizes = ((1, 1), (1, 1000), (10, 1000), (300, 300), (1000, 1000), (1, 100000))
    for function, (a, b), width in itertools.product(("cos_sim", "dot_score"), sizes, (2, 32, 384, 1024)):
        for dtype in DTYPES if (a, b) in ((10, 1000), (300, 300), (1000, 1000)) else ("float32",):
            name = f"{function} {a} x {b} x {width} {dtype}"
            make = _util(function, (a, width), (b, width), dtype=dtype)
            yield Cell(name, make, (a, b, width) in quick and dtype == "float32")


def _pairs() -> Iterator[Cell]:
    functions = ("cos_sim", "dot_score", "euclidean_sim", "manhattan_sim", "angle_sim")
    for function, count, width in itertools.product(functions, (1, 100, 10000, 100000), (2, 8, 32, 384, 1024)):
        if count * width > 40e6:
            continue
        make = _util(f"pairwise_{function}", (count, width), (count, width))
        yield Cell(f"pairwise_{function} {count} x {width}", make, count == 100 and width in (8, 384))
    for function, count, dtype in itertools.product(functions, (1, 100, 10000), HALVES):
        make = _util(f"pairwise_{function}", (count, 384), (count, 384), dtype=dtype)
        yield Cell(f"pairwise_{function} {count} x 384 {dtype}", make)
    for count, width in itertools.product((1, 100, 10000), (2, 32, 384, 1024)):
        make = _util("normalize_embeddings", (count, width))
        yield Cell(f"normalize_embeddings {count} x {width}", make, count == 100)


def _searches() -> Iterator[Cell]:
    sizes = ((1, 10), (1, 1000), (1, 10000), (1, 100000), (10, 20000), (16, 10000), (63, 10000), (64, 1000))
    sizes += ((100, 1000), (100, 10000), (500, 5000), (1000, 1000))
    quick = {(1, 1000, 384), (100, 1000, 384), (10, 20000, 8), (64, 1000, 384)}
    for (queries, rows), width in itertools.product(sizes, (2, 8, 16, 32, 64, 384, 1024)):
        make = _util("semantic_search", (queries, width), (rows, width))
        yield Cell(f"semantic_search {queries} x {rows} x {width}", make, (queries, rows, width) in quick)
    sizes = ((1, 1000), (1, 10000), (16, 10000), (63, 10000), (500, 5000))
    for (queries, rows), width, dtype in itertools.product(sizes, (32, 384, 1024), HALVES):
        make = _util("semantic_search", (queries, width), (rows, width), dtype=dtype)
        yield Cell(f"semantic_search {queries} x {rows} x {width} {dtype}", make)
    for rows, width in itertools.product((5, 100, 500, 2000), (2, 32, 384)):
        make = _util("paraphrase_mining_embeddings", (rows, width))
        yield Cell(f"paraphrase_mining_embeddings {rows} x {width}", make, (rows, width) == (100, 384))
        make = _util("community_detection", (rows, width), threshold=0.75, min_community_size=2)
        yield Cell(f"community_detection {rows} x {width}", make, (rows, width) == (500, 384))


def _drawn(seed: int) -> Iterator[Cell]:
    """Sizes that nobody has thought of, each power of two as likely as the next."""
    draw = random.Random(seed)

    def size(most: int, least: int = 1) -> int:
        return int(2 ** draw.uniform(math.log2(least), math.log2(most)))

    for function, count in (
        ("semantic_search", 24),
        ("cos_sim", 8),
        ("dot_score", 8),
        ("paraphrase_mining_embeddings", 4),
    ):
        for _ in range(count):
            width, many = size(1024, least=2), size(40_000)
            few = size(min(many, 20_000_000 // many, 1000))
            pair = function != "paraphrase_mining_embeddings"
            operands = [(few, width), (many, width)] if pair else [(size(2000), width)]
            name = " x ".join(map(str, [*(rows for rows, _ in operands), width]))
            yield Cell(f"{function} {name}, drawn", _util(function, *operands))


def _pooling() -> Iterator[Cell]:
    modes = ("mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
    for mode, (count, tokens), width in itertools.product(modes, ((1, 8), (32, 128), (8, 512)), (32, 384, 1024)):
        for dtype in DTYPES if (count, width) == (32, 384) else ("float32",):
            name = f"Pooling {mode} {count} x {tokens} x {width}{'' if dtype == 'float32' else ' ' + dtype}"
            quick = (count, width, dtype) == (32, 384, "float32")
            yield Cell(name, _pooled(mode, count, tokens, width, dtype), quick)
    for count, width in itertools.product((1, 100, 10000), (2, 384, 1024)):

        def module(count: int = count, width: int = width) -> Call:
            from sentence_transformers.base.modules.normalize import Normalize

            normalize, rows = Normalize(), _rows(count, width)
            return lambda: normalize({"sentence_embedding": rows})

        yield Cell(f"Normalize {count} x {width}", module)


def _pooled(mode: str, count: int, tokens: int, width: int, dtype: str) -> Callable[[], Call]:
    def make() -> Call:
        from sentence_transformers.sentence_transformer.modules import Pooling

        pooling = Pooling(width, pooling_mode=mode)
        mask = torch.ones(count, tokens, dtype=torch.int64)
        embeddings = torch.randn(count, tokens, width).to(DTYPES[dtype])
        return lambda: pooling({"token_embeddings": embeddings, "attention_mask": mask})

    return make


def _losses() -> Iterator[Cell]:
    """From embeddings to their gradients, and the similarities of a model."""
    for pairs, width in itertools.product((2, 16, 64, 256, 1024), (32, 384)):

        def make(pairs: int = pairs, width: int = width) -> Call:
            from sentence_transformers.sentence_transformer import losses

            loss = losses.MultipleNegativesRankingLoss(_model())
            columns = [_rows(pairs, width, seed=seed).requires_grad_() for seed in range(2)]
            return lambda: loss.compute_loss_from_embeddings(columns, None).backward()

        yield Cell(f"MultipleNegativesRankingLoss {pairs} x {width}", make, (pairs, width) == (64, 384))
    for a, b in ((1, 1), (1, 1000), (300, 300)):

        def similarity(a: int = a, b: int = b) -> Call:
            rows, others = _rows(a, 384), _rows(b, 384, seed=1)
            return lambda: _model().similarity(rows, others)

        yield Cell(f"model.similarity {a} x {b} x 384", similarity)


def _training() -> Iterator[Cell]:
    for pairs, words in ((2, 12), (16, 12), (8, 100)):

        def make(pairs: int = pairs, words: int = words) -> Call:
            from sentence_transformers.sentence_transformer import losses

            model = _model("tiny")
            loss = losses.MultipleNegativesRankingLoss(model)
            columns = [_texts(pairs, words, seed) for seed in range(2)]

            def step() -> None:
                model.train()
                loss([model.preprocess(texts) for texts in columns], None).backward()
                model.eval()

            return step

        yield Cell(f"training step, BERT-tiny, {pairs} pairs of {words} words", make)


def _encoding() -> Iterator[Cell]:
    sizes = ((1, 1), (1, 12), (1, 100), (8, 12), (32, 12), (32, 100))
    for name, (count, words) in itertools.product(("minilm", "tiny", "tiny_plain"), (*sizes, (4, 500))):
        if (name, words) == ("minilm", 500):  # it cuts texts at 128 tokens
            continue

        def make(name: str = name, count: int = count, words: int = words) -> Call:
            model, texts = _model(name), _texts(count, words)
            return lambda: model.encode(texts, show_progress_bar=False)

        title = {"minilm": "MiniLM", "tiny": "BERT-tiny", "tiny_plain": "BERT-tiny in plain transformers"}[name]
        quick = name == "minilm" and (count, words) in ((1, 12), (32, 12))
        yield Cell(f"encode, {title}, {count} texts of {words} words", make, quick)


def _halves() -> Iterator[Cell]:
    for dtype, (count, words) in itertools.product(HALVES, ((1, 12), (32, 12), (32, 100))):

        def make(dtype: str = dtype, count: int = count, words: int = words) -> Call:
            model, texts = _model("minilm", dtype), _texts(count, words)
            return lambda: model.encode(texts, show_progress_bar=False)

        yield Cell(f"encode, MiniLM, {dtype}, {count} texts of {words} words", make)


def _texts(count: int, words: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    known = ["cat", "market", "fell", "sleeps", "kitten", "naps", "house", "river", "stone", "paper", "walk", "under"]
    return [" ".join(draw.choices(known, k=words)) for _ in range(count)]


_models: dict[tuple[str, str], Any] = {}


def _model(name: str = "minilm", dtype: str = "float32") -> Any:
    """In its own code where sentfast is off, whoever has called it before."""
    if (name, dtype) not in _models:
        from encode_models import MODELS

        import sentfast

        model = _models[name, dtype] = MODELS[name].build()[0]
        if dtype != "float32":
            model.to(DTYPES[dtype])
        if name == "tiny_plain":
            sentfast.accelerate(model.base, padded_rows="zeros")
    return _models[name, dtype]


def handed_over() -> dict[str, tuple[Callable, Callable, tuple[Any, ...]]]:
    """For each function that has a rule: a patched one that hands over to nothing, that nothing, and small operands."""
    from sentfast.integrations import gain, guards

    def one(embeddings: Any) -> None:
        pass

    def two(a: Any, b: Any) -> None:
        pass

    found: dict[str, tuple[Callable, Callable, tuple[Any, ...]]] = {}
    for name in gain.RULES:
        loop = name in ("semantic_search", "paraphrase_mining_embeddings", "community_detection")
        original: Callable = one if loop and name != "semantic_search" else two
        rows = _rows(2 if name != "cos_sim" else gain.MOST_NARROW_ROWS, 2)
        wrap = guards.accelerated_loop if loop else guards.accelerated
        found[name] = wrap(name, original, original), original, (rows,) * (1 if original is one else 2)
    return found


def cells(seed: int = 0) -> list[Cell]:
    """The same on every run, but those whose sizes are drawn."""
    fixed = [*_matrices(), *_pairs(), *_searches(), *_pooling(), *_losses(), *_encoding(), *_halves(), *_training()]
    names = {cell.name for cell in fixed}
    return [*fixed, *{cell.name: cell for cell in _drawn(seed) if cell.name not in names}.values()]
