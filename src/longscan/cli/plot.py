"""`longscan plot WHAT`: figures that are computed, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from longscan.cli.config import read_toml
from longscan.errors import ArgumentError
from longscan.experiments import read_settings
from longscan.plots.samples import plot_samples
from longscan.plots.statespace import plot_statespace
from longscan.tasks.registry import TASKS
from longscan.tasks.task import Task


@dataclass(frozen=True)
class Options:
    """Draw the figures of the documents (memories, their bases, kernels and eigenvalues), or samples of a task."""

    what: Annotated[Literal["statespace", "task"], tyro.conf.Positional] = "statespace"
    """statespace: memories of linear state space models (docs/statespace.md); task: samples of a task."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """The task, or an experiment, whose task is drawn."""

    scale: Literal["paper", "short", "here"] = "here"
    """Of an experiment."""

    length: int | None = None
    """Of the samples, instead of the task's own."""

    count: int = 6
    """Of samples."""

    seed: int = 0
    """Of samples."""

    experiments: Path = Path("experiments")
    """Folder of the experiments' files."""

    output: Path = Path("runs/figures")
    """The folder for the PNG files."""


def run(options: Options, console: Console | None = None) -> int:
    """Draws the figures and says where they are."""
    console = console or Console()
    if options.what == "statespace":
        paths = plot_statespace(options.output)
    else:
        task = _task(options)
        path = options.output / "samples" / f"{options.name.replace('-', '_')}.png"
        paths = [plot_samples(task, path, count=options.count, length=options.length, seed=options.seed)]
    for path in paths:
        console.print(str(path), highlight=False)
    return 0


def _task(options: Options) -> Task:
    name = options.name.replace("-", "_")
    file = options.experiments / f"{name}.toml"
    if file.exists():
        return read_settings(name, read_toml(file), options.scale).task
    if name not in TASKS:
        raise ArgumentError(
            f"name: got {options.name!r}; allowed are an experiment in {options.experiments}, and the tasks "
            f"{', '.join(TASKS)}"
        )
    # Tasks have defaults for all that they take.
    return TASKS[name]()  # type: ignore[call-arg]
