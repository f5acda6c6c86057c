"""How far something is that takes its time, such as the making of data, told to whoever watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

#: Called with what is done, how much of it, and of how much, if that is known.
Watcher = Callable[[str, int, int | None], None]


def _nobody(what: str, done: int, whole: int | None) -> None:
    """Nobody watches."""


_watcher: ContextVar[Watcher] = ContextVar("watcher", default=_nobody)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher`` told of all that is done in here."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(what: str, done: int, whole: int | None = None) -> None:
    """Say how far it is."""
    _watcher.get()(what, done, whole)


def telling(what: str, items: Collection[T]) -> Iterator[T]:
    """The items, one after the other; said is how many of them are done."""
    for done, item in enumerate(items):
        tell(what, done, len(items))
        yield item
    tell(what, len(items), len(items))


def blocks(what: str, count: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of blocks that make ``count`` together; said is how many of all are done."""
    for first in range(0, count, size):
        tell(what, first, count)
        yield first, min(size, count - first)
    tell(what, count, count)
