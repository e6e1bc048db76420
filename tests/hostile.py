"""Edits and patches of every kind that somebody may make to a model, to its tokenizer or around a call.

Each is a function of a SentenceTransformer: it edits at once, and may return a context manager in which the call runs.
`patch` is a MonkeyPatch that is undone afterwards.
"""

from __future__ import annotations

import hostile_code
import hostile_deeper
import hostile_gradients
import hostile_models
import hostile_surroundings
import hostile_texts
from hostile_common import KINDS, TEXTS, InapplicableError, made, one

__all__ = ["EDITS", "KINDS", "SHOWN_BY", "TEXTS", "InapplicableError", "made", "one"]

_TRAINS, _OF_A_SENTENCE = ("gradient", "training"), ("encoded", "embedding", "gradient", "training", "scores")
# The calls whose result shows an edit, where not each does.
SHOWN_BY = {
    "config_value": ("base_model",),
    "dropout_of_a_module": ("training",),
    "functional.dropout": ("training",),
    "frozen": _TRAINS,
    "gradient_mode": _TRAINS,
    "array_of_a_tensor": ("encoded",),
    "numpy_function": ("encoded",),
    "torch.stack": ("encoded", "scores"),
    "Tensor.cpu": ("encoded", "scores"),
    "functional.normalize": ("encoded", "scores"),
    "lower_limit": ("encoded", "scores"),
    "own_default": ("scores",),
    "prompts": ("encoded", "scores"),
    "similarity": ("scores",),
    "truncated_dimension": ("encoded", "scores"),
    "utility": ("encoded", "scores"),
    "utility_function": ("scores",),
    "dense": _OF_A_SENTENCE,
    "edited_dense": _OF_A_SENTENCE,
    "hook_on_a_module_of_the_sentence_model": _OF_A_SENTENCE,
    "modules_in_another_order": _OF_A_SENTENCE,
    "normalized": _OF_A_SENTENCE,
    "own_normalize": _OF_A_SENTENCE,
    "pooling_mode": _OF_A_SENTENCE,
    "pooling_of_a_subclass": _OF_A_SENTENCE,
    "pooling_step_of_the_instance": _OF_A_SENTENCE,
    "transformer_arguments": _OF_A_SENTENCE,
    "step_that_reads_hidden_rows": _OF_A_SENTENCE,
    "several_modes": _OF_A_SENTENCE,
    "backward_hook": _TRAINS,
    "backward_hook_of_the_sentence_model": _TRAINS,
    "gradient_asked_of_the_embeddings": _TRAINS,
    "hook_of_a_gradient": _TRAINS,
    "method_of_one_object": ("encoded", "scores"),
    "dropout_that_stays_on": ("encoded", "scores"),
    "forward_that_reads_hidden_rows": _OF_A_SENTENCE,
    "module_that_comes_twice": _OF_A_SENTENCE,
    "names_that_the_model_is_given": _OF_A_SENTENCE,
    "method_of_the_model": ("encoded", "scores"),
    "prompt_edited": ("encoded", "scores"),
    "prompt_left_out": ("encoded", "scores"),
    "similarity_of_the_model": ("scores",),
    "activation_with_another_gradient": _TRAINS,
    "function_with_another_gradient": _TRAINS,
    "no_gradient_through": _TRAINS,
    "dropout_by_the_forward_of_another_class": ("training",),
    "modes_of_modules": ("base_model", "embedding", "gradient"),
}

EDITS = {
    **{edit.__name__: edit for edit in hostile_code.FUNCTIONS},
    **hostile_code.EDITS,
    **hostile_deeper.EDITS,
    **hostile_gradients.EDITS,
    **hostile_models.EDITS,
    **hostile_surroundings.EDITS,
    **hostile_texts.EDITS,
}
