"""docs/results.md from the result files: our figures beside the published ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from longscan.experiments.published import Published, beside
from longscan.experiments.results import Result

_HEAD = """# Results

Written by `longscan reproduce --report` from the files in `results/`; do not edit. Accuracies are in percent, ours
first, the published figure in brackets behind it. *paper* is the published setting, *here* the one scaled down for two
CPU cores. Each section names the command that makes it.
"""


def results_page(results: Iterable[Result], published: Mapping[str, Published]) -> str:
    """The page, as Markdown."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.experiment, result.scale), []).append(result)
    parts = [_HEAD]
    for (_, scale), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "paper")):
        parts.append(_section(members, scale, beside(published, members[0].published, scale)))
    return "\n".join(parts)


def _section(results: list[Result], scale: str, published: Published | None) -> str:
    first = results[0]
    lengths = sorted({int(length) for result in results for length in result.accuracy})
    task = ", ".join(f"{key} {value}" for key, value in first.task.items() if key != "name")
    command = f"longscan reproduce {first.experiment.replace('_', '-')} --scale {scale}"
    lines = [
        f"## {first.title}, scale: {scale}",
        "",
        f"`{command}`. Task: {task}; {first.sequences:,} test sequences per length.",
    ]
    if published is not None:
        lines += ["", f"Published: {published.source}.{' ' + published.note if published.note else ''}"]
    lines += ["", _row(["system", *(f"{length:,}" for length in lengths)]), _row(["---", *["---:"] * len(lengths)])]
    lines += [_row([_name(result), *(_cell(result, length, published) for length in lengths)]) for result in results]
    lines += ["", _row(["system", "parameters", "steps", "ms a step", "training", "test", "on"])]
    lines += [_row(["---", *["---:"] * 5, "---"])]
    lines += [_row(_cost(result)) for result in results]
    return "\n".join([*lines, ""])


def _name(result: Result) -> str:
    return result.label if result.seed == 0 else f"{result.label} (seed {result.seed})"


def _cell(result: Result, length: int, published: Published | None) -> str:
    ours = result.accuracy.get(str(length))
    theirs = published.of(result.system, length) if published is not None else None
    shown = "-" if ours is None else percent(ours)
    return shown if theirs is None else f"{shown} ({theirs:g})"


def _cost(result: Result) -> list[str]:
    return [
        _name(result),
        f"{result.parameters:,}",
        f"{result.steps:,}",
        f"{1000 * result.train_seconds / result.steps:.2f}",
        duration(result.train_seconds),
        duration(result.test_seconds),
        f"{result.device}, {result.commit or 'no commit'}",
    ]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percent(share: float) -> str:
    """A share as percent, 100 only if it is all."""
    text = f"{100 * share:.1f}"
    return "99.9+" if text == "100.0" and share < 1 else text


def duration(seconds: float) -> str:
    """In the unit one would say it in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
