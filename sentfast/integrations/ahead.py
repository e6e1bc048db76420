"""An iterator that works ahead of its reader, in one thread that ends with it."""

from __future__ import annotations

import functools
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()
# Seconds after which a thread that waits for its reader looks whether the program has ended.
_LOOK = 0.2
# Seconds that a reader waits for the thread to end; it ends at the next place where it may be stopped anyway.
_WAIT = 0.1


class _Reader:
    """Lives as long as somebody reads."""


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def ahead(items: Iterable[Item | None], most: int = 1) -> Generator[Item, None, None]:
    """The same items, made in a thread that is at most `most` of them ahead.

    None among the items stands for a place where the thread may be stopped; the reader does not see it. Close the
    generator (``contextlib.closing``) to stop the thread; an error of `items` is raised here.
    """
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    permits = threading.Semaphore(most)
    stopped = threading.Event()
    reader = _Reader()
    wanted = functools.partial(_wanted, stopped, weakref.ref(reader))
    # Not a daemon: the interpreter waits for it at its end, and it looks whether that has come.
    thread = threading.Thread(target=_work, args=(items, made, permits, wanted), name="sentfast-ahead", daemon=False)
    try:
        thread.start()
        while (item := made.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            permits.release()
            yield item
    finally:
        # Even where a signal interrupts this, the thread ends: with the reader, which goes with this frame.
        stopped.set()
        permits.release()
        if thread.is_alive():
            thread.join(_WAIT)


def _wanted(stopped: threading.Event, reader: weakref.ref[_Reader]) -> bool:
    return not stopped.is_set() and reader() is not None and threading.main_thread().is_alive()


def _work(
    items: Iterable[Any], made: queue.SimpleQueue[Any], permits: threading.Semaphore, wanted: Callable[[], bool]
) -> None:
    try:
        for item in items:
            if item is not None:
                made.put(item)
                while not permits.acquire(timeout=_LOOK):
                    if not wanted():
                        return
            if not wanted():
                return
        made.put(_END)
    except BaseException as error:  # whatever it is, the reader is the one to be told
        made.put(_Failure(error))
