"""The page of figures about memories, through its command."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from longscan.cli.plot import Options, run

DOCUMENT = Path(__file__).parents[2] / "docs" / "statespace.md"


def test_every_figure_of_the_document_is_drawn(tmp_path: Path) -> None:
    said = io.StringIO()
    assert run(Options(output=tmp_path / "new"), Console(file=said, width=1000)) == 0
    drawn = sorted((tmp_path / "new").iterdir())
    assert sorted(said.getvalue().split()) == [str(path) for path in drawn]
    text = DOCUMENT.read_text(encoding="utf-8")
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000
        assert f"figures/statespace/{path.name}" in text
    assert text.count(".png") == len(drawn)
