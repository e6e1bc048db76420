"""An iterator that works ahead of its reader, in one thread that ends with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def ahead(items: Iterable[Item], most: int = 1) -> Generator[Item, None, None]:
    """The same items, made in a thread that is at most `most` of them ahead.

    Close the generator (``contextlib.closing``) to be sure that the thread has ended; an error of `items` is raised
    here.
    """
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    permits = threading.Semaphore(most)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                made.put(item)
                permits.acquire()
                if stopped.is_set():
                    return
            made.put(_END)
        except BaseException as error:  # also KeyboardInterrupt: the reader is the one to be interrupted
            made.put(_Failure(error))

    thread = threading.Thread(target=work, name="sentfast-ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            permits.release()
            yield item
    finally:
        stopped.set()
        permits.release()
        thread.join()
