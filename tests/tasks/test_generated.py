"""Sets that are made: three parts that share nothing, the same for everyone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.models import Classifier
from longscan.tasks.generated import GeneratedTask
from longscan.tasks.listops import ListOps
from longscan.tasks.pathfinder import Pathfinder, PathX
from longscan.tasks.task import Recipe
from longscan.training.tasks import TaskTrainer, task_model

CPU = torch.device("cpu")
PARTS = {"train": 40, "valid": 10, "test": 8}
SMALL: tuple[GeneratedTask, ...] = (
    ListOps(length=30, shortest=4, max_depth=3, max_args=4, **PARTS),
    Pathfinder(dashes=6, **PARTS),
    PathX(length=4096, dashes=6, **PARTS),
)


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_parts_share_nothing_and_are_the_same_again(task: GeneratedTask) -> None:
    on_test, on_valid = task.load(), dataclasses.replace(task, tested_on="valid").load()
    assert torch.equal(on_test.train_inputs, on_valid.train_inputs)
    parts = [on_test.train_inputs, on_valid.test_inputs, on_test.test_inputs]
    assert [len(part) for part in parts] == [40, 10, 8]
    whole = torch.cat(parts)
    assert len(whole.unique(dim=0)) == 58
    again = dataclasses.replace(task).load()
    assert torch.equal(again.test_inputs, on_test.test_inputs)
    assert torch.equal(again.test_targets, on_test.test_targets)


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_samples_and_tests(task: GeneratedTask) -> None:
    inputs, targets = task.sample(16, torch.Generator().manual_seed(0))
    assert targets.shape == (16,)
    assert targets.dtype == torch.int64
    assert 0 <= int(targets.min()) <= int(targets.max()) < task.outputs
    if task.inputs == "tokens":
        assert inputs.shape == (16, task.length)
        assert 0 <= int(inputs.min()) <= int(inputs.max()) < task.vocabulary
    else:
        assert inputs.shape == (16, task.length, 1)
        assert -1 == float(inputs.min()) < float(inputs.max()) == 1
    batches = list(task.tests(task.length, 1, 5, CPU, 0))
    assert [len(targets) for _, targets in batches] == [5, 3]


def test_expressions_are_as_long_as_their_symbols() -> None:
    inputs, _ = SMALL[0].sample(30, torch.Generator().manual_seed(0))
    lengths = SMALL[0].lengths(inputs)
    assert lengths is not None
    assert 4 <= int(lengths.min()) < int(lengths.max()) <= 30
    for row, length in zip(inputs, lengths.tolist(), strict=True):
        assert (row[:length] > 0).all()
        assert (row[length:] == 0).all()


def test_expressions_are_words() -> None:
    tokens = torch.tensor([11, 3, 12, 10, 5, 15, 15, 0, 0])
    assert SMALL[0].words(tokens) == "[MAX 2 [MIN 9 4 ] ]"
    assert SMALL[1].words(tokens) is None


def test_both_classes_are_equally_many() -> None:
    split = SMALL[1].load()
    assert float(split.train_targets.double().mean()) == float(split.test_targets.double().mean()) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ListOps(tested_on="train"), "tested_on must be one of valid, test; got 'train'"),
        (lambda: ListOps(test=0), "test must be an integer of at least 1"),
        (lambda: Pathfinder(length=1000), "pixels of a square image"),
        (lambda: PathX(length=400), "one of 32, 64, 128"),
    ],
)
def test_arguments(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


def test_short_expressions_are_learnt() -> None:
    task = ListOps(length=12, shortest=4, max_depth=2, max_args=3, train=2000, valid=1, test=1)
    recipe = Recipe(
        d_model=24, n_layer=1, steps=150, batch_size=32, learning_rate=1e-2, model_options={"direction": "sum"}
    )
    model = task_model(task, "lstm", recipe, seed=0, device=CPU)
    assert isinstance(model, Classifier)
    trainer = TaskTrainer(task, model, recipe, seed=0, device=CPU)
    first = trainer.advance(10)
    trainer.advance(120)
    assert first.figure < 0.35
    assert trainer.advance(20).figure > 0.5
