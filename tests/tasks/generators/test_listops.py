"""List operations: the compiled values against a parser that knows only the text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import DataError
from longscan.tasks.generators.listops import PADDING, SYMBOLS, expressions

SMALL = {"max_depth": 4, "max_args": 4, "above": 3, "under": 60}


def text_of(tokens: np.ndarray) -> str:
    return " ".join(SYMBOLS[token] for token in tokens if token != PADDING)


def value_of(words: Iterator[str]) -> int | None:
    """The value of the expression that comes next; None: a closing bracket."""
    word = next(words)
    if word == "]":
        return None
    if word.isdigit():
        return int(word)
    arguments = list(iter(lambda: value_of(words), None))
    assert len(arguments) >= 2
    return {"[MAX": max, "[MIN": min, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}[word](
        arguments
    )


def depth_of(text: str) -> int:
    """Of the deepest node, where the root is at 1."""
    open_brackets = np.cumsum([word.startswith("[") - (word == "]") for word in text.split()])
    return 1 + int(open_brackets.max())


def widest(text: str) -> int:
    """Most arguments of an operator."""
    most, counts = 0, [0]
    for word in text.split():
        if word == "]":
            most = max(most, counts.pop())
        else:
            counts[-1] += 1
            if word.startswith("["):
                counts.append(0)
    return most


def check(tokens: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> list[str]:
    texts = []
    for row, length, value in zip(tokens, lengths, values, strict=True):
        assert (row[:length] != PADDING).all()
        assert (row[length:] == PADDING).all()
        texts.append(text_of(row))
        words = iter(texts[-1].split())
        assert value_of(words) == value
        assert next(words, None) is None
    return texts


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    depth=st.integers(3, 7),
    args=st.integers(3, 10),
    above=st.integers(3, 8),
    room=st.integers(20, 200),
)
def test_values_are_those_of_a_plain_parser(seed: int, depth: int, args: int, above: int, room: int) -> None:
    tokens, lengths, values = expressions(
        20, seed=seed, max_depth=depth, max_args=args, above=above, under=above + room
    )
    texts = check(tokens, lengths, values)
    assert above < lengths.min() <= lengths.max() < above + room == tokens.shape[1] + 1
    assert len(set(texts)) == 20
    assert max(map(depth_of, texts)) <= depth
    assert max(map(widest, texts)) <= args


def test_at_the_numbers_of_the_arena() -> None:
    tokens, lengths, values = expressions(300, seed=1)
    texts = check(tokens, lengths, values)
    assert 500 < lengths.min() <= lengths.max() < 2000
    assert max(map(depth_of, texts)) == 10
    assert max(map(widest, texts)) == 10
    assert set(" ".join(texts).split()) == set(SYMBOLS[1:])
    # Minimum and maximum make 0 and 9 the commonest values, which always guessing one gets right.
    shares = np.bincount(values, minlength=10) / 300
    assert set(np.argsort(shares)[-2:]) == {0, 9}
    assert shares.max() < 0.3


def test_the_seed_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = expressions(60, seed=3, **SMALL)
    for part, full in zip(expressions(20, seed=3, **SMALL), whole, strict=True):
        assert np.array_equal(part, full[:20])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for one, several in zip(expressions(60, seed=3, **SMALL), whole, strict=True):
        assert np.array_equal(one, several)
    assert not np.array_equal(whole[0], expressions(60, seed=4, **SMALL)[0])


def test_no_expression_comes_twice() -> None:
    # Of length 4 there are 4 operators with two digits each: 400.
    tokens, lengths, values = expressions(300, seed=0, max_depth=2, max_args=2, above=3, under=5)
    assert len(set(check(tokens, lengths, values))) == 300
    with pytest.raises(DataError, match="had only 400 different ones"):
        expressions(401, seed=0, max_depth=2, max_args=2, above=3, under=5)


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(DataError, match=r"no expression of length 501 to 1999"):
        expressions(10, seed=0, max_depth=2)
