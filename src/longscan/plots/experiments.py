"""The figure of an experiment: figures by length where there are several, and the curves of training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longscan.experiments.published import Published, beside
from longscan.experiments.results import Result
from longscan.nn.storage import write_atomically
from longscan.plots.palette import COLOURS
from longscan.plots.scaling import draw_scaling
from longscan.plots.variants import draw_variants, height
from longscan.tasks.task import Metric

# With trainings of steps so many times as many as another's, the axis is logarithmic.
_APART = 4


def plot_experiment(results: Sequence[Result], published: Mapping[str, Published], folder: Path) -> list[Path]:
    """Draw one figure per scale: ``folder/EXPERIMENT/SCALE.png``.

    Args:
        results: of one experiment.
        published: all published tables; theirs are drawn dashed.
        folder: of the results.

    Raises:
        StorageError: a figure could not be written.
    """
    paths = []
    for scale in dict.fromkeys(result.scale for result in results):
        own = [result for result in results if result.scale == scale]
        figure = draw_experiment(own, beside(published, own[0].published, scale))
        path = folder / own[0].experiment / f"{scale}.png"
        paths.append(write_atomically(path, functools.partial(figure.savefig, format="png", dpi=130)))
    return paths


def draw_experiment(results: Sequence[Result], published: Published | None) -> Any:
    """The figure of an experiment's results at one scale, with the published figures dashed.

    Returns:
        A matplotlib Figure.
    """
    if results[0].size:
        return draw_scaling(results)
    return _figure(results, published)


def _figure(results: Sequence[Result], published: Published | None) -> Any:
    from matplotlib.figure import Figure

    first = results[0]
    several = len({length for result in results for length in result.figures}) > 1
    # More curves than there are colours for say nothing.
    curves = several or len(results) <= len(COLOURS)
    figure = Figure(figsize=(11 if curves else 8.5, 4.4 if curves else height(results)), layout="constrained")
    panels = figure.subplots(1, 1 + curves, squeeze=False)[0]
    colours = {result.system: COLOURS[index % len(COLOURS)] for index, result in enumerate(results)}
    if several:
        _lengths(panels[0], results, published, colours)
    else:
        draw_variants(panels[0], results, published)
    if curves:
        _training(panels[1], results, colours)
    figure.suptitle(f"{first.title} ({first.scale}; {first.device})", fontsize=10)
    return figure


def _lengths(panel: Any, results: Sequence[Result], published: Published | None, colours: dict[str, str]) -> None:
    for result in results:
        points = sorted((int(key), result.metric.factor * figure) for key, figure in result.figures.items())
        panel.plot(*zip(*points, strict=True), "o-", color=colours[result.system], label=result.label, markersize=3.5)
        theirs = sorted(published.figures.get(result.system, {}).items()) if published is not None else []
        if len(theirs) > 1:
            panel.plot(*zip(*theirs, strict=True), "--", color=colours[result.system], alpha=0.45, linewidth=1.2)
    told = []
    if results[0].axis == "length":
        panel.axvline(results[0].task["length"], color="0.7", linewidth=0.8)
        told.append("line: trained at")
    if published is not None:
        told.append("dashed: published")
    if all(int(key) > 0 for result in results for key in result.figures):
        panel.set_xscale("log", base=2)
    panel.set_xlabel(f"{results[0].axis} of the test" + (f" ({'; '.join(told)})" if told else ""))
    _figures(panel, results[0].metric, "")


def _training(panel: Any, results: Sequence[Result], colours: dict[str, str]) -> None:
    for result in results:
        steps, _, figures = zip(*result.curve, strict=True)
        shown = [result.metric.factor * figure for figure in figures]
        panel.plot(steps, shown, color=colours[result.system], label=result.label, linewidth=1.2)
    lasts = [result.curve[-1][0] for result in results]
    if max(lasts) > _APART * min(lasts):
        panel.set_xscale("log")
    panel.set_xlabel("step of training")
    _figures(panel, results[0].metric, " on each batch before it was learnt")


def _figures(panel: Any, metric: Metric, of: str) -> None:
    """The axis of the figures, and a legend."""
    panel.set_ylabel(f"{metric.name}{of}{f', {metric.unit}' if metric.unit else ''}")
    if metric.higher_is_better and metric.unit == "%":
        panel.set_ylim(-2, 103)
    elif not metric.higher_is_better:
        panel.set_yscale("log")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7, frameon=False)
