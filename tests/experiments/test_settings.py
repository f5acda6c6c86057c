"""Experiments' files: every one can be read, and wrong ones are told what is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.cli.config import read_toml
from longscan.errors import ConfigError
from longscan.experiments import SCALES, System, read_published, read_settings, scales_of
from longscan.models import LanguageModelConfig
from longscan.models.matching import parameters
from longscan.nn.storage import save_tensors
from longscan.tasks.task import Recipe
from longscan.training.carry_over import carry_over
from longscan.training.tasks import task_config, task_model

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


def test_the_short_scale_is_some_experiments_own() -> None:
    assert scales_of(SMALL) == ["paper", "here"]
    short = {**SMALL, "short": {"recipe": {"steps": 7}}}
    assert scales_of(short) == ["paper", "short", "here"]
    assert read_settings("small", short, "short").systems["mamba"].recipe.steps == 7
    with pytest.raises(ConfigError, match="small has no scale 'short', it has paper, here"):
        read_settings("small", SMALL, "short")


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in NAMES for scale in scales_of(read_toml(FOLDER / f"{name}.toml"))]
)
def test_every_experiment_can_be_read_and_its_models_built(name: str, scale: str) -> None:
    settings = read_settings(name, read_toml(FOLDER / f"{name}.toml"), scale)
    published = read_published(read_toml(FOLDER / "published.toml"), "published.toml")
    if settings.published:
        table = published[settings.published]
        assert set(settings.systems) & set(table.figures)
        assert settings.scale == "here" or {n for row in table.figures.values() for n in row} <= set(settings.lengths)
    smallest: dict[str, System] = {}
    for system in settings.systems.values():
        smallest.setdefault(system.family, system)
        assert settings.lengths_of(system)
    for system in smallest.values():
        task_config(settings.task, system.mixer, system.recipe)


PRETRAINED = [
    (name, scale, system)
    for name in NAMES
    for scale in scales_of(read_toml(FOLDER / f"{name}.toml"))
    for system in read_settings(name, read_toml(FOLDER / f"{name}.toml"), scale).systems.values()
    if system.pretrained
]


@pytest.mark.parametrize(
    ("name", "scale", "system"), PRETRAINED, ids=[f"{name}-{scale}-{s.name}" for name, scale, s in PRETRAINED]
)
def test_pretrained_layers_fit(name: str, scale: str, system: System, tmp_path: Path) -> None:
    experiment, _, first = system.pretrained.partition("/")
    settings = [read_settings(one, read_toml(FOLDER / f"{one}.toml"), scale) for one in (experiment, name)]
    before, after = (
        task_model(at.task, one.mixer, one.recipe, seed=seed, device=torch.device("cpu"))
        for seed, (at, one) in enumerate(zip(settings, (settings[0].systems[first], system), strict=True))
    )
    tensors = {f"model/{key}": value.detach() for key, value in before.named_parameters()}
    carry_over(save_tensors(tmp_path / "a.safetensors", tensors, {}), after)
    last = dict(before.named_parameters())["backbone.norm_f.weight"]
    assert torch.equal(dict(after.named_parameters())["norm.weight"], last)


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


def test_sizes_cross_with_systems() -> None:
    values = copy.deepcopy(SMALL)
    sizes = {"s": {"d_model": 8, "learning_rate": 1e-2}, "m": {"parameters": 20_000, "n_layer": 3}}
    values["paper"] |= {"sizes": sizes}
    values["systems"]["mamba"]["depth"] = 2
    settings = read_settings("small", values, "paper")
    assert list(settings.systems) == ["mamba-s", "attention-s", "mamba-m", "attention-m"]
    small, large = settings.systems["mamba-s"], settings.systems["mamba-m"]
    assert (small.family, small.size, small.label) == ("mamba", "s", "mamba s")
    assert (small.recipe.d_model, small.recipe.n_layer, large.recipe.n_layer) == (8, 4, 6)
    assert small.recipe.learning_rate == 2e-3, "a system's recipe wins over a size's"
    assert settings.systems["attention-s"].recipe.learning_rate == 1e-2
    assert settings.systems["attention-m"].mixer == "attention"
    for system in (large, settings.systems["attention-m"]):
        config = task_config(settings.task, system.mixer, system.recipe)
        assert isinstance(config, LanguageModelConfig)
        assert config.d_model % 8 == 0
        assert parameters(config) == pytest.approx(20_000, rel=0.25)
    assert [system.family for system in read_settings("small", values, "here").systems.values()] == [
        "mamba",
        "attention",
    ]


def test_only_language_models_are_matched() -> None:
    recipe = Recipe(parameters=1000, model="sashimi")
    with pytest.raises(ConfigError, match="widths are matched for language models only"):
        task_config(read_settings("small", SMALL, "here").task, "mamba", recipe)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ((), "titel", "x", "unknown key 'titel' .did you mean 'title'"),
        (("here",), "length", [1], "did you mean 'lengths'"),
        (("here", "recipe"), "stepz", 1, "did you mean 'steps'"),
        (("here", "task"), "lengthy", 1, r"\[here.task\].*lengthy"),
        (("here", "task"), "length", 1, "length must be at least 3"),
        (("systems", "mamba"), "mixr", "mamba", "did you mean 'mixer'"),
        (("here",), "sizes", {"s": {"d_modl": 8}}, r"sizes.s\].*did you mean 'd_model'"),
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
