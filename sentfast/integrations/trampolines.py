"""The code that the patched functions of ``sentence_transformers.util`` run.

It is put into a function of sentence-transformers, where only that function's globals exist: hence the import inside.
It names the package alone, because any longer import takes a microsecond.
The argument names are those of the originals, so that keyword calls and ``inspect.signature`` stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

replacements: dict[str, Callable] = {}
# What the functions did before, by their code now.
_originals: dict[CodeType, Callable] = {}

_SOURCE = """
def {name}({arguments}):
    import sentfast

    return sentfast.integrations.trampolines.replacements["{name}"]({arguments})
"""
_NEGATIVES = (
    "dataset model anchor_column_name positive_column_name corpus cross_encoder range_min range_max max_score min_score"
    " absolute_margin relative_margin num_negatives sampling_strategy query_prompt_name query_prompt corpus_prompt_name"
    " corpus_prompt include_positives output_format {scores}batch_size faiss_batch_size use_faiss use_multi_process"
    " verbose cache_folder as_triplets margin"
)
# The argument lists that each function has had: another one is a function that we do not know.
_ARGUMENTS = {
    "cos_sim": ("a b",),
    "dot_score": ("a b",),
    "pairwise_cos_sim": ("a b",),
    "pairwise_dot_score": ("a b",),
    "pairwise_euclidean_sim": ("a b",),
    "pairwise_manhattan_sim": ("a b",),
    "pairwise_angle_sim": ("x y",),
    "normalize_embeddings": ("embeddings",),
    "semantic_search": ("query_embeddings corpus_embeddings query_chunk_size corpus_chunk_size top_k score_function",),
    "paraphrase_mining_embeddings": ("embeddings query_chunk_size corpus_chunk_size max_pairs top_k score_function",),
    "community_detection": ("embeddings threshold min_community_size batch_size show_progress_bar",),
    "mine_hard_negatives": (_NEGATIVES.format(scores="output_scores "), _NEGATIVES.format(scores="")),
}


def code_for(name: str, original: CodeType) -> CodeType | None:
    """The code that calls ``replacements[name]`` with the arguments of `original`; None where they are unknown."""
    for names in _ARGUMENTS[name]:
        found = _code(name, names.split())
        if _arguments(found) == _arguments(original):
            return found
    return None


def original_of(function: Any) -> Callable | None:
    """What a function did before it got code of ours; None for any other function."""
    return _originals.get(getattr(function, "__code__", None))  # type: ignore[arg-type]


def put(name: str, code: CodeType, original: Callable, replacement: Callable) -> CodeType:
    """Lets functions with the code run `replacement`."""
    code = code.replace()
    replacements[name], _originals[code] = replacement, original
    return code


_GATE = """
def {name}({arguments}):
    # A tracer and a mode see who looks at a size. What else compiles hands over tensors of a type of its own.
    if not is_compiling() and not is_tracing() and not modes() and small({arguments}) and is_enabled():
        if TOO_SMALL in counts:
            counts[TOO_SMALL] += 1
        else:
            first()
        return original({arguments})
    return others({arguments})
"""


def gate(name: str, arguments: str, names: dict[str, Any]) -> Callable:
    """What hands `small` calls to `original` and the `others` on: with arguments by name, in the fewest steps.

    names: what the code reads besides its arguments.
    """
    made = dict(names)
    exec(compile(_GATE.format(name=name, arguments=arguments), __file__, "exec"), made)
    return made[name]


def _code(name: str, names: list[str]) -> CodeType:
    made: dict[str, Any] = {}
    exec(compile(_SOURCE.format(name=name, arguments=", ".join(names)), __file__, "exec"), made)
    return made[name].__code__


def _arguments(code: CodeType) -> tuple[Any, ...]:
    names = code.co_varnames[: code.co_argcount]
    return names, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags & 12, code.co_freevars
