"""`longscan compare`: several mixers on one task at about one number of parameters; one table and one figure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longscan import diagnostics
from longscan.bench.compare import Settings
from longscan.bench.compare import run as run_comparison
from longscan.bench.trials import NAMES
from longscan.errors import ArgumentError
from longscan.plots.compare import plot_comparison


@dataclass(frozen=True)
class Options:
    """Train several mixers on one task, all of about the parameters of the first, and say how good each is and what it
    costs.

    A call with the same settings goes on where the last one stopped, and may name more mixers.
    """

    task: Literal[NAMES] = "text"  # type: ignore[valid-type]
    """Text (held-out bits per byte), or a synthetic task (accuracy)."""

    mixers: Annotated[str, tyro.conf.arg(metavar="NAME,NAME,...")] = "mamba,s4d,retnet,attention"
    """Names as in LanguageModelConfig(mixer=...), BLOCK/NAME for one inside a block shape: h3/s4d, mamba/s6,
    ungated/s6; or transformer or transformer++, attention with their norms, positions and MLPs."""

    d_model: int = 64
    """Width of the first one's model; the others' gives way (in multiples of 4) until the parameters match."""

    n_layer: int = 2
    """Residual blocks."""

    d_intermediate: int = 0
    """Width of the gated MLP after each of the first one's mixers; 0: none."""

    steps: int | None = None
    """Optimiser steps of each; by default 200."""

    minutes: float | None = None
    """Instead of steps: time to train for each."""

    batch_size: int = 16
    """Sequences a step."""

    length: int | None = None
    """Tokens a sequence, as the task counts them; by default 256, or the task's own where that is short."""

    learning_rate: float = 3e-3
    """Peak of AdamW's; it rises over the first twentieth and falls along a cosine."""

    weight_decay: float = 0.1
    """Of matrices."""

    seed: int = 0
    """Of weights and data."""

    device: str | None = None
    """cpu or cuda; by default the fastest there is."""

    output: Path | None = None
    """The JSON file, with a figure beside it (.png). By default runs/compare/TASK-DEVICE.json."""


def run(options: Options, console: Console | None = None) -> int:
    """Trains, prints the table, writes JSON and figure; returns 1 if a mixer failed."""
    # Where no terminal says how wide the table may be, it is as wide as it is.
    console = console or (Console() if sys.stdout.isatty() else Console(width=120))
    device = options.device or diagnostics.devices()[-1].type
    if device not in [found.type for found in diagnostics.devices()]:
        raise ArgumentError(f"device: PyTorch has no {device!r} here, only {[d.type for d in diagnostics.devices()]}")
    mixers = tuple(dict.fromkeys(name.strip() for name in options.mixers.split(",") if name.strip()))
    if not mixers:
        raise ArgumentError("mixers: got none, expected names with commas between, such as mamba,s4d")
    settings = Settings(
        task=options.task,
        d_model=options.d_model,
        n_layer=options.n_layer,
        d_intermediate=options.d_intermediate,
        steps=200 if options.steps is None and options.minutes is None else options.steps,
        minutes=options.minutes,
        batch_size=options.batch_size,
        length=options.length,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        seed=options.seed,
        device=device,
        first=mixers[0],
    )
    path = options.output or Path("runs") / "compare" / f"{options.task}-{device}.json"
    before = torch.get_num_threads()
    torch.set_num_threads(diagnostics.usable_cores())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(compact=True),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            shown: dict[str, Any] = {}

            def progress(name: str, step: int, steps: int, loss: float) -> None:
                if name not in shown:
                    shown[name] = bars.add_task(escape(name), total=steps, loss="")
                bars.update(shown[name], completed=step, loss=f"{loss:.3f}")

            result = run_comparison(settings, mixers, path, progress)
    finally:
        torch.set_num_threads(before)
    console.print(comparison_table(result))
    figure = plot_comparison(path, path.with_suffix(".png"))
    console.print(f"written: {path} and {figure}")
    return 1 if any(row["note"] for row in result["rows"]) else 0


#: The first one is named after what the task is judged by.
_COLUMNS = ("", "parameters", "off", "width", "tokens/s", "step ms", "state B", "MB")


def comparison_table(result: Mapping[str, Any]) -> Table:
    """The rows of a comparison, the best first."""
    data, good = result["data"], [row for row in result["rows"] if not row["note"]]
    counts = sorted({row["steps"] for row in good})
    steps = " to ".join(map(str, dict.fromkeys(counts[:1] + counts[-1:])))
    kinds = dict.fromkeys(row["memory_is"] for row in good)
    failed = [f"{row['mixer']}: {row['note']}" for row in result["rows"] if row["note"]]
    table = Table(
        title=escape(f"{result['compare']}, {data['places']} tokens a sequence, {steps} steps"),
        title_justify="left",
        caption=escape("\n".join([*(f"MB: {kind}" for kind in kinds), *failed])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name or data["metric"], justify="right", no_wrap=True)
    for row in sorted(good, key=lambda row: row["quality"], reverse=data["higher_is_better"]):
        table.add_row(
            escape(row["mixer"]),
            f"{row['quality']:.3f}",
            f"{row['parameters']:,}",
            f"{row['off_target']:+.1%}",
            str(row["d_model"]),
            f"{row['train_tokens_per_second']:,.0f}",
            f"{row['step_ms']:.3g}",
            f"{row['state_bytes']:,}",
            f"{row['memory_bytes'] / 1e6:,.3g}",
        )
    return table
