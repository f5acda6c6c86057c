"""Text pieces: joined they are the text, and they end before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.models.text import TextStream


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def stream(data: bytes, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    text, pieces = TextStream(decode, stop), []
    for token in data:
        piece, stopped = text.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, text.finish()], False


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(max_size=120))
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces, stopped = stream(text.encode())
    assert "".join(pieces) == text
    assert not stopped


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab", max_size=60),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = stream(text.encode(), stop)
    assert stopped == any(string in text for string in stop)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in stop)]
    expected = text
    if ends:
        seen = text[: ends[0]]
        expected = seen[: min(seen.find(string) for string in stop if string in seen)]
    assert "".join(pieces) == expected


def test_a_character_comes_whole() -> None:
    pieces, _ = stream("aé😀b".encode())
    assert [piece for piece in pieces if piece] == ["a", "é", "😀", "b"]


@pytest.mark.parametrize("data", [b"\xff" * 600, b"a\xe2\x82", b"\xf0\x9f", b"ok\xffok"])
def test_bytes_that_are_no_text(data: bytes) -> None:
    text = TextStream(decode)
    joined = "".join(text.push(token)[0] for token in data)
    assert len(text._window) <= 256
    joined += text.finish()
    assert joined.startswith(decode(data)[:20])
    assert len(data) == 600 or joined == decode(data)


def test_leading_spaces_of_word_pieces() -> None:
    """Decoders of word pieces drop the first token's space; in the middle of a text it must stay."""
    words = [" one", " two", " three"]
    text = TextStream(lambda tokens: "".join(words[token] for token in tokens).lstrip(" "))
    pieces = [text.push(token % 3)[0] for token in range(120)]
    assert "".join(pieces) + text.finish() == "".join(words[token % 3] for token in range(120)).lstrip(" ")


def test_the_window_is_short() -> None:
    text = TextStream(decode)
    for _ in range(1000):
        text.push(97)
    assert len(text._window) <= 33
