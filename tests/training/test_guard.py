"""Gradients that are no numbers, and spikes: left out, told of, and the same after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import ConfigError, TrainingError
from longscan.models import LanguageModel
from longscan.nn.state import ModelState
from longscan.training import TrainConfig
from longscan.training.guard import Guard
from tests.training.helpers import CONFIG, Silent, history, make_trainer

SKIPS = dataclasses.replace(CONFIG, leave_out_bad_steps=True, carry_state=True)


def spoil(monkeypatch: pytest.MonkeyPatch, at: set[int], factor: float) -> None:
    """Multiply the losses of some calls."""
    whole = LanguageModel.loss_and_state
    calls = 0

    def loss_and_state(self: LanguageModel, *arguments: Any, **options: Any) -> tuple[Tensor, ModelState | None]:
        nonlocal calls
        loss, state = whole(self, *arguments, **options)
        if torch.is_grad_enabled():
            calls += 1
            if calls in at:
                loss = loss * factor
        return loss, state

    monkeypatch.setattr(LanguageModel, "loss_and_state", loss_and_state)


def test_a_nan_is_left_out_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {4, 5}, math.nan)
    trainer, model = make_trainer(tmp_path, SKIPS)
    assert trainer.run()
    rows = history(tmp_path)
    assert [row["step"] for row in rows if "left_out" in row] == [4, 5]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, *range(6, 13)]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    # As if these steps had not been, but for the learning rate and the data of those after them.
    assert rows[5]["learning_rate"] < rows[2]["learning_rate"]
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3], parse_constant=pytest.fail)


def test_the_update_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, model = make_trainer(tmp_path, SKIPS)
    stepper = trainer._stepper
    stepper.step(0, 1.0)
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | stepper.optimizers.tensors()).items()}
    spoil(monkeypatch, {1}, math.inf)
    stepper.step(1, 1.0)
    assert stepper.left_out
    after = model.state_dict() | stepper.optimizers.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    stepper.step(2, 1.0)
    assert not stepper.left_out
    assert not torch.equal(after["backbone.norm_f.weight"], before["backbone.norm_f.weight"])


def test_a_spike_is_left_out_alike_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SKIPS, steps=32, spike=10.0)
    with monkeypatch.context() as patch:
        spoil(patch, {3, 30}, 1e4)  # the third comes before anybody knows what is usual
        make_trainer(tmp_path / "whole", config)[0].run()
    with monkeypatch.context() as patch:
        spoil(patch, {3, 30}, 1e4)
        calls = 0

        def stop() -> bool:
            nonlocal calls
            calls += 1
            return calls == 25

        assert not make_trainer(tmp_path / "parts", config, stop=stop)[0].run()
        assert make_trainer(tmp_path / "parts", config)[0].run()
    assert [row["step"] for row in history(tmp_path / "whole") if "left_out" in row] == [30]
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_ten_in_a_row_stop_the_run_with_nothing_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SKIPS, steps=30, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        spoil(patch, set(range(3, 100)), math.nan)
        with pytest.raises(TrainingError, match="10 updates in a row were left out"):
            make_trainer(tmp_path / "run", config)[0].run()
    # What was before the bad steps is kept: the last checkpoints are of updates that were made.
    observer = Silent()
    assert make_trainer(tmp_path / "run", config, observer=observer)[0].run()
    assert observer.warnings == []
    assert history(tmp_path / "run")[-1]["step"] == 30


def test_the_usual_norm_is_a_mean_of_what_was_made() -> None:
    guard = Guard(5.0)
    assert all(guard.accepts(1.0, 2.0) for _ in range(25))
    assert not guard.accepts(1.0, 10.1)
    assert not guard.accepts(1.0, math.nan)
    assert not guard.accepts(math.inf, 2.0)
    assert guard.accepts(1.0, 9.9)
    other = Guard(5.0)
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()


def test_a_spike_needs_to_be_left_out() -> None:
    with pytest.raises(ConfigError, match="leave_out_bad_steps"):
        TrainConfig(spike=3.0)
    with pytest.raises(ConfigError, match="compile_blocks"):
        TrainConfig(compile=True, parallel="fsdp")
