"""Locks that a forked process finds free.

A fork copies a lock as it is; if another thread held it, the child, which does not have that thread, would wait for
ever. All locks of sentfast are made here. They are re-entrant, because a signal handler or a finaliser may call
sentfast in the middle of a call. They are Python's own objects, because a KeyboardInterrupt can leave a lock of Python
code locked, between taking it and noting that.
"""

from __future__ import annotations

import os
import threading
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def new() -> Any:
    """A ``threading.RLock``."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # as Python's own modules do


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_free)
