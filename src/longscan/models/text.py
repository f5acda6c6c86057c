"""Text from tokens as they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

# What decoders put where bytes are no character (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one row of tokens piece by piece; the pieces joined are the text.

    Holds back a last character that may still be incomplete and a tail that may begin a stop string. Keeps a short
    window of tokens, however long the text.
    """

    # Tokens kept as context (decoders treat a first token's space in their own way), and when to cut back to that.
    _CONTEXT = 8
    _WINDOW = 32
    _LIMIT = 256

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._emitted = 0
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Take a token; returns new text that is final, and whether a stop string was met (the text ends before it)."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = not text.endswith(_REPLACEMENT)
        end = len(text) if complete else len(text) - 1
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if (complete and len(self._window) > self._WINDOW) or len(self._window) > self._LIMIT:
            self._window = self._window[-self._CONTEXT :]
            self._emitted = len(self._decode(self._window))
        return self._release(piece)

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        rest = self._held + self._decode(self._window)[self._emitted :] if self._window else self._held
        self._window, self._held, self._emitted = [], "", 0
        return rest

    def _release(self, piece: str) -> tuple[str, bool]:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self._window, self._held, self._emitted = [], "", 0
            return text[: min(found)], True
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
