"""Systems in several sizes: what parameters buy, and what more context does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longscan.experiments.results import Result
from longscan.plots.palette import COLOURS


def draw_scaling(results: Sequence[Result]) -> Any:
    """Figures at the task's own length against parameters, a line for each family; and, where figures are by context,
    those of the largest size by position.

    Args:
        results: of one experiment at one scale, of systems that have sizes.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first = results[0]
    families: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.parameters):
        families.setdefault(result.family, []).append(result)
    colours = {family: COLOURS[index % len(COLOURS)] for index, family in enumerate(sorted(families))}
    positions = first.axis == "context" and len(first.figures) > 1
    figure = Figure(figsize=(11 if positions else 6.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if positions else 1, squeeze=False)[0]
    for family, members in families.items():
        look = {"color": colours[family], "label": members[-1].label.removesuffix(f" {members[-1].size}")}
        last = [member.metric.factor * _own(member) for member in members]
        panels[0].plot([member.parameters for member in members], last, "o-", markersize=4, **look)
        if positions and members[-1].size == _largest(results):
            places, found = zip(*by_position(members[-1].figures, first.task["length"]), strict=True)
            panels[1].plot(places, found, "o-", markersize=3.5, **look)
    unit = f", {first.metric.unit}" if first.metric.unit else ""
    panels[0].set_ylabel(f"{first.metric.name}{unit}")
    titles = ("parameters", f"position in the context (size {_largest(results)})")
    for panel, title in zip(panels, titles, strict=False):
        panel.set_xlabel(title)
        panel.set_xscale("log", base=10 if panel is panels[0] else 2)
        panel.grid(alpha=0.25, which="both")
        panel.tick_params(labelsize=8)
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda count, _: _short(count)))
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{first.title} ({first.scale}; {first.device})", fontsize=10)
    return figure


def by_position(figures: Mapping[str, float], length: int) -> list[tuple[float, float]]:
    """Means between one context and the next, from means over contexts (of the same windows) up to ``length``.

    Returns:
        (place, figure): the middle of each stretch, on a logarithmic axis, and the mean over it.
    """
    found, before, total = [], 0, 0.0
    for context in sorted(int(key) for key in figures):
        if context <= length:
            sum_here = context * figures[str(context)]
            found.append((math.sqrt(max(before, 1) * context), (sum_here - total) / (context - before)))
            before, total = context, sum_here
    return found


def _short(count: float) -> str:
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}K"


def _own(result: Result) -> float:
    """At the length that it was trained at, or else the longest that was tested."""
    own = str(result.task["length"])
    return result.figures[own if own in result.figures else max(result.figures, key=int)]


def _largest(results: Sequence[Result]) -> str:
    return max(results, key=lambda result: result.parameters).size
