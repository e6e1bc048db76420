"""The code that the patched functions of ``sentence_transformers.util`` run.

Each body is put into a function of sentence-transformers, where only that function's globals exist: hence the import
inside. The argument names are those of the originals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

replacements: dict[str, Callable] = {}


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
