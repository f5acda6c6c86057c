"""The figure of one benchmark: a bar per contender, a panel per setting; or, over lengths and batches, lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.nn.storage import write_atomically
from longscan.plots.lines import draw_lines, place_of

_COLOURS = {"ours": "#1f6fb4", "peer": "#9aa5b1", "other": "#7d5ba6", "floor": "#d9822b"}


def plot_bench(report: str | os.PathLike[str], figure: str | os.PathLike[str]) -> Path:
    """Draws the report of `longscan bench` (JSON) as a PNG file.

    Raises:
        StorageError: the figure could not be written.
    """
    canvas = draw_bench(json.loads(Path(report).read_text(encoding="utf-8")))
    return write_atomically(figure, lambda temporary: canvas.savefig(temporary, format="png", dpi=150))


def draw_bench(values: Mapping[str, Any]) -> Any:
    """The figure of a report (as JSON).

    Bars are medians on a logarithmic axis, their whiskers the 20th and 80th percentile; contenders without a figure are
    left out. Where the rows stand in series (lengths, throughput, memory), see :func:`longscan.plots.lines.draw_lines`.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    rows = [row for row in values["rows"] if row["value"] is not None]
    if any(row.get("place") is not None for row in rows):
        return draw_lines(values)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    heights = [1 + sum(row["group"] == group for row in rows) for group in groups] or [1]
    canvas = Figure(figsize=(8, 0.36 * sum(heights) + 1), layout="constrained")
    panels = canvas.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=False):
        _panel(panel, group, [row for row in rows if row["group"] == group], values["higher_is_better"])
    better = "right" if values["higher_is_better"] else "left"
    panels[-1].set_xlabel(f"{values['unit']} (further {better} is better)")
    canvas.suptitle(f"longscan bench {values['bench']}: {place_of(values)}", fontsize=10)
    return canvas


def _panel(panel: Any, title: str, rows: list[dict[str, Any]], higher_is_better: bool) -> None:
    names = [row["contender"] for row in rows]
    values = [row["value"] for row in rows]
    # The value goes with the seconds, or against them where it is a rate.
    spread: tuple[list[float], list[float]] = ([], [])
    for row in rows:
        # What is no time, as memory, was measured once.
        timing = row["timing"] or {"low": 1, "median": 1, "high": 1}
        ends = [timing["high"], timing["low"]] if higher_is_better else [timing["low"], timing["high"]]
        ratios = [timing["median"] / end if higher_is_better else end / timing["median"] for end in ends]
        spread[0].append(row["value"] * max(0.0, 1 - ratios[0]))
        spread[1].append(row["value"] * max(0.0, ratios[1] - 1))
    panel.barh(names, values, color=[_COLOURS[row["kind"]] for row in rows], xerr=spread, error_kw={"elinewidth": 1})
    panel.set_xscale("log")
    panel.set_xlim(min(values) / 2, max(values) * 3)
    panel.invert_yaxis()
    panel.set_title(title, fontsize=8, loc="left")
    panel.tick_params(labelsize=8)
    for place, (value, above) in enumerate(zip(values, spread[1], strict=True)):
        panel.annotate(f" {value:.3g}", (value + above, place), va="center", fontsize=8)
