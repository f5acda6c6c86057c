"""An experiment's settings: one TOML file, at the paper's scale and at one for two CPU cores."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from longscan.errors import ArgumentError, ConfigError
from longscan.tasks.registry import TASKS
from longscan.tasks.task import Recipe, Task

#: As published; and scaled down so that two CPU cores do it in minutes.
SCALES = ("paper", "here")
#: The published task, trained for minutes on a GPU; some experiments have that besides.
SHORT = "short"
#: The largest first.
ALL_SCALES = ("paper", SHORT, "here")

_EXPERIMENT = ("title", "task", "published", "systems", *ALL_SCALES)
_SCALE = ("cost", "task", "recipe", "sizes", "lengths", "sequences", "until")
_SYSTEM = ("label", "mixer", "recipe", "depth", "longest", "pretrained", *ALL_SCALES)


@dataclasses.dataclass(frozen=True)
class System:
    """One row of a table.

    Args:
        name: in files and on the command line.
        label: in tables.
        mixer: of every layer, or several names that the layers cycle over.
        recipe: model and training.
        longest: length (or key) beyond which it is not tested (its memory or time grows too fast); None: any.
        pretrained: "EXPERIMENT/SYSTEM", a language model of the same scale, whose layers a classifier starts from.
        family, size: what it is one size of, and which; no size where an experiment has none.
    """

    name: str
    label: str
    mixer: str | tuple[str, ...]
    recipe: Recipe
    longest: int | None = None
    pretrained: str = ""
    family: str = ""
    size: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """An experiment at one scale.

    Args:
        name, title: of the experiment.
        scale: one of :data:`SCALES`, or :data:`SHORT`.
        cost: what it takes, in words.
        task: trained on.
        published: name of the table of published figures.
        lengths: to test at, or other keys of the task's figures.
        sequences: to test with, at each length, where there is no end to them.
        until: end training early once the figure, over a stretch of batches, is as good as this; 0: never.
        systems: by name.
    """

    name: str
    title: str
    scale: str
    cost: str
    task: Task
    published: str
    lengths: tuple[int, ...]
    sequences: int
    until: float
    systems: Mapping[str, System]

    def lengths_of(self, system: System) -> list[int]:
        """The lengths at which a system is tested."""
        return [length for length in self.lengths if system.longest is None or length <= system.longest]


def scales_of(values: Mapping[str, Any]) -> list[str]:
    """The scales of an experiment, from the content of its file; the largest first."""
    return [scale for scale in ALL_SCALES if scale in values]


def read_settings(
    name: str, values: Mapping[str, Any], scale: str, *, options: Mapping[str, Any] | None = None
) -> Settings:
    """An experiment at a scale, from the content of its file.

    Recipes are put together from the task's own, the scale's, the size's, the system's, and the system's at this scale;
    the later ones win. A scale's ``sizes`` are recipes by name, and every system is trained in each of them; with a
    system's ``depth`` it has so many layers for each one of the recipe.

    Args:
        name, values: of the experiment.
        scale: one of :func:`scales_of` it.
        options: of the task, instead of those in the file.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not allowed.
    """
    where = f"experiment {name}"
    _check(values, _EXPERIMENT, where)
    for key in ("title", "task", "systems", *SCALES):
        if key not in values:
            raise ConfigError(f"{where}: {key!r} is missing")
    if values["task"] not in TASKS:
        raise ConfigError(f"{where}: task {values['task']!r} is not one of {', '.join(TASKS)}")
    if scale not in values:
        raise ConfigError(f"{where} has no scale {scale!r}, it has {', '.join(scales_of(values))}")
    at = values[scale]
    _check(at, _SCALE, f"{where}, [{scale}]")
    kind = TASKS[values["task"]]
    try:
        task = kind(**{**at.get("task", {}), **(options or {})})
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"{where}, [{scale}.task]: {error}") from error
    recipe = _changed(kind.recipe, at.get("recipe", {}), f"{where}, [{scale}.recipe]")
    systems = {}
    for size, changes in at.get("sizes", {"": {}}).items():
        of_size = _changed(recipe, changes, f"{where}, [{scale}.sizes.{size}]")
        for family, system in values["systems"].items():
            made = _system(family, size, system, of_size, scale, f"{where}, [systems.{family}]")
            systems[made.name] = made
    return Settings(
        name=name,
        title=values["title"],
        scale=scale,
        cost=at.get("cost", "not measured"),
        task=task,
        published=values.get("published", ""),
        lengths=tuple(at.get("lengths", [task.length])),
        sequences=at.get("sequences", 512),
        until=at.get("until", 0.0),
        systems=systems,
    )


def _system(family: str, size: str, values: Mapping[str, Any], recipe: Recipe, scale: str, where: str) -> System:
    _check(values, _SYSTEM, where)
    own = values.get(scale, {})
    _check(own, ("recipe", "longest"), f"{where}, {scale}")
    recipe = _changed(recipe, values.get("recipe", {}), where)
    recipe = _changed(recipe, own.get("recipe", {}), where)
    mixer = values.get("mixer", family)
    return System(
        name=f"{family}-{size}" if size else family,
        label=f"{values.get('label', family)} {size}".rstrip(),
        mixer=tuple(mixer) if isinstance(mixer, list) else mixer,
        recipe=dataclasses.replace(recipe, n_layer=recipe.n_layer * values.get("depth", 1)),
        longest=own.get("longest", values.get("longest")),
        pretrained=values.get("pretrained", ""),
        family=family,
        size=size,
    )


def _changed(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    _check(changes, [field.name for field in dataclasses.fields(Recipe)], where)
    return dataclasses.replace(recipe, **changes)


def _check(values: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}{hint}; allowed: {', '.join(allowed)}")
