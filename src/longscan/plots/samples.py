"""Samples of a task, drawn: what a model reads, and what it is asked."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.nn.storage import write_atomically
from longscan.tasks.audio import Waveforms, from_mu_law
from longscan.tasks.task import IGNORED, Task

# Tokens are written into their cells while these are wide enough.
_WRITTEN = 48
# Of text, so many characters a line, and so many lines.
_LINE, _LINES = 150, 8


def plot_samples(task: Task, path: Path, *, count: int = 6, length: int | None = None, seed: int = 0) -> Path:
    """Draw samples of a task as a PNG file.

    Images stand as images, what can be read as text, waveforms as lines over seconds. Other tokens are a strip of
    colours, with what is asked at its place below; values are lines, with what is asked dashed.

    Args:
        count: of samples.
        length: instead of the task's own.
        seed: of the draws.

    Raises:
        StorageError: the figure could not be written.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = task.sample(count, generator, length)
    if task.image_shape:
        draw = _images
    elif isinstance(task, Waveforms):
        draw = _waves
    elif task.inputs == "values":
        draw = _values
    else:
        draw = _tokens if task.words(inputs[0]) is None else _words
    figure = draw(task, inputs, targets)
    figure.suptitle(f"samples of {task.name}", fontsize=10)
    return write_atomically(path, functools.partial(figure.savefig, format="png", dpi=130))


def _canvas(rows: int, columns: int, height: float, width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.5 + rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _title(task: Task, target: Tensor) -> str:
    return f"class {int(target)}" if task.readout == "pooled" and not target.is_floating_point() else ""


def _images(task: Task, inputs: Tensor, targets: Tensor) -> Any:
    assert task.image_shape is not None
    columns = min(6, len(inputs))
    figure, panels = _canvas(-(-len(inputs) // columns), columns, 1.8, 1.7 * columns)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, image, target in zip(panels.flat, inputs, targets, strict=False):
        panel.imshow(image.reshape(task.image_shape).numpy(), cmap="gray")
        panel.set_title(_title(task, target), fontsize=8)
    return figure


def _words(task: Task, inputs: Tensor, targets: Tensor) -> Any:
    texts = [_wrapped(task.words(row) or "") for row in inputs]
    figure, panels = _canvas(len(inputs), 1, 0.3 + 0.14 * max(map(len, texts)), 11)
    for panel, lines, target in zip(panels[:, 0], texts, targets, strict=True):
        panel.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=7, transform=panel.transAxes)
        panel.set_title(_title(task, target), fontsize=8, loc="left")
        panel.set_axis_off()
    return figure


def _wrapped(text: str) -> list[str]:
    # Dollar signs would begin mathematics.
    lines = [line for part in text.replace("$", r"\$").splitlines() for line in textwrap.wrap(part, _LINE) or [""]]
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."]


def _tokens(task: Task, inputs: Tensor, targets: Tensor) -> Any:
    figure, panels = _canvas(len(inputs), 1, 0.85, 11)
    for panel, row, target in zip(panels[:, 0], inputs, targets, strict=True):
        asked = torch.full_like(row, IGNORED)
        if task.readout == "last":
            asked[-len(target) :] = target
        strips = torch.stack([row, asked])
        shown = torch.where(strips == IGNORED, torch.nan, strips.double())
        colours: dict[str, Any] = {"cmap": "nipy_spectral", "vmin": -1, "vmax": task.vocabulary}
        panel.imshow(shown.numpy(), aspect="auto", interpolation="nearest", **colours)
        if len(row) <= _WRITTEN:
            for y, x in (strips != IGNORED).nonzero().tolist():
                panel.text(x, y, str(int(strips[y, x])), ha="center", va="center", fontsize=6, color="white")
        panel.set_yticks([0, 1] if task.readout == "last" else [0], ["read", "asked"][: 1 + (task.readout == "last")])
        panel.set_title(_title(task, target), fontsize=8, loc="left")
        panel.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("place", fontsize=8)
    return figure


def _waves(task: Task, inputs: Tensor, targets: Tensor) -> Any:
    assert isinstance(task, Waveforms)
    figure, panels = _canvas(len(inputs), 1, 0.9, 9)
    for panel, levels in zip(panels[:, 0], inputs, strict=True):
        panel.plot(torch.arange(len(levels)) / task.rate, from_mu_law(levels), linewidth=0.5)
        panel.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("seconds", fontsize=8)
    return figure


def _values(task: Task, inputs: Tensor, targets: Tensor) -> Any:
    figure, panels = _canvas(len(inputs), 1, 1.3, 9)
    for panel, row, target in zip(panels[:, 0], inputs, targets, strict=True):
        for channel, values in enumerate(row.T):
            panel.plot(values.numpy(), linewidth=1, color=f"C{channel}")
        if task.readout == "every" and target.is_floating_point():
            for channel, values in enumerate(target.T):
                panel.plot(values.numpy(), "--", linewidth=0.9, color=f"C{len(row.T) + channel}")
        panel.set_title(_title(task, target), fontsize=8, loc="left")
        panel.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("place", fontsize=8)
    return figure
