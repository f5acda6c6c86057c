"""Options from the defaults, files and flags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from longscan.cli.config import differences, merge
from longscan.cli.train_options import ModelOptions, Options, parse, saved_options
from longscan.errors import ConfigError
from longscan.models import LanguageModelConfig
from longscan.tasks.text import TextConfig, recipe
from longscan.training.runs import create_run

FILE = """
device = "cpu"

[text]
data = "some/where"

[model]
d_model = 48
mixer = ["mamba", "attention"]

[model.mixer_options.attention]
n_heads = 4

[training]
steps = 7
learning_rate = 1e-2
"""


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(FILE)
    options = parse(["text", "--config", str(path), "--steps", "9", "--no-carry-state"], "longscan train")
    assert options.training.steps == 9
    assert options.training.learning_rate == 1e-2
    assert options.text.data == "some/where"
    assert options.model.d_model == 48
    assert options.model.mixer == ("mamba", "attention")
    assert options.model.mixer_options == {"attention": {"n_heads": 4}}
    assert options.model.n_layer == recipe("cpu")["model"]["n_layer"]


def test_a_run_goes_on_with_its_whole_model(tmp_path: Path) -> None:
    """Every field of a model that a run can be given comes back from its configuration."""
    flags = [
        "--mixer", "attention", "--norm", "layer", "--no-prenorm", "--mlp", "relu", "--positions", "learned",
        "--max-positions", "99", "--d-intermediate", "20", "--d-model", "12", "--n-layer", "1", "--block", "h3",
    ]  # fmt: skip
    options = parse(["text", *flags], "longscan train")
    assert all(value != getattr(ModelOptions(), name) for name, value in vars(options.model).items() if value)
    model = LanguageModelConfig(**{**vars(options.model), "vocab_size": 7, "mixer": "attention"})
    folder = create_run(tmp_path, "run", {"text": {}, "model": model.to_dict(), "training": {}, "device": "cpu"})
    assert saved_options(folder).model == options.model


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[model]\nd_modle = 3", r"unknown key 'model.d_modle' \(did you mean 'd_model'\?\)"),
        ("[modle]\nd_model = 3", "did you mean 'model'"),
        ('[training]\nsteps = "many"', "training.steps must be an integer or none, got 'many'"),
        ("[training]\nsteps = -1", "steps must be at least 1"),
        ("[training]\ncompile = 1", "training.compile must be true or false"),
        ('[training]\noptimizer = "sgd"', "must be 'adamw' or 'muon'"),
        ("what", "cannot read"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=says):
        parse(["text", "--config", str(path)], "longscan train")


def test_every_field_goes_through_json() -> None:
    options = merge(Options(), recipe("cuda"), "recipe")
    values = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(options, runs="runs"))))  # type: ignore[arg-type]
    values["runs"] = Path(values["runs"])
    assert merge(Options(), {key: value for key, value in values.items() if value is not None}, "json") == options


def test_differences_name_the_field() -> None:
    changed = dataclasses.replace(Options(), text=TextConfig(data="x"))
    assert differences(Options(), changed) == ["text.data is 'stdlib' there and 'x' here"]


@pytest.mark.parametrize(
    ("arguments", "says"), [(["txet"], "task: 'txet'"), ([], "name a task"), (["--steps", "3"], "name a task")]
)
def test_no_task(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(arguments, "longscan train")


def test_experiments_are_sound() -> None:
    for path in sorted(Path(__file__).parents[2].glob("experiments/text*.toml")):
        assert parse(["text", "--config", str(path)], "longscan train").config == path
