"""Samples that can be read are drawn as text, short enough to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from longscan.plots.samples import _LINE, _LINES, _wrapped, plot_samples
from longscan.tasks.arena_standins import RetrievalStandin
from longscan.tasks.listops import ListOps

PARTS = {"train": 5, "valid": 1, "test": 1}


@pytest.mark.parametrize("task", [ListOps(**PARTS), RetrievalStandin(**PARTS)], ids=lambda task: task.name)
def test_a_figure_is_drawn(task: ListOps, tmp_path: Path) -> None:
    path = plot_samples(task, tmp_path / "a.png", count=3)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_lines_are_few_and_short() -> None:
    lines = _wrapped("word " * 1000)
    assert len(lines) == _LINES
    assert lines[-1] == "..."
    assert max(map(len, lines)) <= _LINE
    assert _wrapped("a costs $5\n\nb") == [r"a costs \$5", "", "b"]
