"""The figure of `longscan compare`: how the loss fell, and quality against what it costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.nn.storage import write_atomically
from longscan.plots.lines import place_of

_COSTS = (
    ("train_tokens_per_second", "training, tokens/s"),
    ("step_ms", "a step of decoding, ms"),
    ("state_bytes", "state of a sequence, bytes"),
)


def plot_comparison(result: str | os.PathLike[str], figure: str | os.PathLike[str]) -> Path:
    """Draws what `longscan compare` has written (JSON) as a PNG file.

    Raises:
        StorageError: the figure could not be written.
    """
    canvas = draw_comparison(json.loads(Path(result).read_text(encoding="utf-8")))
    return write_atomically(figure, lambda temporary: canvas.savefig(temporary, format="png", dpi=150))


def draw_comparison(values: Mapping[str, Any]) -> Any:
    """The figure of a comparison (as JSON).

    Returns:
        A matplotlib Figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in values["rows"] if not row["note"]]
    # Ten clear colours, or twice as many in pairs of a dark and a light one.
    count = 10 if len(values["rows"]) <= 10 else 20
    palette = colormaps[f"tab{count}"]
    colours = {row["mixer"]: palette(index % count) for index, row in enumerate(values["rows"])}
    canvas = Figure(figsize=(4.2 * (1 + len(_COSTS)), 4.2), layout="constrained")
    curves, *panels = canvas.subplots(1, 1 + len(_COSTS))
    for row in rows:
        curves.plot(*zip(*row["losses"], strict=True), label=row["mixer"], color=colours[row["mixer"]])
    curves.set_xlabel("steps")
    curves.set_ylabel("training loss, nats")
    curves.grid(alpha=0.25)
    if rows:
        curves.legend(fontsize=7, frameon=False)
    data = values["data"]
    for panel, (key, words) in zip(panels, _COSTS, strict=True):
        for row in rows:
            panel.plot(row[key], row["quality"], "o", color=colours[row["mixer"]])
            panel.annotate(f" {row['mixer']}", (row[key], row["quality"]), fontsize=7, va="center")
        panel.set_xscale("log")
        panel.margins(x=0.3)
        panel.set_xlabel(words)
        panel.grid(alpha=0.25)
    better = "higher" if data["higher_is_better"] else "lower"
    panels[0].set_ylabel(f"{data['metric']} ({better} is better)")
    size = f"{rows[0]['parameters']:,} parameters" if rows else "nothing trained"
    canvas.suptitle(f"longscan compare --task {values['compare']}: about {size}; {place_of(values)}", fontsize=10)
    return canvas
