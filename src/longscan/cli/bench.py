"""`longscan bench scan|block|train|prefill|decode`: speed on this machine, beside the peers that are installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from longscan import diagnostics
from longscan.bench import PEERS, Report, Row, Settings, Timing
from longscan.errors import ArgumentError
from longscan.plots.bench import plot_bench


@dataclass(frozen=True)
class Options:
    """Measure one operation here, side by side with the reference and the peers that are installed.

    Outputs are compared with the definition's before anything is timed.
    """

    what: Annotated[Literal["scan", "block", "train", "prefill", "decode"], tyro.conf.Positional]
    """The operation: the selective scan, one Mamba block, a training step, a prompt, or one token at a time."""

    shape: tuple[str, ...] = ()
    """Shapes such as 1,2048,1536,16. Axes: scan batch,length,channels,state; block batch,length,d_model; train
    layers,d_model,vocabulary,batch,length; prefill and decode layers,d_model,vocabulary,tokens."""

    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ()
    """Precisions; by default those that are usual for the operation on this device."""

    device: str | None = None
    """cpu, cuda, xpu or mps; by default the fastest there is."""

    threads: int | None = None
    """Threads on the CPU; by default every core this process may use."""

    peers: tuple[str, ...] = PEERS
    """Whom to compare with, out of: reference transformers mambapy llama.cpp mamba-ssm. Missing ones are left out."""

    alone: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure longscan and the floor alone."""

    repeats: int = 20
    """Timed passes per contender; fewer where they take long."""

    budget: float = 10.0
    """Seconds after which a contender's next pass is not started; one slower than this is timed once."""

    output: Path | None = None
    """The JSON file to write, with a figure beside it (.png). By default runs/bench/WHAT-DEVICE.json."""


def run(options: Options, console: Console | None = None) -> int:
    """Measures, prints the table, writes JSON and figure; returns 1 if longscan itself gave no figure somewhere."""
    console = console or Console()
    device = options.device or diagnostics.devices()[-1].type
    if device not in [found.type for found in diagnostics.devices()]:
        raise ArgumentError(f"device: PyTorch has no {device!r} here, only {[d.type for d in diagnostics.devices()]}")
    if options.threads is not None and options.threads < 1:
        raise ArgumentError(f"threads: got {options.threads}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or diagnostics.usable_cores())
    try:
        with console.status("preparing") as status:
            settings = Settings(
                device=device,
                shapes=tuple(_shape(text) for text in options.shape) or None,
                dtypes=options.dtype or None,
                peers=() if options.alone else options.peers,
                repeats=options.repeats,
                budget=options.budget,
                progress=lambda message: status.update(escape(message)),
            )
            report: Report = importlib.import_module(f"longscan.bench.{options.what}").run(settings)
    finally:
        torch.set_num_threads(before)
    for group in report.groups():
        console.print(_table(report, group))
    path = report.save(options.output or Path("runs") / "bench" / f"{options.what}-{device}.json")
    figure = plot_bench(path, path.with_suffix(".png"))
    console.print(f"written: {path} and {figure}")
    return 1 if report.failed else 0


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(
            f"shape: got {text!r}, expected integers with commas between, such as 1,2048,1536,16"
        ) from None


def _table(report: Report, group: str) -> Table:
    notes = [f"{row.contender}: {row.note}" for row in report.of(group) if row.note]
    title = f"{report.bench} {group}, in {report.unit}"
    table = Table(title=escape(title), title_justify="left", caption=escape("\n".join(notes)), caption_justify="left")
    for column in ("", "median", "20% to 80%", "passes", "longscan is", "error"):
        justify: JustifyMethod = "right" if column else "left"
        table.add_column(column, justify=justify)
    for row in report.of(group):
        table.add_row(*_cells(report, row))
    return table


def _cells(report: Report, row: Row) -> list[str]:
    timing, times = row.timing, report.speedup(row)
    style = {"ours": "bold", "peer": "not bold", "floor": "dim"}[row.kind]
    cells = [f"[{style}]{escape(row.contender)}[/]", "-", "", "", "", "" if row.error is None else f"{row.error:.0e}"]
    if row.value is None or timing is None:
        return cells
    cells[1] = f"[{style}]{row.value:.4g}[/]"
    if row.kind != "floor":
        ends = [
            row.value * (timing.median / t if report.higher_is_better else t / timing.median) for t in _ends(timing)
        ]
        cells[2] = f"{min(ends):.4g} to {max(ends):.4g}"
        cells[3] = str(timing.samples)
    if times is not None and row != report.ours(row.group):
        cells[4] = f"{1 / times:.2f}x its time" if row.kind == "floor" else f"{times:.2f}x as fast"
    return cells


def _ends(timing: Timing) -> tuple[float, float]:
    return timing.low, timing.high
