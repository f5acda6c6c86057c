"""Variants with one figure each, such as a table of ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longscan.experiments.published import Published
from longscan.experiments.results import Result
from longscan.plots.palette import COLOURS


def height(results: Sequence[Result]) -> float:
    """Of a figure in which every row is readable, in inches."""
    return 1.3 + 0.24 * len(results)


def draw_variants(panel: Any, results: Sequence[Result], published: Published | None) -> None:
    """A row for each system, the best on top: our figure, and what was published on an axis of its own.

    Args:
        panel: of matplotlib, which is drawn on.
        results: of one experiment at one scale, each with the same one figure.
        published: theirs, in whatever they measured.
    """
    first = results[0]
    metric, (key,) = first.metric, first.figures
    rows = sorted(results, key=lambda result: result.figures[key], reverse=not metric.higher_is_better)
    names = [f"{result.label}   {metric.number(result.figures[key])}" for result in rows]
    panel.plot([metric.factor * result.figures[key] for result in rows], names, "o", color=COLOURS[0])
    unit = f", {metric.unit}" if metric.unit else ""
    panel.set_xlabel(f"ours: {metric.name}{unit}, {first.axis} {int(key):,}", color=COLOURS[0])
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.3)
    theirs = [published.of(result.system, int(key)) if published is not None else None for result in rows]
    marked = [(value, name) for value, name in zip(theirs, names, strict=True) if value is not None]
    if marked:
        other = panel.twiny()
        other.plot(*zip(*marked, strict=True), "D", color=COLOURS[1], markersize=4.5, fillstyle="none")
        other.set_xlabel("published", color=COLOURS[1])
        other.tick_params(labelsize=8)
        if metric.unit == "%":
            # The same quantity: on the same scale.
            ends = [*panel.get_xlim(), *other.get_xlim()]
            panel.set_xlim(min(ends), max(ends))
            other.set_xlim(min(ends), max(ends))
