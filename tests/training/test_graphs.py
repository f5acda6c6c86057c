"""A captured step on a GPU is the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longscan.models import LanguageModel
from longscan.training import Batches, Ranks, Stepper, TrainConfig
from tests.training.helpers import SHAPE, TOKENS

CONFIG = TrainConfig(steps=6, batch_size=4, sequence_length=64, learning_rate=1e-3)


def losses(config: TrainConfig, device: str = "cuda") -> tuple[list[float], Stepper]:
    torch.manual_seed(0)
    model = LanguageModel(SHAPE).to(device)
    batches = Batches(TOKENS, config.batch_size, config.sequence_length, config.seed, config.carry_state)
    stepper = Stepper(model, config, batches, ranks=Ranks(), device=torch.device(device))
    return [value.item() for step in range(6) for value in stepper.step(step, 1.0)], stepper


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"carry_state": True}, {"accumulate": 2, "carry_state": True}, {"precision": "bfloat16"}],
    ids=str,
)
def test_a_captured_step_is_the_step(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    captured, stepper = losses(config)
    plain, _ = losses(dataclasses.replace(config, cuda_graph=False))
    assert stepper._captured is not None
    assert captured == pytest.approx(plain, rel=1e-4)


@pytest.mark.gpu
def test_measuring_leaves_a_captured_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = LanguageModel(SHAPE).cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = Batches(TOKENS, CONFIG.batch_size, CONFIG.sequence_length, CONFIG.seed, CONFIG.carry_state)
    stepper = Stepper(model, CONFIG, batches, ranks=Ranks(), device=torch.device("cuda"))
    assert stepper.measure(0.0) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    first, _ = stepper.step(0, 1.0)
    assert first.item() == pytest.approx(losses(CONFIG)[0][0], rel=1e-5)


def test_on_a_cpu_nothing_is_captured() -> None:
    values, stepper = losses(CONFIG, "cpu")
    assert stepper._captured is None
    assert len(values) == 12
