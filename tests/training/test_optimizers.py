"""Parameter groups, schedules and configurations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longscan.errors import CheckpointError, ConfigError
from longscan.models import LanguageModel
from longscan.training import TrainConfig
from longscan.training.optimizers import Optimizers, parameter_groups
from longscan.training.schedules import learning_rate_factor
from tests.training.helpers import SHAPE


def test_groups_hold_every_parameter_once() -> None:
    model = LanguageModel(SHAPE)
    groups = parameter_groups(model, muon=True)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert "backbone.embedding.weight" in groups["decay"]
    assert "backbone.layers.0.mixer.in_proj.weight" in groups["muon"]
    for name in ("A_log", "D", "conv1d.bias", "dt_proj.bias"):
        assert f"backbone.layers.0.mixer.{name}" in groups["no_decay"]
    assert "backbone.norm_f.weight" in groups["no_decay"]
    assert "muon" not in parameter_groups(model, muon=False)


def test_state_goes_through_tensors() -> None:
    config = TrainConfig(optimizer="muon")
    torch.manual_seed(0)
    models = [LanguageModel(SHAPE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (Optimizers(model, config) for model in models)

    def step(model: LanguageModel, optimizers: Optimizers) -> None:
        tokens = torch.arange(20)[None]
        model.loss(tokens, tokens).backward()
        optimizers.step(0.5)

    step(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()}, "here")
    step(models[0], first)
    step(models[1], second)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name
    with pytest.raises(CheckpointError, match="another optimiser"):
        Optimizers(models[0], TrainConfig()).load_tensors(first.tensors(), "there")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule: str) -> None:
    config = TrainConfig(schedule=schedule, warmup=0.1, final_learning_rate=0.1)  # type: ignore[arg-type]
    rates = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert 0 < rates[0] < rates[9] < 1
    assert rates[10] == pytest.approx(1)
    assert rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)]
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)


def test_steps_of_a_time_are_bounded_by_passes_over_the_corpus() -> None:
    config = TrainConfig(batch_size=4, sequence_length=25)
    assert config.steps_in(seconds=60, step_seconds=0.5, tokens=1000) == 120
    assert config.steps_in(seconds=0.1, step_seconds=0.5, tokens=1000) == 1
    assert dataclasses.replace(config, passes=2.5).steps_in(60, 0.5, tokens=1000) == 25
    assert dataclasses.replace(config, passes=2.5).steps_in(5, 0.5, tokens=1000) == 10


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"minutes": -1.0},
        {"passes": 0.0},
        {"batch_size": 0},
        {"warmup": 1.0},
        {"optimizer": "sgd"},
        {"learning_rate": float("nan")},
        {"clip": -0.5},
    ],
)
def test_invalid_values_are_named(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(TrainConfig(), **change)
