"""The code that the patched functions of ``sentence_transformers.util`` run.

Each body is put into a function of sentence-transformers, where only that function's globals exist: hence the import
inside. The argument names are those of the originals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

replacements: dict[str, Callable] = {}


def of(attribute: str) -> list[Callable]:
    """The bodies for a function, one for each of the argument lists that it has had."""
    return [function for name, function in globals().items() if name.partition("__")[0] == attribute]


def cos_sim(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["cos_sim"](a, b)


def dot_score(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["dot_score"](a, b)


def pairwise_cos_sim(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["pairwise_cos_sim"](a, b)


def pairwise_dot_score(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["pairwise_dot_score"](a, b)


def pairwise_euclidean_sim(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["pairwise_euclidean_sim"](a, b)


def pairwise_manhattan_sim(a: Any, b: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["pairwise_manhattan_sim"](a, b)


def normalize_embeddings(embeddings: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["normalize_embeddings"](embeddings)


def pairwise_angle_sim(x: Any, y: Any) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["pairwise_angle_sim"](x, y)


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: Any,
    corpus_chunk_size: Any,
    top_k: Any,
    score_function: Any,
) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["semantic_search"](
        query_embeddings,
        corpus_embeddings,
        query_chunk_size,
        corpus_chunk_size,
        top_k,
        score_function,
    )


def paraphrase_mining_embeddings(
    embeddings: Any,
    query_chunk_size: Any,
    corpus_chunk_size: Any,
    max_pairs: Any,
    top_k: Any,
    score_function: Any,
) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["paraphrase_mining_embeddings"](
        embeddings,
        query_chunk_size,
        corpus_chunk_size,
        max_pairs,
        top_k,
        score_function,
    )


def community_detection(
    embeddings: Any,
    threshold: Any,
    min_community_size: Any,
    batch_size: Any,
    show_progress_bar: Any,
) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["community_detection"](
        embeddings,
        threshold,
        min_community_size,
        batch_size,
        show_progress_bar,
    )


def mine_hard_negatives(
    dataset: Any,
    model: Any,
    anchor_column_name: Any,
    positive_column_name: Any,
    corpus: Any,
    cross_encoder: Any,
    range_min: Any,
    range_max: Any,
    max_score: Any,
    min_score: Any,
    absolute_margin: Any,
    relative_margin: Any,
    num_negatives: Any,
    sampling_strategy: Any,
    query_prompt_name: Any,
    query_prompt: Any,
    corpus_prompt_name: Any,
    corpus_prompt: Any,
    include_positives: Any,
    output_format: Any,
    output_scores: Any,
    batch_size: Any,
    faiss_batch_size: Any,
    use_faiss: Any,
    use_multi_process: Any,
    verbose: Any,
    cache_folder: Any,
    as_triplets: Any,
    margin: Any,
) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["mine_hard_negatives"](
        dataset,
        model,
        anchor_column_name,
        positive_column_name,
        corpus,
        cross_encoder,
        range_min,
        range_max,
        max_score,
        min_score,
        absolute_margin,
        relative_margin,
        num_negatives,
        sampling_strategy,
        query_prompt_name,
        query_prompt,
        corpus_prompt_name,
        corpus_prompt,
        include_positives,
        output_format,
        output_scores,
        batch_size,
        faiss_batch_size,
        use_faiss,
        use_multi_process,
        verbose,
        cache_folder,
        as_triplets,
        margin,
    )


def mine_hard_negatives__without_scores(
    dataset: Any,
    model: Any,
    anchor_column_name: Any,
    positive_column_name: Any,
    corpus: Any,
    cross_encoder: Any,
    range_min: Any,
    range_max: Any,
    max_score: Any,
    min_score: Any,
    absolute_margin: Any,
    relative_margin: Any,
    num_negatives: Any,
    sampling_strategy: Any,
    query_prompt_name: Any,
    query_prompt: Any,
    corpus_prompt_name: Any,
    corpus_prompt: Any,
    include_positives: Any,
    output_format: Any,
    batch_size: Any,
    faiss_batch_size: Any,
    use_faiss: Any,
    use_multi_process: Any,
    verbose: Any,
    cache_folder: Any,
    as_triplets: Any,
    margin: Any,
) -> Any:
    from sentfast.integrations.trampolines import replacements

    return replacements["mine_hard_negatives"](
        dataset,
        model,
        anchor_column_name,
        positive_column_name,
        corpus,
        cross_encoder,
        range_min,
        range_max,
        max_score,
        min_score,
        absolute_margin,
        relative_margin,
        num_negatives,
        sampling_strategy,
        query_prompt_name,
        query_prompt,
        corpus_prompt_name,
        corpus_prompt,
        include_positives,
        output_format,
        batch_size,
        faiss_batch_size,
        use_faiss,
        use_multi_process,
        verbose,
        cache_folder,
        as_triplets,
        margin,
    )
