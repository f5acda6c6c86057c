"""`longscan bench WHAT`: speed and memory on this machine, beside the peers that are installed."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from longscan import diagnostics
from longscan.bench import PEERS, Report, Row, Settings, Timing
from longscan.errors import ArgumentError
from longscan.experiments.report import duration
from longscan.plots.bench import plot_bench


@dataclass(frozen=True)
class Options:
    """Measure one operation here, side by side with the reference and the peers that are installed.

    Outputs are compared with the definition's before anything is timed.
    """

    what: Annotated[
        Literal[
            "scan",
            "block",
            "train",
            "prefill",
            "decode",
            "families",
            "loading",
            "lengths",
            "throughput",
            "memory",
            "decay",
            "linear-scan",
            "mixers",
            "chunks",
            "parts",
            "layouts",
        ],
        tyro.conf.Positional,
    ]
    """The operation: the selective scan, one Mamba block, a training step, a prompt, or one token at a time; that of
    Transformers' own models with Mamba layers, by themselves and enabled; memory while a model is read; the scan
    against attention by length; generation against a Transformer by batch; memory of training by batch (GPU);
    outer-product recurrences with decay; first-order recurrences; every mixer by length; memory of one long sequence at
    once and by chunks; bytes that every mixer exchanges where processes share sequences (CPU); bytes that a training
    step exchanges and holds, by how the model is laid over processes (CPU)."""

    shape: tuple[str, ...] = ()
    """Shapes such as 1,2048,1536,16. Axes: scan and lengths batch,length,channels,state; block batch,length,d_model;
    train and memory layers,d_model,vocabulary,batch,length; prefill layers,d_model,vocabulary,tokens; decode and
    families layers,d_model,vocabulary,batch,tokens; loading layers,d_model,vocabulary; throughput
    layers,d_model,vocabulary,batch,prompt,tokens; decay batch,length,heads,d_k,d_v; linear-scan batch,length,channels;
    mixers batch,length,d_model; chunks layers,d_model,vocabulary,length,chunk; parts processes,length,d_model;
    layouts processes,layers,d_model,vocabulary,batch,length."""

    size: tuple[Literal["130m", "370m", "790m", "1.4b", "2.8b"], ...] = ()
    """Instead of shapes of whole models: their default shapes, at published sizes."""

    dtype: tuple[Literal["float32", "bfloat16", "float16", "int8"], ...] = ()
    """Precisions; by default those that are usual for the operation on this device. int8: weights, of decode on the
    CPU."""

    device: str | None = None
    """cpu, cuda, xpu or mps; by default the fastest there is."""

    threads: int | None = None
    """Threads on the CPU; by default every core this process may use."""

    peers: tuple[Literal[PEERS], ...] | None = None  # type: ignore[valid-type]
    """Whom to compare with; by default all that make sense on this device. Missing ones are left out."""

    alone: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure longscan and the floor alone."""

    repeats: int = 20
    """Timed passes per contender; fewer where they take long."""

    budget: float | None = None
    """Seconds after which a contender's next pass is not started; one slower than this is timed once. By default 10,
    less where there are many settings."""

    minutes: float | None = None
    """Minutes after which no further contender is begun; what is left says so, and what was measured is kept. By
    default all are measured."""

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
    if options.minutes is not None and not options.minutes > 0:
        raise ArgumentError(f"minutes: got {options.minutes}, expected more than 0")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or diagnostics.usable_cores())
    try:
        with _waiting(console, options.minutes) as tell:
            settings = Settings(
                device=device,
                shapes=tuple(_shape(text) for text in options.shape) or None,
                sizes=options.size or None,
                dtypes=options.dtype or None,
                peers=() if options.alone else options.peers,
                repeats=options.repeats,
                budget=options.budget,
                deadline=math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes,
                progress=tell,
            )
            report: Report = importlib.import_module(f"longscan.bench.{options.what.replace('-', '_')}").run(settings)
    finally:
        torch.set_num_threads(before)
    for group in report.groups():
        console.print(bench_table(report, group))
    path = report.save(options.output or Path("runs") / "bench" / f"{options.what}-{device}.json")
    figure = plot_bench(path, path.with_suffix(".png"))
    console.print(f"written: {path} and {figure}")
    return 1 if report.failed else 0


@contextlib.contextmanager
def _waiting(console: Console, minutes: float | None) -> Iterator[Callable[[str], None]]:
    """Shows what is measured, since when, and for how long at most, if that is limited."""
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    ends = None if minutes is None else time.monotonic() + 60 * minutes

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing", total=None)

        def tell(message: str) -> None:
            left = "" if ends is None else f", at most {duration(max(0.0, ends - time.monotonic()))} left"
            bar.update(task, description=escape(message + left))

        yield tell


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(
            f"shape: got {text!r}, expected integers with commas between, such as 1,2048,1536,16"
        ) from None


def bench_table(report: Report, group: str) -> Table:
    """The rows of one group, with what is known of each."""
    notes = [f"{row.contender}: {row.note}" for row in report.of(group) if row.note]
    title = f"{report.bench} {group}, in {report.unit}"
    table = Table(
        title=escape(title),
        title_justify="left",
        caption=escape("\n".join(notes)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    rows = [_cells(report, row) for row in report.of(group)]
    # A column in which nobody has anything to say is not shown.
    shown = [name for name in _COLUMNS if not name or name == "median" or any(cells[name] for cells in rows)]
    for name in shown:
        justify: JustifyMethod = "right" if name else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[name] for name in shown))
    return table


#: "ours" is how many times faster longscan is (or how many times less memory it needs); "floor" the floor's part of the
#: time.
_COLUMNS = ("", "median", "20% to 80%", "passes", "ours", "error", "GB/s", "floor", "peak MB")


def _cells(report: Report, row: Row) -> dict[str, str]:
    timing, times = row.timing, report.speedup(row)
    style = {"ours": "bold", "peer": "not bold", "other": "italic", "floor": "dim"}[row.kind]
    cells = dict.fromkeys(_COLUMNS, "")
    cells[""] = f"[{style}]{escape(row.contender)}[/]"
    cells["median"] = "-" if row.value is None else f"[{style}]{_figure(row.value)}[/]"
    cells["error"] = "" if row.error is None else f"{row.error:.0e}"
    cells["GB/s"] = "" if row.bandwidth is None else _figure(row.bandwidth / 1e9)
    cells["floor"] = "" if row.of_floor is None else f"{row.of_floor:.0%}"
    cells["peak MB"] = "" if row.memory is None else f"{row.memory / 1e6:,.0f}"
    if row.value is not None and timing is not None and row.kind != "floor":
        ends = [
            row.value * (timing.median / t if report.higher_is_better else t / timing.median) for t in _ends(timing)
        ]
        cells["20% to 80%"] = f"{_figure(min(ends))} to {_figure(max(ends))}"
        cells["passes"] = str(timing.samples)
    if times is not None and row != report.ours(row.group):
        cells["ours"] = f"{times:.2f}x"
    return cells


def _figure(value: float) -> str:
    """Four digits, never as a power of ten where it is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _ends(timing: Timing) -> tuple[float, float]:
    return timing.low, timing.high
