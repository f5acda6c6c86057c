"""The curve of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longscan.nn.storage import write_atomically
from longscan.plots.palette import COLOURS


def training_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    compressors: Mapping[str, float],
    held_out: float | None,
) -> None:
    """Draw :func:`draw_training` to ``path``, a PNG file.

    Raises:
        StorageError: the figure could not be written.
    """
    figure = draw_training(rows, title=title, compressors=compressors, held_out=held_out)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def draw_training(
    rows: Sequence[Mapping[str, Any]], *, title: str, compressors: Mapping[str, float], held_out: float | None
) -> Any:
    """Loss over text seen: training, held-out estimates, compressors as lines, and the learning rate below.

    Args:
        rows: of ``metrics.jsonl``.
        compressors: bits per byte by name.
        held_out: bits per byte of the finished model on the whole held-out part.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    rows = [row for row in rows if "bits_per_byte" in row]  # a step that was left out may have no loss
    tokens = [row["tokens"] / 1e6 for row in rows]
    train = [row["bits_per_byte"] for row in rows]
    loss.plot(tokens, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    loss.plot(tokens, _smooth(train), color="tab:blue", label="training")
    estimates = [
        (row["tokens"] / 1e6, row["held_out_bits_per_byte"]) for row in rows if "held_out_bits_per_byte" in row
    ]
    if estimates:
        loss.plot(*zip(*estimates, strict=True), "o-", color="tab:orange", markersize=4, label="held-out, estimate")
    if held_out is not None and tokens:
        loss.plot(
            tokens[-1], held_out, "*", color="tab:red", markersize=14, label=f"held-out, all of it: {held_out:.3f}"
        )
    for (name, value), style in zip(compressors.items(), ("--", ":", "-."), strict=False):
        loss.axhline(value, color="0.4", linestyle=style, linewidth=1, label=f"{name}: {value:.3f}")
    lowest = min([*train, *compressors.values(), *(value for _, value in estimates)], default=0.0)
    loss.set_ylim(max(0.0, 0.9 * lowest), min(8.5, max([*train, 1.0])))
    loss.set_ylabel("bits per byte")
    loss.set_title(title)
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot(tokens, [row["learning_rate"] for row in rows], color="tab:green")
    rate.set_xlabel("tokens seen (millions)")
    rate.set_ylabel("learning rate")
    rate.grid(alpha=0.3)
    return figure


def _panel(height: float, across: str, up: str) -> tuple[Any, Any]:
    """A figure with one panel of these labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.grid(alpha=0.3)
    return figure, panel


def draw_speed(speeds: Sequence[tuple[int, float]]) -> Any:
    """How fast a run was: pairs of tokens seen and tokens a second.

    Returns:
        A matplotlib Figure.
    """
    figure, panel = _panel(2.4, "tokens seen (millions)", "tokens/s")
    panel.plot(*zip(*((tokens / 1e6, speed) for tokens, speed in speeds), strict=True), linewidth=0.8)
    panel.set_ylim(0, 1.1 * max(speed for _, speed in speeds))
    return figure


def draw_estimates(estimates: Sequence[tuple[int, float]]) -> Any:
    """Held-out bits per byte in the course of a training: pairs of step and estimate.

    Returns:
        A matplotlib Figure.
    """
    figure, panel = _panel(2.8, "step", "held out, bits per byte")
    panel.plot(*zip(*estimates, strict=True), "o-", color=COLOURS[0], markersize=4)
    return figure


def draw_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Bits per byte of several runs over the text seen, by name: training, smoothed, and held-out estimates as dots.

    Returns:
        A matplotlib Figure.
    """
    figure, panel = _panel(5, "tokens seen (millions)", "bits per byte")
    for index, (name, rows) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        for key, look in (("bits_per_byte", "-"), ("held_out_bits_per_byte", "o")):
            points = [(row["tokens"] / 1e6, row[key]) for row in rows if key in row]
            if points:
                tokens, values = zip(*points, strict=True)
                training = look == "-"
                shown = _smooth(values) if training else values
                panel.plot(tokens, shown, look, color=colour, markersize=4, label=name if training else None)
    panel.legend(fontsize=8, frameon=False)
    return figure


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
