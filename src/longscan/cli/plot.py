"""`longscan plot WHAT`: figures that are computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from longscan.plots.statespace import plot_statespace


@dataclass(frozen=True)
class Options:
    """Draw the figures of the documents: of memories, their bases, kernels and eigenvalues."""

    what: Annotated[Literal["statespace"], tyro.conf.Positional] = "statespace"
    """The page: memories of linear state space models (docs/statespace.md)."""

    output: Path = Path("runs/figures")
    """The folder for the PNG files."""


def run(options: Options, console: Console | None = None) -> int:
    """Draws the figures and says where they are."""
    console = console or Console()
    for path in plot_statespace(options.output):
        console.print(str(path), highlight=False)
    return 0
