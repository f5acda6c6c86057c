"""docs/results.md from the result files: our figures beside the published ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from longscan.experiments.published import Published, beside
from longscan.experiments.results import Result
from longscan.experiments.settings import ALL_SCALES
from longscan.tasks.task import Metric, Recipe

_HEAD = """# Results

Written by `longscan reproduce --report` from the files in `results/`; do not edit. Our figures come first, published
ones in brackets behind them. *paper* is the published setting, *short* its task with minutes of training on a GPU,
*here* one scaled down for two CPU cores. Each section names the command that makes it. What the figures say, and where
they fall short: [findings](findings.md).
"""


def results_page(results: Iterable[Result], published: Mapping[str, Published], figures: str = "") -> str:
    """The page, as Markdown; ``figures``: of the results' folder, as the page would name it, to show its figures."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.experiment, result.scale), []).append(result)
    order = {scale: number for number, scale in enumerate(ALL_SCALES)}
    sections = sorted(groups.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    parts = [_HEAD, _contents(members for _, members in sections)]
    for (name, scale), members in sections:
        figure = f"{figures}/{name}/{scale}.png" if figures else ""
        parts.append(_section(members, beside(published, members[0].published, scale), figure))
    return "\n".join(parts)


def _contents(sections: Iterable[list[Result]]) -> str:
    """What there is, and where it was measured; links as GitHub and others make them from headings."""
    lines = [_row(["experiment", "scale", "systems", "measured on"]), _row(["---"] * 4)]
    for results in sections:
        first = results[0]
        anchor = re.sub(r"[^\w -]", "", _heading(first).lower()).replace(" ", "-")
        on = dict.fromkeys(map(_device, results))
        lines.append(_row([f"[{first.title}](#{anchor})", first.scale, str(len(results)), ", ".join(on)]))
    return "\n".join([*lines, ""])


def _heading(result: Result) -> str:
    return f"{result.title}, scale: {result.scale}"


def _section(results: list[Result], published: Published | None, figure: str) -> str:
    first = results[0]
    keys = sorted({int(key) for result in results for key in result.figures})
    task = ", ".join(f"{key} {value}" for key, value in first.task.items() if key != "name")
    command = f"longscan reproduce {first.experiment.replace('_', '-')} --scale {first.scale}"
    lines = [
        f"## {_heading(first)}",
        "",
        f"`{command}`. Task: {task}. {metric_words(first.metric)} by {first.axis}; "
        f"{first.sequences:,} test sequences each.",
    ]
    if published is not None:
        lines += ["", f"Published: {published.source}.{' ' + published.note if published.note else ''}"]
    lines += ["", _row(["system", *(f"{key:,}" for key in keys)]), _row(["---", *["---:"] * len(keys)])]
    lines += [_row([result_name(result), *(figure_cell(result, key, published) for key in keys)]) for result in results]
    if any(result.best for result in results):
        lines += [_row(["*the best possible*", *(best_cell(results, key) for key in keys)])]
    if figure:
        lines += ["", f"![{_heading(first)}]({figure})"]
    lines += ["", "<details><summary>Parameters, steps, times and machines</summary>", "", _row(COST_HEAD)]
    lines += [_row(["---", *["---:"] * 5, "---"])]
    lines += [*(_row(cost_cells(result)) for result in results), "", "</details>"]
    ways = {f"{result_name(result)}: {way}" for result in results if (way := _way(result.recipe))}
    if ways:
        lines += [
            "",
            f"Trained in a way of its own ([recipes](../experiments/README.md#recipes)): {'; '.join(sorted(ways))}.",
        ]
    return "\n".join([*lines, ""])


def _way(recipe: Mapping[str, Any]) -> str:
    """What of a recipe is more than rates and sizes, in words."""
    patience = f", at most {recipe['patience']:,} steps each" if recipe.get("patience") else ""
    words = {
        "objective": "the logarithm of the loss",
        "carry_state": "states carried from batch to batch",
        "lengths": f"lengths {', '.join(f'{length:,}' for length in recipe.get('lengths', ()))} first{patience}",
    }
    default = Recipe()
    return ", ".join(text for key, text in words.items() if recipe.get(key) and recipe[key] != getattr(default, key))


def result_name(result: Result) -> str:
    """Of a table's row."""
    return result.label if result.seed == 0 else f"{result.label} (seed {result.seed})"


def metric_words(metric: Metric) -> str:
    """What a table's figures are."""
    unit = {"%": ", in percent", "": ""}.get(metric.unit, f", {metric.unit}")
    return f"{metric.name[0].upper()}{metric.name[1:]}{unit}{'' if metric.higher_is_better else ' (lower is better)'}"


def figure_cell(result: Result, key: int, published: Published | None) -> str:
    """Our figure, and the published one in brackets."""
    ours = result.figures.get(str(key))
    theirs = published.of(result.system, key) if published is not None else None
    shown = "-" if ours is None else result.metric.number(ours)
    return shown if theirs is None else f"{shown} ({theirs:g})"


def best_cell(results: Iterable[Result], key: int) -> str:
    """The best possible figure, of the first of an experiment's results that knows it."""
    known = (result.metric.number(result.best[str(key)]) for result in results if str(key) in result.best)
    return next(known, "-")


#: Of the columns of :func:`cost_cells`.
COST_HEAD = ("system", "parameters", "steps", "ms a step", "training", "test", "on")


def cost_cells(result: Result) -> list[str]:
    """What a result took, and where."""
    return [
        result_name(result),
        f"{result.parameters:,}",
        f"{result.steps:,}",
        f"{1000 * result.train_seconds / result.steps:.2f}",
        duration(result.train_seconds),
        duration(result.test_seconds),
        f"{result.device}{_beside_others(result)}, {result.commit or 'no commit'}",
    ]


def _beside_others(result: Result) -> str:
    return f", one of {result.sharing} at a time" if result.sharing > 1 else ""


def measured_cost(results: Iterable[Result]) -> str:
    """What systems of an experiment took on each device, from the quickest to the slowest."""
    devices: dict[str, list[Result]] = {}
    for result in results:
        devices.setdefault(_device(result), []).append(result)
    words = []
    for device, members in devices.items():
        seconds = sorted(result.train_seconds + result.test_seconds for result in members)
        ends = dict.fromkeys(map(duration, (seconds[0], seconds[-1])))
        beside = " beside others" if any(result.sharing > 1 for result in members) else ""
        words.append(f"{' to '.join(ends)} a system on {device}{beside}")
    return f"measured: {'; '.join(words)}"


def _device(result: Result) -> str:
    """What trained it, in short."""
    return result.device.partition(",")[0].partition(" (")[0]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """In the unit one would say it in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
