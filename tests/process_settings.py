"""What a program sets for all of PyTorch, changed for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def _changed(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return _changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def threads(count: int) -> AbstractContextManager[None]:
    return _changed(torch.get_num_threads, torch.set_num_threads, count)
