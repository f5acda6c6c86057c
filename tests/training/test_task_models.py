"""Tasks of every kind: the model that each gets, its training with schedules, dropout and batch norms, its test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from longscan.errors import ConfigError
from longscan.evaluation.tasks import evaluate_task
from longscan.models import Classifier, LanguageModel, Sashimi
from longscan.plots.samples import plot_samples
from longscan.tasks.delay import Delay
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.task import NRMSE, Metric, Recipe, Task, uniform
from longscan.tasks.trajectories import TrajectoriesStandin
from longscan.training.task_schedules import rate_factor
from longscan.training.tasks import TaskTrainer, task_model, task_scores

CPU = torch.device("cpu")
RECIPE = Recipe(d_model=16, n_layer=1, batch_size=8, learning_rate=1e-2)


@dataclasses.dataclass(frozen=True)
class Sign(Task):
    """Is the sum of what counts above 0? The number of places that count varies."""

    length: int = 12
    name: ClassVar[str] = "sign"
    recipe: ClassVar[Recipe] = RECIPE
    inputs = "values"
    readout = "pooled"
    channels: ClassVar[int] = 2  # type: ignore[assignment]
    outputs: ClassVar[int] = 2  # type: ignore[assignment]
    chance: ClassVar[float] = 0.5  # type: ignore[assignment]

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        length = length or self.length
        values = torch.randn(batch, length, 2, generator=generator)
        counts = uniform(1, length + 1, (batch, 1, 1), generator)
        values = values.where(torch.arange(length)[:, None] < counts, 0)
        return values, (values.sum((1, 2)) > 0).long()

    def lengths(self, inputs: Tensor) -> Tensor:
        return (inputs != 0).all(-1).sum(1)


@dataclasses.dataclass(frozen=True)
class Running(Task):
    """The mean of the last two values, at every place."""

    length: int = 10
    name: ClassVar[str] = "running"
    recipe: ClassVar[Recipe] = RECIPE
    inputs = "values"
    readout = "every"
    metric: ClassVar[Metric] = NRMSE
    channels: ClassVar[int] = 1  # type: ignore[assignment]
    outputs: ClassVar[int] = 1  # type: ignore[assignment]
    chance: ClassVar[float] = 1.0  # type: ignore[assignment]

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        values = torch.randn(batch, length or self.length, 1, generator=generator)
        return values, (values + torch.nn.functional.pad(values, (0, 0, 1, 0))[:, :-1]) / 2

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.sample(7, torch.Generator().manual_seed(5), length)
        yield inputs[:4], targets[:4]
        yield inputs[4:], targets[4:]


def trainer(task: Task, recipe: Recipe = RECIPE, mixer: str = "s4d") -> TaskTrainer:
    return TaskTrainer(task, task_model(task, mixer, recipe, seed=1, device=CPU), recipe, seed=2, device=CPU)


def test_each_kind_of_task_gets_its_model() -> None:
    tokens = InductionHeads(length=16, vocab=6)
    assert isinstance(task_model(tokens, "mamba", RECIPE, seed=0, device=CPU), LanguageModel)
    wave = dataclasses.replace(RECIPE, model="sashimi", model_options={"pool": [2]})
    model = task_model(tokens, "s4d", wave, seed=0, device=CPU)
    assert isinstance(model, Sashimi)
    read, _ = tokens.sample(3, torch.Generator())
    assert task_scores(model, tokens, read).shape == (3, 1, 6)
    with pytest.raises(ConfigError, match="sashimi reads tokens"):
        task_model(Sign(), "s4d", wave, seed=0, device=CPU)
    both = dataclasses.replace(RECIPE, model_options={"direction": "concat"})
    model = task_model(Sign(), "s4d", both, seed=0, device=CPU)
    assert isinstance(model, Classifier)
    assert len(model.stacks) == 2
    with pytest.raises(ConfigError, match="did you mean 'direction'"):
        task_model(Sign(), "s4d", dataclasses.replace(RECIPE, model_options={"directions": 1}), seed=0, device=CPU)


def test_places_that_do_not_count_change_nothing() -> None:
    task = Sign()
    inputs, _ = task.sample(4, torch.Generator().manual_seed(0))
    model = task_model(task, "s4d", RECIPE, seed=0, device=CPU)
    scores = task_scores(model, task, inputs)
    counts = task.lengths(inputs).tolist()
    assert min(counts) < task.length
    for row, count, wanted in zip(inputs, counts, scores, strict=True):
        assert torch.allclose(task_scores(model, task, row[None, :count])[0], wanted, atol=1e-5)


def test_classes_and_values_are_learnt() -> None:
    classes = trainer(Sign())
    classes.advance(100)
    assert classes.advance(30).figure > 0.8
    values = trainer(Running())
    first = values.advance(10).figure
    values.advance(150)
    assert values.advance(10).figure < 0.5 * first


def test_the_figure_is_of_all_that_is_held_out() -> None:
    task = Running()
    ours = trainer(task)
    figure = evaluate_task(ours.model, task, length=9)
    inputs, targets = task.sample(7, torch.Generator().manual_seed(5), 9)
    with torch.no_grad():
        errors = task_scores(ours.model, task, inputs) - targets
    assert figure == pytest.approx((errors.square().sum() / targets.square().sum()).sqrt().item(), rel=1e-5)
    assert ours.model.training


def test_rates_rise_and_fall() -> None:
    recipe = Recipe(steps=100, warmup=20, schedule="cosine", floor=0.1)
    for step, wanted in ((10, 0.5), (20, 1.0), (60, 0.1 + 0.9 * 0.5), (100, 0.1), (120, 0.1)):
        assert rate_factor(recipe, torch.tensor(float(step))).item() == pytest.approx(wanted)
    linear = dataclasses.replace(recipe, schedule="linear", warmup=0, floor=0.0)
    assert rate_factor(linear, torch.tensor(25.0)).item() == pytest.approx(0.75)
    assert rate_factor(dataclasses.replace(recipe, schedule="constant"), torch.tensor(90.0)).item() == 1


def test_dynamics_move_at_their_own_rate() -> None:
    ours = trainer(Running(), dataclasses.replace(RECIPE, dynamics_rate=1e-9))
    before = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    ours.advance(5)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in ours.model.named_parameters()}
    slow = [name for name, p in ours.model.named_parameters() if getattr(p, "_keep_float32", False)]
    assert slow
    assert all(moved[name] < 1e-6 for name in slow)
    assert all(moved[name] > 1e-4 for name in moved if name not in slow)


def test_dropout_and_batch_norms_go_on_where_they_stopped(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, model_options={"dropout": 0.3, "norm": "batch"}, schedule="linear", steps=20)
    before = torch.get_rng_state()
    whole = trainer(Running(), recipe)
    first = [whole.advance(5).loss for _ in range(3)]
    part = trainer(Running(), recipe)
    pieces = [part.advance(5).loss]
    part.save(tmp_path / "c.safetensors", {})
    again = trainer(Running(), recipe)
    again.load(tmp_path / "c.safetensors")
    pieces += [again.advance(5).loss for _ in range(2)]
    assert pieces == first
    assert all(math.isfinite(loss) for loss in first)
    assert torch.equal(before, torch.get_rng_state())
    state, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], theirs[name]) for name in state)
    assert evaluate_task(whole.model, Running()) == evaluate_task(again.model, Running())


@pytest.mark.parametrize("task", [InductionHeads(length=16), Sign(), Running()], ids=lambda task: task.name)
def test_samples_are_drawn(task: Task, tmp_path: Path) -> None:
    assert plot_samples(task, tmp_path / "samples.png", count=3).stat().st_size > 5000


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["s4d", "mamba", "lmu", "hippo", "lstm"])
@pytest.mark.parametrize("task", [Delay(length=40), TrajectoriesStandin(length=20)], ids=lambda task: task.name)
def test_a_captured_step_on_values_is_the_step(task: Task, mixer: str) -> None:
    device = torch.device("cuda")
    points = []
    for capture in (True, False):
        model = task_model(task, mixer, RECIPE, seed=1, device=device)
        ours = TaskTrainer(task, model, RECIPE, seed=2, device=device, capture=capture)
        points.append([ours.advance(5) for _ in range(3)])
        assert (ours._graph is not None) == capture
    for captured, plain in zip(*points, strict=True):
        assert captured.loss == pytest.approx(plain.loss, rel=1e-3)


@pytest.mark.gpu
def test_captured_dropout_is_seeded() -> None:
    device, task = torch.device("cuda"), TrajectoriesStandin(length=20)
    recipe = dataclasses.replace(RECIPE, model_options={"dropout": 0.3}, schedule="cosine", steps=20)
    losses = []
    for _ in range(2):
        ours = TaskTrainer(task, task_model(task, "s4d", recipe, seed=1, device=device), recipe, seed=2, device=device)
        losses.append([ours.advance(5).loss for _ in range(3)])
        assert ours._graph is not None
    assert losses[0] == losses[1]
