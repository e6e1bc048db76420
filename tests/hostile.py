"""Edits and patches of every kind that somebody may make to a model, to its tokenizer or around a call.

Each is a function of a SentenceTransformer: it edits at once, and may return a context manager in which the call runs.
`patch` is a MonkeyPatch that is undone afterwards.
"""

from __future__ import annotations

import hostile_code
import hostile_models
import hostile_surroundings
import hostile_texts
from hostile_common import KINDS, TEXTS, InapplicableError, made, one

__all__ = ["EDITS", "KINDS", "TEXTS", "InapplicableError", "made", "one"]

EDITS = {
    **{edit.__name__: edit for edit in hostile_code.FUNCTIONS},
    **hostile_code.EDITS,
    **hostile_models.EDITS,
    **hostile_surroundings.EDITS,
    **hostile_texts.EDITS,
}
