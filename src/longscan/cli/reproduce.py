"""`longscan reproduce NAME`: a published result, here; our figure beside the published one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from longscan.cli.config import read_toml
from longscan.cli.stop import Stop
from longscan.errors import ConfigError
from longscan.evaluation.waveforms import continue_waveform
from longscan.experiments import (
    Published,
    Result,
    Run,
    Settings,
    System,
    beside,
    read_published,
    read_results,
    read_settings,
    results_page,
    scales_of,
)
from longscan.experiments.report import (
    best_cell,
    duration,
    figure_cell,
    measured_cost,
    metric_words,
    result_name,
)
from longscan.models import LanguageModel, Sashimi
from longscan.nn.storage import write_text
from longscan.plots.experiments import plot_experiment
from longscan.plots.memory import plot_memory
from longscan.plots.selection import plot_selection
from longscan.tasks.audio import Waveforms
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.watching import watched
from longscan.training.tasks import Point

_PUBLISHED = "published.toml"
# Systems that stand side by side in a table; more of them stand one below the other.
_ABREAST = 10
# Without a terminal: seconds between lines.
_INTERVAL = 10.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Train and test the systems of a published table or figure, and print our figures beside the published ones.

    Each system's result is one JSON file below results/. A run that was stopped (Ctrl-C, SIGTERM, --minutes) goes on
    when the same command is given again.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The experiment; --list shows them."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the experiments, what they cost and what has been measured; with NAME, that one's systems."""
    report: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only write docs/results.md and the figures from the result files."""
    scale: Literal["auto", "paper", "short", "here"] = "auto"
    """The published setting; its task, trained for minutes on a GPU (some have that); or one for two CPU cores. auto:
    the published one on a GPU."""
    only: str | None = None
    """Systems to run, with commas between; default: all of the experiment."""
    sizes: str | None = None
    """Sizes to run, where an experiment has several, with commas between; default: all."""
    data: str | None = None
    """Where the task's data are, if it reads some: a folder, or what else its option `data` takes."""
    tokenizer: str | None = None
    """Of a task over text: bytes; a tokenizer.json, a folder with one or a name on the Hugging Face Hub; or bpe:4096,
    which is learnt from the text."""
    seed: int = 0
    """Of weights and data."""
    minutes: float | None = None
    """Stop after so long, with everything saved."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    sharing: int = 1
    """How many trainings, this one included, the device has at a time; the results say so, as their times are no speeds
    then."""
    experiments: Path = Path("experiments")
    """Folder of the experiments' files."""
    results: Path = Path("results")
    """Folder of the results."""
    runs: Path = Path("runs/reproduce")
    """Folder of the checkpoints."""
    docs: Path = Path("docs/results.md")
    """The page that --report writes."""


def run(options: Options, console: Console | None = None) -> int:
    """Exit code 0; 130 or 143 after a stop by Ctrl-C or SIGTERM, with everything saved.

    Raises:
        ConfigError: the folder of the experiments, or the one asked for, is not there.
    """
    if not options.experiments.is_dir():
        raise ConfigError(
            f"experiments: there is no folder {str(options.experiments)!r} here; the experiments' files come with a "
            "checkout of longscan: run this in its folder, or say --experiments CHECKOUT/experiments"
        )
    # Where no terminal says how wide a table may be, it is as wide as it is.
    width = None if sys.stdout.isatty() else 140
    console = console or Console(highlight=False, soft_wrap=True, width=width)
    published = read_published(read_toml(options.experiments / _PUBLISHED), _PUBLISHED)
    if options.list:
        console.print(_list(options) if options.name is None else _systems(options, options.name))
        return 0
    if options.report:
        return _report(options, published, console)
    if options.name is None:
        raise ConfigError("name an experiment, as in `longscan reproduce induction-heads`; --list shows them")
    device = torch.device(_device(options.device))
    settings = _settings(options, options.name, device)
    systems = _chosen(settings, options.only, options.sizes)
    ends = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with Stop() as stop:
        for system in systems:
            done = Run(settings, system, seed=options.seed, device=device, folder=options.runs)
            if not _work(done, stop, ends, console):
                console.print("stopped, all is saved; the same command goes on")
                return 128 + (stop.signal or signal.SIGINT) if stop() else 0
            with _bar(console, system.label):
                written = [done.result(options.sharing).save(options.results), *_beside(done, options)]
            for path in written:
                console.print(f"written: {path}")
    results = _in_order(read_results(options.results, settings.name), options.experiments)
    own = [result for result in results if result.scale == settings.scale]
    console.print(experiment_table(own, beside(published, settings.published, settings.scale)))
    for path in plot_experiment(results, published, options.results):
        console.print(f"written: {path}")
    return 0


def _beside(done: Run, options: Options) -> list[Path]:
    """What there is to look at or to listen to."""
    settings, model = done.settings, done.model
    folder = options.results / settings.name
    if isinstance(model, LanguageModel) and done.system.mixer == "mamba":
        if settings.task.name == "selective_copying":
            return plot_selection(model, settings.task, folder, settings.scale)
        if isinstance(settings.task, InductionHeads):
            return [plot_memory(model, settings.task, folder / f"memory-{done.system.name}-{settings.scale}.png")]
    if isinstance(settings.task, Waveforms) and isinstance(model, Sashimi):
        return [continue_waveform(model, settings.task, done.path.with_name("sample.wav"), options.seed)]
    return []


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _names(folder: Path) -> list[str]:
    """The experiments in a folder; other configuration files may lie there too."""
    return [path.stem for path in sorted(folder.glob("*.toml")) if "systems" in read_toml(path)]


def _read(options: Options, name: str) -> dict[str, Any]:
    name = name.replace("-", "_")
    known = _names(options.experiments)
    if name not in known:
        raise ConfigError(f"no experiment {name!r} in {options.experiments}; there are: {', '.join(known)}")
    return read_toml(options.experiments / f"{name}.toml")


def _settings(options: Options, name: str, device: torch.device) -> Settings:
    values = _read(options, name)
    scale = options.scale
    if scale == "auto":
        scale = "paper" if device.type == "cuda" else "here"
    given = {"data": options.data, "tokenizer": options.tokenizer}
    changes = {key: value for key, value in given.items() if value is not None}
    return read_settings(name.replace("-", "_"), values, scale, options=changes)


def _chosen(settings: Settings, only: str | None, sizes: str | None) -> list[System]:
    """The systems of these families or names, in these sizes; the order is the command line's."""
    every = list(settings.systems.values())
    families = list(dict.fromkeys(system.family for system in every))
    of_size = _names_in("--sizes", settings.name, sizes, [system.size for system in every])
    chosen = _names_in("--only", settings.name, only, families, [system.name for system in every])
    return [
        system for name in chosen for system in every if name in (system.family, system.name) and system.size in of_size
    ]


def _names_in(flag: str, experiment: str, given: str | None, *known: Sequence[str]) -> list[str]:
    """The names given with commas between, or all of the first kind that is known."""
    if given is None:
        return list(dict.fromkeys(known[0]))
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if not any(name in kind for kind in known):
            raise ConfigError(
                f"{flag}: {experiment} has no {name!r}, it has {', '.join(dict.fromkeys(known[0])) or 'none'}"
            )
    return names


def _work(run: Run, stop: Stop, ends: float | None, console: Console) -> bool:
    """Train and test one system, showing how far it is; False if it was stopped."""
    system, steps, metric = run.system, run.system.recipe.steps, run.settings.task.metric
    said = time.monotonic()
    with _bar(console, system.label) as bar:
        task = bar.add_task(escape(system.label), total=steps, figures="preparing")
        bar.update(task, completed=run.resume())
        begun: list[tuple[float, int]] = []

        def tell(point: Point | None, tested: dict[str, float]) -> None:
            nonlocal said
            if point is None:
                place, text = "tested", _tested(run, tested)
                bar.update(task, figures=text)
            else:
                begun.append((time.monotonic(), point.step))
                place = f"step {point.step}/{steps}, {duration(run.train_seconds)}{_left(begun[0], begun[-1], steps)}"
                text = f"loss {point.loss:.4f}  {metric.name} {metric.text(point.figure)}"
                bar.update(task, completed=point.step, figures=text)
            if not console.is_terminal and (point is None or time.monotonic() - said > _INTERVAL):
                said = time.monotonic()
                console.print(f"{system.label}: {place}  {text}")

        return run.go_on(lambda: stop() or (ends is not None and time.monotonic() > ends), tell)


@contextlib.contextmanager
def _bar(console: Console, label: str) -> Iterator[Progress]:
    """A bar for training, and below it one for what is told meanwhile: of data being made, and of tests."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    figures = TextColumn("{task.fields[figures]}")
    bar = Progress(*columns, figures, console=console, disable=not console.is_terminal)
    parts: dict[str, TaskID] = {}
    said = time.monotonic()

    def watch(what: str, done: int, whole: int | None) -> None:
        nonlocal said
        if what not in parts:
            parts[what] = bar.add_task(what, total=whole, figures="")
        bar.update(parts[what], completed=done, visible=done != whole)
        if not console.is_terminal and time.monotonic() - said > _INTERVAL:
            said = time.monotonic()
            console.print(f"{label}: {what}, {done:,}{'' if whole is None else f' of {whole:,}'}")

    with bar, watched(watch):
        yield bar


def _left(first: tuple[float, int], last: tuple[float, int], steps: int) -> str:
    """Time left, in words, from when steps were done; the first ones take what compilers take."""
    done = last[1] - first[1]
    return f", {duration((last[0] - first[0]) / done * (steps - last[1]))} left" if done else ""


def _tested(run: Run, figures: dict[str, float]) -> str:
    key, figure = list(figures.items())[-1]
    task = run.settings.task
    return f"{task.metric.text(figure)} at {task.axis} {int(key):,}"


def _list(options: Options) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", min_width=28, max_width=42)
    table.add_column("scale", no_wrap=True)
    table.add_column("cost", min_width=20)
    table.add_column("systems measured", min_width=20)
    for name in _names(options.experiments):
        values = read_toml(options.experiments / f"{name}.toml")
        results = read_results(options.results, name)
        for scale in scales_of(values):
            settings = read_settings(name, values, scale)
            own = [result for result in results if result.scale == scale]
            done = {result.system: result.family or result.system for result in own}
            # What is measured says nothing of systems that are not.
            known = settings.systems.keys() <= done.keys()
            costs = [measured_cost(own)] if own else []
            costs += [] if known else [settings.cost]
            names = escape(", ".join(dict.fromkeys(done.values())))
            first = scale == "paper"
            table.add_row(
                f"[bold]{name.replace('_', '-')}[/]" if first else escape(settings.title),
                scale,
                escape("; ".join(costs)),
                f"{len(done)} of {len(settings.systems)}{': ' if done else ''}{names}",
                end_section=not first,
            )
    return table


def _systems(options: Options, name: str) -> Table:
    """An experiment's systems, and at each scale what was measured, or the training to be done."""
    values = _read(options, name)
    results = read_results(options.results, name.replace("-", "_"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=escape(values["title"]), title_justify="left")
    table.add_column("system", no_wrap=True)
    table.add_column("label", min_width=20)
    cells: dict[str, list[str]] = {}
    for number, scale in enumerate(scales_of(values)):
        settings = read_settings(name, values, scale)
        table.add_column(f"{scale}: {settings.task.metric.name} at {settings.task.axis} {_own(settings):,}")
        found = {result.system: result for result in results if result.scale == scale and result.seed == options.seed}
        for system in settings.systems.values():
            row = cells.setdefault(system.name, [system.name, escape(system.label), *[""] * number])
            row.append(_state(system, settings, found.get(system.name)))
    for row in cells.values():
        table.add_row(*row)
    return table


def _own(settings: Settings) -> int:
    """The key of an experiment's figures that it is trained for."""
    length = settings.task.length
    return length if length in settings.lengths else settings.lengths[-1]


def _state(system: System, settings: Settings, result: Result | None) -> str:
    if result is None:
        return f"{system.recipe.steps:,} steps to do"
    own, last = str(_own(settings)), list(result.figures)[-1]
    shown = [f"{int(last):,}: {settings.task.metric.text(result.figures[last])}"] if last != own else []
    return ", ".join([settings.task.metric.text(result.figures[own]), *shown]) if own in result.figures else shown[0]


def experiment_table(results: Sequence[Result], published: Published | None) -> Table:
    """Figures of an experiment's results at one scale, the published ones in brackets."""
    first = results[0]
    source = "" if published is None else f"in brackets: {published.source}"
    table = Table(
        title=escape(f"{first.title}, scale: {first.scale}. {metric_words(first.metric)}"),
        title_justify="left",
        caption=escape(source),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    keys = sorted({int(key) for result in results for key in result.figures})
    head = [first.axis, *(escape(result_name(result)) for result in results)]
    rows = [[f"{key:,}", *(figure_cell(result, key, published) for result in results)] for key in keys]
    if any(result.best for result in results):
        head.append("the best possible")
        rows = [[*row, best_cell(results, key)] for row, key in zip(rows, keys, strict=True)]
    if len(results) > _ABREAST:
        head, *rows = (list(row) for row in zip(head, *rows, strict=True))
    for column in head:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _in_order(results: Iterable[Result], folder: Path) -> list[Result]:
    """By experiment, and within it as its file has the systems and sizes; what no file has any more comes last."""
    files = {name: read_toml(folder / f"{name}.toml") for name in _names(folder)}

    def place(result: Result) -> tuple[str, int, int, int]:
        values = files.get(result.experiment, {})
        families = [*values.get("systems", {}), result.family or result.system]
        sizes = [*values.get(result.scale, {}).get("sizes", {}), result.size]
        return result.experiment, families.index(families[-1]), sizes.index(result.size), result.seed

    return sorted(results, key=place)


def _report(options: Options, published: dict[str, Published], console: Console) -> int:
    results = _in_order(read_results(options.results), options.experiments)
    for name in dict.fromkeys(result.experiment for result in results):
        own = [result for result in results if result.experiment == name]
        for path in plot_experiment(own, published, options.results):
            console.print(f"written: {path}")
    figures = os.path.relpath(options.results, options.docs.parent)
    console.print(f"written: {write_text(options.docs, results_page(results, published, figures))}")
    return 0
