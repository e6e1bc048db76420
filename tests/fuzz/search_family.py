"""Search and mining over drawn embeddings: scores, ids, options, ties, NaN, and bad arguments."""

from __future__ import annotations

from typing import Any

import torch
from compare import Ranking
from draw import Draw, Raised
from sentence_transformers import util
from sentence_transformers.util.similarity import euclidean_sim, manhattan_sim

SCORES = (util.cos_sim, util.dot_score, euclidean_sim, manhattan_sim, lambda a, b: a @ b.T + 1)


def case(draw: Draw) -> dict[str, Any]:
    functions = {"search": search, "paraphrases": paraphrases, "communities": communities}
    return functions[draw.one_of("function", tuple(functions))](draw)


def embeddings(draw: Draw, name: str, rows: int, dimension: int, dtype: torch.dtype) -> Any:
    """Clusters, so that some are near each other; sometimes equal rows, or one that is spoilt."""
    centers = torch.randn(5, dimension, generator=draw.generator("centers"))
    x = centers[draw.integers(f"clusters of {name}", 0, 4, rows)] + 0.3 * torch.randn(
        rows, dimension, generator=draw.generator(name)
    )
    kind = draw.one_of(f"spoilt {name}", ("nothing", "zero", "nan", "inf", "large"), p=0.12)
    if rows and kind != "nothing":
        place = draw.integer(f"place in {name}", 0, rows - 1)
        x[place] = {"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "large": 1e19}[kind]
    x = x.to(dtype)
    form = draw.one_of(f"form of {name}", ("tensor", "numpy", "list", "lists", "strided"), p=0.2)
    x = draw.real(x)
    if form == "numpy":
        return x.numpy() if x.dtype != torch.bfloat16 else x.float().numpy()
    forms = {"list": lambda: list(x), "lists": x.tolist, "strided": lambda: x.repeat_interleave(2, 1)[:, ::2]}
    return forms[form]() if form in forms else x


def shape(draw: Draw) -> tuple[int, torch.dtype]:
    dtype = draw.one_of("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), p=0.2)
    return draw.one_of("dimension", (16, 1, 3, 33, 128, 384)), dtype


def magnitude(x: Any) -> float:
    """Dot products are as large as the squares of the rows."""
    numbers = torch.as_tensor(x).double() if not isinstance(x, list) else torch.tensor([[1.0]])
    finite = numbers[numbers.isfinite().all(-1)]
    return max(1.0, finite.square().sum(-1).max().item() if len(finite) else 1.0)


def search(draw: Draw) -> dict[str, Any]:
    dimension, dtype = shape(draw)
    queries = embeddings(draw, "queries", draw.one_of("queries", (3, 1, 20)), dimension, dtype)
    corpus = embeddings(draw, "corpus", draw.one_of("corpus", (20, 1, 7, 300, 1500)), dimension, dtype)
    options: dict[str, Any] = {"top_k": draw.one_of("top_k", (10, 1, 3, 5000, 0, -1, 2.5), p=0.5)}
    if draw.chance("score function", 0.5):
        options["score_function"] = draw.one_of("which score", SCORES)
    for name in draw.some_of("chunks", ("query_chunk_size", "corpus_chunk_size"), 0.15):
        options[name] = draw.one_of(name, (2, 7, 0))
    found = draw.attempt(util.semantic_search, queries, corpus, **options)
    if isinstance(found, Raised):
        return {"found": found}
    size = max(magnitude(queries), magnitude(corpus)) if "score_function" in options else 1.0
    rankings = [
        Ranking([hit["corpus_id"] for hit in hits], [hit["score"] for hit in hits], size=size) for hits in found
    ]
    types = [{key: type(value).__name__ for key, value in hits[0].items()} for hits in found if hits]
    return {"rankings": rankings if dtype == torch.float32 else [len(r.ids) for r in rankings], "types": types}


def paraphrases(draw: Draw) -> dict[str, Any]:
    dimension, _ = shape(draw)
    x = embeddings(draw, "x", draw.one_of("rows", (20, 1, 2, 120)), dimension, torch.float32)
    options: dict[str, Any] = {"top_k": draw.one_of("top_k", (100, 1, 5))}
    if dimension == 1 or draw.values.get("spoilt x") in ("zero", "large"):
        # All cosines are 1 or -1, or all of a row 0: which of its equals are among its best is chance.
        options["top_k"] = 120
    options["max_pairs"] = draw.one_of("max_pairs", (500000, 10, 1))
    found = draw.attempt(util.paraphrase_mining_embeddings, x, **options)
    if isinstance(found, Raised):
        return {"found": found}
    if dimension == 1 and draw.values.get("spoilt x") in ("nan", "inf"):
        # Where NaN stands among equals, sorting leaves the order of all, and so what max_pairs cuts off, to chance.
        return {"pairs": len(found)}
    return {"pairs": Ranking([tuple(pair[1:]) for pair in found], [pair[0] for pair in found])}


def communities(draw: Draw) -> dict[str, Any]:
    dimension, _ = shape(draw)
    x = embeddings(draw, "x", draw.one_of("rows", (20, 1, 60, 150)), dimension, torch.float32)
    options = {
        "threshold": draw.one_of("threshold", (0.75, 0.9, 0.3, -1.0, 1.5)),
        "min_community_size": draw.one_of("size", (3, 1, 10)),
        "batch_size": draw.one_of("batch_size", (1024, 7)),
    }
    found = draw.attempt(util.community_detection, x, **options)
    if isinstance(found, Raised):
        return {"found": found}
    # The order of equal sizes and of members with equal scores is left to chance.
    return {"sizes": sorted(len(each) for each in found), "members": sorted(sorted(each) for each in found)}
