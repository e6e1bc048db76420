"""The operators: per family the schema, the public function with its docstring, and the gradient."""

from sentfast import native
from sentfast.ops import encoder, losses, pooling, similarity

native.load()

__all__ = ["encoder", "losses", "pooling", "similarity"]
