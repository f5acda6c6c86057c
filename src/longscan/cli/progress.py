"""What a person sees of a training run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# Without a terminal: seconds between lines.
_INTERVAL = 10.0
# On one: between two looks at an amount, of which many may be told in a second.
_REDRAWN = 0.1


class Display:
    """Shows a run; an observer of the training loop.

    Args:
        quiet: show nothing (every process but the first).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._steps = 0
        self._last: tuple[float, int] | None = None
        self._speed = 0.0
        self._loss = 0.0
        self._weight = 0.0
        self._said = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def line(self, text: str) -> None:
        """One line, with rich's markup."""
        self.console.print(text)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Show that something takes a while."""
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            yield

    @contextlib.contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """The bar of the training loop."""
        self._steps = steps
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        if not self.console.is_terminal:
            yield
            return
        self._progress = Progress(*columns, console=self.console, expand=True)
        self._task = self._progress.add_task("training", total=steps, figures="")
        with self._progress:
            yield
        self._progress = None

    @contextlib.contextmanager
    def fraction(self, text: str) -> Iterator[Callable[[float], None]]:
        """A bar for something that tells how far it is."""
        if not self.console.is_terminal:
            yield lambda done: None
            return
        with Progress(TextColumn(text), BarColumn(bar_width=None), TimeRemainingColumn(compact=True)) as progress:
            task = progress.add_task(text, total=1.0)
            yield lambda done: progress.update(task, completed=done)

    @contextlib.contextmanager
    def amounts(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A bar for each of several things, told how much of it is done, and of how much if that is known."""
        if not self.console.is_terminal:
            yield lambda what, done, whole: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        tasks: dict[str, TaskID] = {}
        said = 0.0

        def tell(what: str, done: int, whole: int | None) -> None:
            nonlocal said
            now = time.monotonic()
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=None, amount="")
            elif now - said < _REDRAWN and done != whole:
                return
            said = now
            progress.update(tasks[what], completed=done, total=whole, amount=f"{done / 1e6:,.1f} M")

        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(compact=True), console=self.console
        ) as progress:
            yield tell

    def stepped(self, row: dict[str, Any]) -> None:
        if "left_out" in row:
            norm = f"norm {row['gradient_norm']:.3g}" if "gradient_norm" in row else "no number"
            self.warned(f"step {row['step']}: the update is left out, its gradient: {norm}")
            return
        now = row["seconds"]
        if self._last is not None and now > self._last[0]:
            speed = (row["tokens"] - self._last[1]) / (now - self._last[0])
            self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        self._last = (now, row["tokens"])
        # One batch is noisy: show an average over about twenty.
        bits = row["bits_per_byte"]
        self._weight = 0.95 * self._weight + 0.05
        self._loss += 0.05 / self._weight * (bits - self._loss)
        figures = f"loss {row['loss']:.3f}  {self._loss:.3f} bits/byte"
        if self._speed:
            figures += f"  {self._speed:,.0f} tokens/s"
        held_out = row.get("held_out_bits_per_byte")
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], figures=figures)
            if held_out is not None:
                self._progress.console.print(f"step {row['step']}: held-out, estimate: {held_out:.3f} bits per byte")
        elif held_out is not None or row["step"] == self._steps or time.monotonic() - self._said > _INTERVAL:
            self._said = time.monotonic()
            if self._speed:
                tokens = (self._steps / row["step"] - 1) * row["tokens"]
                figures += f"  {tokens / self._speed:.0f} s left"
            if held_out is not None:
                figures += f"  held-out, estimate: {held_out:.3f} bits/byte"
            self.console.print(f"step {row['step']}/{self._steps}  {figures}")

    def saved(self, step: int, path: Path) -> None:
        pass

    def warned(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(message)}")

    def held_out(self, report: dict[str, Any]) -> None:
        """The table of the model beside compressors."""
        table = Table(title=f"held-out text, {report['bytes']:,} bytes")
        table.add_column("")
        table.add_column("bits per byte", justify="right")
        table.add_column("model / it", justify="right")
        rows = {"this model": report["bits_per_byte"], **report["compressors_bits_per_byte"]}
        for name, value in sorted(rows.items(), key=lambda item: item[1]):
            style = "bold" if name == "this model" else ""
            table.add_row(name, f"{value:.4f}", f"{report['bits_per_byte'] / value:.2f}", style=style)
        self.console.print(table)
