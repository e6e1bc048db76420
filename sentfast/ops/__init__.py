"""The operators: per family the schema, the public function with its docstring, and the gradient."""

from sentfast import native
from sentfast.ops import attention, encoder, layers, linear, losses, pooling, search, similarity

native.load()

__all__ = ["attention", "encoder", "layers", "linear", "losses", "pooling", "search", "similarity"]
