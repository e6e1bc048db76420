"""Exact search as functions: the best rows, the pairs above a threshold, their number, and hard negatives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sentfast.ops import checks
from sentfast.ops import search as ops
from sentfast.search import arguments, inputs, segments
from sentfast.search.corpus import Corpus
from sentfast.search.results import Pairs, Stats, TopK

Metric = Literal["cos", "dot", "euclidean"]


def topk(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    metric: Metric | None = None,
    threshold: float | None = None,
    exclude_self: bool = False,
    exclude: Any = None,
    ceiling: Any = None,
    progress: bool = False,
) -> TopK:
    r"""The k best rows of a corpus for each query, exactly: by score descending, equal scores by index.

    The score is the cosine :math:`q \cdot r / (|q| |r|)` (0 for a zero row), the product :math:`q \cdot r` or
    :math:`-|q - r|`, summed in float64 over the float32 rows and rounded once to float32. No score matrix is held.

    Args:
        queries: [Q, D] of float32, float16 or bfloat16, as tensor, array or list; one vector is one query. A tensor is
            on the corpus's device, the CPU or a GPU.
        corpus: [N, D] as queries, or a :class:`Corpus`, which is packed once for many searches.
        k: 1 to N.
        metric: "cos", "dot" or "euclidean"; None for "cos", or for the metric of the :class:`Corpus`.
        threshold: only rows with at least this score.
        exclude_self: the queries are the first rows of the corpus, and no row finds itself.
        exclude: rows that each query must not find: one index or a list of them per query.
        ceiling: only rows with at most this score, a number or one for each query.
        progress: show a progress bar.

    Returns:
        ``(scores, indices)``, float32 and int64 [Q, k]; places without a row hold -inf and -1. Arrays where the queries
        are an array, else tensors on the corpus's device. ``.stats`` is the :class:`Stats`.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype or range; the message names it.

    Follows ``sentence_transformers.util.semantic_search``.
    """
    return searched(corpus, _count(queries)).topk(
        queries,
        k,
        metric=metric,
        threshold=threshold,
        exclude_self=exclude_self,
        exclude=exclude,
        ceiling=ceiling,
        progress=progress,
    )


def pairs_above(
    queries: Any, corpus: Any = None, *, threshold: float, metric: Metric | None = None, progress: bool = False
) -> Pairs:
    """Every pair of a query and a row with a score of at least `threshold`, by query and then by index.

    Args:
        queries: as of :func:`topk`.
        corpus: as of :func:`topk`; None joins `queries`, which may be a :class:`Corpus`, with itself: each pair once,
            row i with the rows after it, in half the work.
        threshold, metric, progress: as of :func:`topk`.

    Returns:
        :class:`Pairs`, as large as there are pairs: :func:`count_above` says how many, in no memory.

    Raises: as :func:`topk`.
    """
    limit = checks.number("threshold", threshold)
    name = "queries" if corpus is None else "corpus"
    within = searched(queries if corpus is None else corpus, _count(queries), name)
    wanted = None if corpus is None else arguments.queries(queries, within.dim, within.device)
    none = torch.empty(0, dtype=torch.int64, device=within.device)
    counts, rows, scores = [none.new_zeros(1)], [none], [none.float()]
    stats = Stats()
    for part, first in within.blocks(wanted, "Pairing" if checks.flag("progress", progress) else ""):
        number, found, values, done = segments.pairs_above(
            within.segments, part, limit, within.metric_of(metric), first=first
        )
        counts.append(number)
        rows.append(found)
        scores.append(values)
        stats += done
    within.stats += stats
    result = Pairs(torch.cat(counts).cumsum(0), torch.cat(rows), torch.cat(scores), stats)
    return result.numpy() if arguments.wants_numpy(queries) else result


def count_above(
    queries: Any, corpus: Any, *, threshold: float, metric: Metric | None = None, progress: bool = False
) -> Any:
    """The number of rows with a score of at least `threshold`, int64 [Q]. Arguments and errors: as of :func:`topk`."""
    within = searched(corpus, _count(queries))
    counts, stats = segments.count_above(
        within.segments,
        arguments.queries(queries, within.dim, within.device),
        checks.number("threshold", threshold),
        within.metric_of(metric),
        "Counting" if checks.flag("progress", progress) else "",
    )
    within.stats += stats
    return counts.cpu().numpy() if arguments.wants_numpy(queries) else counts


def hard_negatives(
    queries: Any,
    corpus: Any,
    positives: Any,
    k: int,
    *,
    metric: Metric | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    progress: bool = False,
) -> TopK:
    """The k best rows for each query that are no positive of it and not too near to one.

    A row counts as a negative if its score s satisfies ``min_score <= s <= max_score``, and with the lowest score p of
    the query's positives ``s <= p - absolute_margin`` and ``s <= p - |p| * relative_margin``.

    Args:
        queries, corpus, k, metric, progress: as of :func:`topk`.
        positives: the rows that are right for each query: one index or a list of them per query.

    Returns, raises: as :func:`topk`. Follows ``sentence_transformers.util.mine_hard_negatives``.
    """
    most = float("inf") if max_score is None else checks.number("max_score", max_score)
    least = None if min_score is None else checks.number("min_score", min_score)
    within = searched(corpus, _count(queries))
    count = len(arguments.queries(queries, within.dim, within.device))
    if arguments.excluded(positives, False, count, len(within), torch.device("cpu"), "positives") is None:
        raise TypeError("positives: expected one index or a list of them for each query, got None")
    ceiling = torch.full((count,), most, dtype=torch.float32, device="cpu")
    if absolute_margin is not None or relative_margin is not None:
        lowest = _positive_scores(queries, within, positives, metric)
        if absolute_margin is not None:
            ceiling = torch.minimum(ceiling, lowest - checks.number("absolute_margin", absolute_margin))
        if relative_margin is not None:
            margin = lowest.abs() * checks.number("relative_margin", relative_margin)
            ceiling = torch.minimum(ceiling, lowest - margin)
    return within.topk(
        queries,
        k,
        metric=metric,
        threshold=least,
        exclude=positives,
        ceiling=ceiling,
        progress=progress,
    )


def _positive_scores(queries: Any, within: Corpus, positives: Any, metric: str | None) -> Tensor:
    """The lowest score of each query with its positives, on the CPU; infinite where it has none."""
    wanted = arguments.queries(queries, within.dim, within.device)
    right = arguments.excluded(positives, False, len(wanted), len(within), torch.device("cpu"))
    assert right is not None
    offsets, ids = (x.tolist() for x in right)
    lowest = torch.full((len(wanted),), float("inf"), dtype=torch.float32, device="cpu")
    for number, start in enumerate(offsets[:-1]):
        rows = within.rows(ids[start : offsets[number + 1]])
        if len(rows):
            scores = ops.topk(wanted[number : number + 1], rows, k=len(rows), metric=within.metric_of(metric)).scores
            lowest[number] = scores[0, -1]
    return lowest


def searched(corpus: Any, queries: int, name: str = "corpus") -> Corpus:
    """The corpus; rows that are no Corpus yet become one for this search."""
    return corpus if isinstance(corpus, Corpus) else Corpus.for_one_search(arguments.rows(name, corpus), queries)


def _count(queries: Any) -> int:
    """How many there are, which decides how they are searched for; what is no matrix is refused later."""
    return len(queries) if isinstance(queries, Corpus) else len(inputs.matrix("queries", queries))
