"""Ways to damage files, drawn by hypothesis; and what a reader may do with one: read it, or refuse it in words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from longscan.errors import LongscanError

#: Any JSON value, small.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

#: Text that no parser of nested values can follow to its end.
DEEP = "[" * 100_000


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int | None = None) -> bytes:
    """A file's bytes cut short, with some of them changed, or with a stretch of others put in.

    Args:
        content: the sound file.
        head: damage is within so many bytes of the beginning; None: anywhere.
    """
    reach = st.integers(0, (len(content) if head is None else min(head, len(content))) - 1)
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(reach)
        match draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
            case "flip":
                changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del changed[place:]
            case "insert":
                changed[place:place] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del changed[place : place + draw(st.integers(1, 9))]
    return bytes(changed)


@contextlib.contextmanager
def refused_or_read(folder: Path) -> Iterator[None]:
    """Inside, only our own errors may come, with words; no file may come to or go from the working folder."""
    before = names(folder)
    said = "nothing"
    try:
        yield
    except LongscanError as error:
        said = str(error)
    assert said.strip()
    assert names(folder) == before


def names(folder: Path) -> list[Any]:
    """All files below a folder."""
    return sorted(os.path.join(place, name) for place, _, files in os.walk(folder) for name in files)
