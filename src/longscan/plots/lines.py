"""Lines over lengths or batches, in the manner of the Mamba paper's figure 8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AXES = {"lengths": "sequence length", "mixers": "sequence length", "throughput": "batch", "memory": "batch"}
_OURS = "#1f6fb4"
_COLOURS = ("#d9822b", "#7d5ba6", "#3a9a5b", "#c2405a", "#6b7683", "#b59a2b", "#2fa3a8", "#8c564b")
# Where there are more lines than colours.
_STYLES = ("o-", "s--", "^:")


def draw_lines(values: Mapping[str, Any]) -> Any:
    """A panel for each series of a report (as JSON), a line for each contender, both axes logarithmic.

    At the last place that one of ours shares with a contender, the figure says how many times ours is better there.

    Returns:
        A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    rows = [row for row in values["rows"] if row.get("place") is not None]
    series = list(dict.fromkeys(row["series"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    ours = next((row["contender"] for row in rows if row["kind"] == "ours"), None)
    others = [name for name in names if name != ours]
    looks = {
        name: (_COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)])
        for index, name in enumerate(others)
    }
    looks[ours or ""] = (_OURS, "o-")
    canvas = Figure(figsize=(5.4 * len(series), 4.4), layout="constrained")
    panels = canvas.subplots(1, len(series), squeeze=False)[0]
    for panel, name in zip(panels, series, strict=True):
        own = [row for row in rows if row["series"] == name and row["value"] is not None]
        _panel(panel, own, ours, looks, values["higher_is_better"])
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_xlabel(_AXES.get(values["bench"], ""))
    panels[0].set_ylabel(values["unit"])
    canvas.suptitle(f"longscan bench {values['bench']}: {place_of(values)}", fontsize=10)
    return canvas


def _panel(
    panel: Any, rows: list[dict[str, Any]], ours: str | None, looks: dict[str, tuple[str, str]], higher: bool
) -> None:
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        points.setdefault(row["contender"], {})[row["place"]] = row["value"]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    best = points.get(ours or "", {})
    for name, line in points.items():
        places = sorted(line)
        width = 2.4 if name == ours else 1.4
        colour, style = looks[name]
        panel.plot(places, [line[x] for x in places], style, label=name, color=colour, linewidth=width, markersize=3.5)
        shared = [x for x in places if x in best]
        if name != ours and shared:
            at = shared[-1]
            times = best[at] / line[at] if higher else line[at] / best[at]
            panel.annotate(
                f" {times:.3g}x",
                (at, line[at]),
                fontsize=7,
                color=colour,
                va="bottom",
                ha="right" if len(places) > 1 else "left",
            )
    panel.grid(True, which="major", alpha=0.25)
    panel.tick_params(labelsize=8, which="both")
    if points:
        panel.legend(fontsize=7, frameon=False, ncols=1 if len(points) <= len(_COLOURS) else 2)


def place_of(values: Mapping[str, Any]) -> str:
    """The machine of a report (as JSON): its GPU if that was measured, else its processor."""
    machine = values["machine"]
    gpus = machine["gpus"][:1] if values.get("settings", {}).get("device") != "cpu" else []
    return ", ".join(gpus) or f"{machine['cpu']}, threads: {machine['threads']}"
