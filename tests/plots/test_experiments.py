"""Figures of experiments' results, seen through matplotlib's own objects."""

from __future__ import annotations

from typing import Any

import pytest

from longscan.experiments.published import Published
from longscan.experiments.results import Result
from longscan.plots.experiments import draw_experiment
from longscan.tasks.task import ACCURACY, BITS_PER_BYTE, Metric


def result(
    system: str, figures: dict[str, float], *, steps: int = 100, metric: Metric = ACCURACY, **more: Any
) -> Result:
    values: dict[str, Any] = {
        "experiment": "small",
        "title": "Small",
        "scale": "paper",
        "system": system,
        "label": system,
        "seed": 0,
        "task": {"name": "x", "length": 16},
        "mixer": "mamba",
        "recipe": {},
        "published": "",
        "parameters": 1000,
        "steps": steps,
        "metric": metric,
        "figures": figures,
        "sequences": 8,
        "curve": [[steps // 2, 1.0, 0.5], [steps, 0.5, 0.75]],
        "train_seconds": 1.0,
        "test_seconds": 1.0,
        "device": "GPU",
        "machine": {},
        "versions": {},
        "commit": None,
    }
    return Result(**values | more)


def test_twelve_systems_are_told_apart() -> None:
    figure = draw_experiment([result(f"s{n}", {"16": 0.5, "32": 0.25}) for n in range(12)], None)
    for panel in figure.axes:
        assert len({line.get_color() for line in panel.lines if line.get_label().startswith("s")}) == 12


def test_long_and_short_trainings_have_room() -> None:
    alike = draw_experiment([result("a", {"16": 1.0}), result("b", {"16": 1.0}, steps=300)], None)
    apart = draw_experiment([result("a", {"16": 1.0}), result("b", {"16": 1.0}, steps=500)], None)
    assert alike.axes[1].get_xscale() == "linear"
    assert apart.axes[1].get_xscale() == "log"


def test_one_figure_each_is_a_row_beside_the_published_one() -> None:
    published = Published("Someone 2001", {"a": {16: 40.0}})
    figure = draw_experiment([result("a", {"16": 0.75}), result("b", {"16": 0.5})], published)
    rows, theirs = figure.axes[0], next(panel for panel in figure.axes if panel.get_xlabel() == "published")
    assert list(rows.lines[0].get_xdata()) == pytest.approx([50, 75])
    assert list(rows.lines[0].get_ydata()) == ["b   50.0", "a   75.0"]
    assert list(theirs.lines[0].get_xdata()) == [40]
    # Both in percent: on one scale.
    assert rows.get_xlim() == theirs.get_xlim()


def test_positions_are_of_the_largest_size_only() -> None:
    sizes = [("a", "s", 1000), ("a", "l", 2_000_000), ("b", "s", 1100)]
    results = [
        result(
            f"{family}-{size}",
            {"8": 3.0, "16": 2.0},
            metric=BITS_PER_BYTE,
            axis="context",
            family=family,
            size=size,
            label=f"{family} {size}",
            parameters=parameters,
        )
        for family, size, parameters in sizes
    ]
    by_size, by_position = draw_experiment(results, None).axes
    assert {line.get_label() for line in by_size.lines} == {"a", "b"}
    assert [line.get_label() for line in by_position.lines] == ["a"]
    shown = by_size.xaxis.get_major_formatter()
    assert (shown(200_000), shown(2_000_000)) == ("200K", "2M")
