"""Ways to damage files, drawn by hypothesis; and what a reader may do with one: read it, or refuse it in words.

Meanwhile Python's audit events are watched: a reader writes, deletes, starts and unpickles nothing, anywhere.
"""

from __future__ import annotations

import contextlib
import os
import sys
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


#: Audit events of what a reader has no business with, but for what the interpreter and torch do at an import.
_DEEDS = (
    "os.chmod", "os.exec", "os.fork", "os.link", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir",
    "os.symlink", "os.system", "os.truncate", "pickle.find_class", "shutil.rmtree", "socket.connect",
    "subprocess.Popen",
)  # fmt: skip
_deeds: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _deeds is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    imports = ("__pycache__", "torchinductor")
    if (writes or event in _DEEDS) and not any(name in str(arguments[0]) for name in imports):
        _deeds.append(f"{event}{arguments}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def nothing_done() -> Iterator[None]:
    """Inside, nothing may be written or deleted, no program started, nothing unpickled."""
    global _deeds
    before, _deeds = _deeds, []
    try:
        yield
    finally:
        deeds, _deeds = _deeds, before
    assert not deeds, deeds


@contextlib.contextmanager
def refused_or_read(folder: Path) -> Iterator[None]:
    """Inside, only our own errors may come, with words; no file may come to or go from the working folder."""
    before = names(folder)
    said = "nothing"
    with nothing_done():
        try:
            yield
        except LongscanError as error:
            said = str(error)
    assert said.strip()
    assert names(folder) == before


def names(folder: Path) -> list[Any]:
    """All files below a folder."""
    return sorted(os.path.join(place, name) for place, _, files in os.walk(folder) for name in files)
