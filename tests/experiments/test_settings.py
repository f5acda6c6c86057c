"""Experiments' files: every one can be read, and wrong ones are told what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from longscan.cli.config import read_toml
from longscan.errors import ConfigError
from longscan.experiments import SCALES, read_published, read_settings
from longscan.training.tasks import task_config

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = [path.stem for path in FOLDER.glob("*.toml") if "systems" in read_toml(path)]

SMALL: dict[str, Any] = {
    "title": "Small",
    "task": "induction_heads",
    "paper": {"task": {"length": 256}, "recipe": {"steps": 100, "learning_rate": 1e-4}},
    "here": {"task": {"length": 16}, "recipe": {"steps": 10}, "lengths": [16, 32]},
    "systems": {
        "mamba": {"paper": {"recipe": {"learning_rate": 2e-3}}},
        "attention": {"label": "attention, rotary", "recipe": {"d_model": 32}, "longest": 16},
    },
}


def test_there_are_experiments() -> None:
    assert {"induction_heads", "selective_copying", "associative_recall", "mqar"} <= set(NAMES)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_read_and_its_models_built(name: str, scale: str) -> None:
    settings = read_settings(name, read_toml(FOLDER / f"{name}.toml"), scale)
    published = read_published(read_toml(FOLDER / "published.toml"), "published.toml")
    if settings.published:
        table = published[settings.published]
        assert set(settings.systems) & set(table.figures)
        assert settings.scale != "paper" or {n for row in table.figures.values() for n in row} <= set(settings.lengths)
    for system in settings.systems.values():
        task_config(settings.task, system.mixer, system.recipe)
        assert settings.lengths_of(system)


def test_later_recipes_win() -> None:
    paper, here = (read_settings("small", SMALL, scale) for scale in SCALES)
    assert (paper.task.length, here.task.length) == (256, 16)
    assert paper.systems["mamba"].recipe.learning_rate == 2e-3
    assert paper.systems["attention"].recipe.learning_rate == 1e-4
    assert paper.systems["attention"].recipe.d_model == 32
    assert paper.systems["mamba"].recipe.steps == 100
    assert here.systems["mamba"].recipe.steps == 10
    assert here.systems["mamba"].recipe.learning_rate == 1e-3, "the task's own"
    assert here.lengths_of(here.systems["mamba"]) == [16, 32]
    assert here.lengths_of(here.systems["attention"]) == [16]
    assert paper.lengths == (256,)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ((), "titel", "x", "unknown key 'titel' .did you mean 'title'"),
        (("here",), "length", [1], "did you mean 'lengths'"),
        (("here", "recipe"), "stepz", 1, "did you mean 'steps'"),
        (("here", "task"), "lengthy", 1, r"\[here.task\].*lengthy"),
        (("here", "task"), "length", 1, "length must be at least 3"),
        (("systems", "mamba"), "mixr", "mamba", "did you mean 'mixer'"),
        ((), "task", "juggling", "task 'juggling' is not one of"),
    ],
)
def test_wrong_settings_are_refused(place: tuple[str, ...], key: str, value: Any, message: str) -> None:
    values = copy.deepcopy(SMALL)
    table = values
    for part in place:
        table = table[part]
    table[key] = value
    with pytest.raises(ConfigError, match=message):
        read_settings("small", values, "here")


def test_missing_parts_are_named() -> None:
    with pytest.raises(ConfigError, match="'here' is missing"):
        read_settings("small", {key: value for key, value in SMALL.items() if key != "here"}, "paper")
    with pytest.raises(ConfigError, match="must have a source"):
        read_published({"table": {"figures": {}}}, "published.toml")
