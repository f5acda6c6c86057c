"""Training on tasks: it learns, goes on where it stopped, and a captured step is the step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.errors import CheckpointError, ConfigError, TrainingError
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.registry import SYNTHETIC
from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.task import Recipe, Task
from longscan.training.tasks import Point, TaskTrainer, task_model, task_scores

TASK = InductionHeads(length=16, vocab=6)
RECIPE = Recipe(d_model=16, steps=40, batch_size=8, learning_rate=1e-2, warmup=10, weight_decay=0.1)


def trainer(task: Task = TASK, recipe: Recipe = RECIPE, device: str = "cpu", capture: bool = True) -> TaskTrainer:
    where = torch.device(device)
    model = task_model(task, "mamba", recipe, seed=1, device=where)
    return TaskTrainer(task, model, recipe, seed=2, device=where, capture=capture)


def test_the_step_is_adamw_on_the_answers() -> None:
    ours = trainer()
    model = task_model(TASK, "mamba", RECIPE, seed=1, device=torch.device("cpu"))
    decayed = [p for p in model.parameters() if p.ndim > 1 and not getattr(p, "_no_weight_decay", False)]
    others = [p for p in model.parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10)
        tokens, targets = TASK.sample(8, generator)
        logits, _ = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, -1], targets[:, 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        point = ours.advance(1)
        assert point.loss == pytest.approx(loss.item(), rel=2e-4)
        assert point.figure == (logits[:, -1].argmax(-1) == targets[:, 0]).float().mean().item()


def test_scores_are_those_of_the_last_places() -> None:
    task = SelectiveCopying(length=20, tokens=3)
    model = task_model(task, "mamba", RECIPE, seed=0, device=torch.device("cpu"))
    tokens, _ = task.sample(2, torch.Generator().manual_seed(0))
    assert torch.allclose(task_scores(model, task, tokens), model(tokens)[0][:, -3:], atol=1e-6)


def test_resuming_gives_the_same_losses(tmp_path: Path) -> None:
    whole = trainer()
    first = [whole.advance(5) for _ in range(4)]
    part = trainer()
    pieces = [part.advance(5), part.advance(5)]
    part.save(tmp_path / "c.safetensors", {"note": 7})
    again = trainer()
    again.advance(3)  # whatever it did before is forgotten
    assert again.load(tmp_path / "c.safetensors") == {"note": 7}
    pieces += [again.advance(5), again.advance(5)]
    assert pieces == first
    assert (tmp_path / "c.safetensors").stat().st_size < 1 << 20


def test_the_seed_decides_the_weights_and_nothing_else_changes() -> None:
    before = torch.get_rng_state()
    a, b = trainer(), trainer()
    assert torch.equal(before, torch.get_rng_state())
    assert a.advance(3) == b.advance(3)


def test_a_model_learns() -> None:
    task = SelectiveCopying(length=8, tokens=2, vocab=5)
    recipe = Recipe(d_model=32, n_layer=1, batch_size=32, learning_rate=1e-2)
    ours = trainer(task, recipe)
    assert ours.advance(20).figure < 0.6
    points = [ours.advance(40) for _ in range(6)]
    assert points[-1].figure > 0.9
    assert points[-1].loss < points[0].loss


def test_a_loss_that_is_no_number_ends_it() -> None:
    ours = trainer()
    torch.nn.init.constant_(ours.model.backbone.norm_f.weight, float("inf"))
    with pytest.raises(TrainingError, match="before step 1: the loss is nan; lower learning_rate"):
        ours.advance(1)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = trainer().save(tmp_path / "c.safetensors", {})
    other = trainer(recipe=dataclasses.replace(RECIPE, d_model=24))
    with pytest.raises(CheckpointError, match="of another model, task or kind of device"):
        other.load(path)


STAGES = dataclasses.replace(
    RECIPE, lengths=(6, 10), passed=0.0, carry_state=True, objective="log-loss", schedule="cosine", eps=1e-12
)


def test_stages_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(recipe=STAGES)
    drawn: list[int] = []
    draw = InductionHeads.sample

    def sample(task: InductionHeads, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = draw(task, *arguments)
        drawn.append(tokens.shape[1])
        return tokens, targets

    monkeypatch.setattr(InductionHeads, "sample", sample)
    last = []
    for _ in range(4):
        last.append(ours.at_last_stage)
        ours.advance(2)
    assert drawn == [6, 6, 10, 10, 16, 16, 16, 16]
    assert last == [False, False, False, True]


def test_a_stage_lasts_until_it_is_mastered() -> None:
    ours = trainer(recipe=dataclasses.replace(STAGES, passed=1.1))
    for _ in range(3):
        ours.advance(1)
    assert not ours.at_last_stage


def test_patience_ends_with_a_length_that_is_not_learnt_but_not_before_states_are_carried(tmp_path: Path) -> None:
    recipe = dataclasses.replace(STAGES, passed=1.1, patience=4)
    ours = trainer(recipe=recipe)
    lengths, last = [], []
    for _ in range(7):
        ours.advance(2)
        lengths.append(ours._stage.length)
        last.append(ours.at_last_stage)
        # What it has waited so far is in the checkpoint.
        ours.save(tmp_path / "c.safetensors", {})
        ours = trainer(recipe=recipe)
        ours.load(tmp_path / "c.safetensors")
    assert lengths == [6, 6, 10, 10, None, None, None]
    assert not any(last)


@pytest.mark.parametrize("before", [1, 3])
def test_resuming_between_stages_gives_the_same_losses(tmp_path: Path, before: int) -> None:
    whole, part, again = (trainer(recipe=STAGES) for _ in range(3))
    first = [whole.advance(3) for _ in range(5)]
    pieces = [part.advance(3) for _ in range(before)]
    part.save(tmp_path / "c.safetensors", {})
    again.load(tmp_path / "c.safetensors")
    assert pieces + [again.advance(3) for _ in range(5 - before)] == first


def test_states_are_carried_in_language_models_only() -> None:
    with pytest.raises(ConfigError, match="only a language model's states"):
        trainer(recipe=dataclasses.replace(RECIPE, model="sashimi", carry_state=True))


@pytest.mark.gpu
def test_captured_stages_are_the_stages() -> None:
    captured, plain = (trainer(recipe=STAGES, device="cuda", capture=capture) for capture in (True, False))
    points = [[run.advance(5) for _ in range(5)] for run in (captured, plain)]
    assert captured._graph is not None
    for ours, theirs in zip(*points, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_captured_step_is_the_step(name: str) -> None:
    changes = {"mqar": {"length": 64, "pairs": 4, "vocab": 64}, "associative_recall": {}}.get(name, {"length": 64})
    task = SYNTHETIC[name](**changes)
    captured, plain = trainer(task, device="cuda"), trainer(task, device="cuda", capture=False)
    points = [[run.advance(10) for _ in range(3)] for run in (captured, plain)]
    assert captured._graph is not None
    for ours, theirs in zip(*points, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)


@pytest.mark.gpu
def test_a_captured_step_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = trainer(device="cuda")
    first: list[Point] = [whole.advance(10) for _ in range(4)]
    part = trainer(device="cuda")
    pieces = [part.advance(10), part.advance(10)]
    part.save(tmp_path / "c.safetensors", {})
    again = trainer(device="cuda")
    again.load(tmp_path / "c.safetensors")
    pieces += [again.advance(10), again.advance(10)]
    assert [point.loss for point in pieces] == pytest.approx([point.loss for point in first], rel=1e-4)
