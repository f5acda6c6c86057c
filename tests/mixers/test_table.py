"""The table of docs/mixers.md: every mixer is in it, with the size that its state has."""

from __future__ import annotations

import re
from pathlib import Path

from longscan.mixers import MIXERS

PAGE = Path(__file__).parents[2] / "docs" / "mixers.md"
ROW = re.compile(r'\| `"(\w+)"` \| `(\w+)` \|.*\| ([\d,]+) B( a token)? \|')


def test_states_are_as_large_as_the_table_says() -> None:
    """At width 256 in float32: after a hundred tokens, or, where it grows, by each."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert {name: kind for name, kind, _, _ in rows} == {name: kind.__name__ for name, kind in MIXERS.items()}
    for name, _, size, grows in rows:
        mixer = MIXERS[name](256)
        before = mixer.state_bytes(1, 99) if grows else 0
        assert mixer.state_bytes(1, 100) - before == int(size.replace(",", "")), name
