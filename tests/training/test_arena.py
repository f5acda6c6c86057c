"""Training on the Long Range Arena's kinds of input: padded tokens, pairs, images; in both directions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from longscan.evaluation.tasks import evaluate_task
from longscan.tasks.arena_standins import RetrievalStandin, ReviewsStandin, ShapesStandin
from longscan.tasks.listops import ListOps
from longscan.tasks.pathfinder import Pathfinder
from longscan.tasks.task import Recipe, Task
from longscan.training.tasks import TaskTrainer, task_model

PARTS = {"train": 48, "valid": 1, "test": 20}
RECIPE = Recipe(d_model=16, n_layer=1, batch_size=4, learning_rate=1e-3, model_options={"direction": "sum"})
IMAGES = dataclasses.replace(RECIPE, model_options={"direction": "sum", "norm": "batch"})
PAIRS = dataclasses.replace(RECIPE, model_options={"direction": "sum", "pair": True})
ONE_STACK = dataclasses.replace(IMAGES, model_options={"norm": "batch"}, mixer_options={"bidirectional": True})
CASES: list[tuple[Task, Recipe, str]] = [
    (ListOps(length=40, shortest=4, max_depth=3, max_args=4, **PARTS), RECIPE, "attention"),
    (ListOps(length=40, shortest=4, max_depth=3, max_args=4, **PARTS), RECIPE, "s4"),
    (ReviewsStandin(length=100, **PARTS), RECIPE, "mamba"),
    (RetrievalStandin(length=60, **PARTS), PAIRS, "lstm"),
    (ShapesStandin(length=256, **PARTS), ONE_STACK, "s5"),
    (Pathfinder(dashes=6, **PARTS), ONE_STACK, "s4"),
    (Pathfinder(dashes=6, **PARTS), IMAGES, "mamba"),
]


def name_of(case: object) -> str:
    return getattr(case, "name", "") or (case if isinstance(case, str) else "")


@pytest.mark.parametrize(("task", "recipe", "mixer"), CASES, ids=name_of)
def test_a_step_and_the_held_out_part(task: Task, recipe: Recipe, mixer: str) -> None:
    device = torch.device("cpu")
    model = task_model(task, mixer, recipe, seed=0, device=device)
    point = TaskTrainer(task, model, recipe, seed=0, device=device).advance(1)
    assert abs(point.loss - math.log(task.outputs)) < 1.5
    figure = evaluate_task(model, task)
    assert figure * 20 == pytest.approx(round(figure * 20)), "of twenty sequences"


@pytest.mark.gpu
@pytest.mark.parametrize(("task", "recipe", "mixer"), CASES, ids=name_of)
def test_a_captured_step_is_the_step(task: Task, recipe: Recipe, mixer: str) -> None:
    device = torch.device("cuda")
    points = []
    for capture in (True, False):
        model = task_model(task, mixer, recipe, seed=1, device=device)
        ours = TaskTrainer(task, model, recipe, seed=2, device=device, capture=capture)
        points.append([ours.advance(5) for _ in range(3)])
        assert (ours._graph is not None) == capture
    for captured, plain in zip(*points, strict=True):
        assert captured.loss == pytest.approx(plain.loss, rel=1e-3)
