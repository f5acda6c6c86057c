"""Figures of tasks: in chunks as in one piece."""

from __future__ import annotations

import pytest
import torch

from longscan.evaluation import tasks
from longscan.evaluation.selection import selections, step_sizes
from longscan.tasks.associative_recall import MultiQueryAssociativeRecall
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.task import Recipe, Task
from longscan.training.tasks import task_model

CPU = torch.device("cpu")
RECIPE = Recipe(d_model=16, n_layer=1)


@pytest.mark.parametrize("mixer", ["mamba", "attention", "s4d"])
@pytest.mark.parametrize(
    "task",
    [InductionHeads(length=37), SelectiveCopying(length=30, tokens=7), MultiQueryAssociativeRecall(40, 3, 64)],
    ids=lambda task: task.name,
)
def test_chunks_give_the_scores_of_the_whole(task: Task, mixer: str) -> None:
    model = task_model(task, mixer, RECIPE, seed=0, device=CPU)
    tokens, _ = task.sample(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = tasks.last_scores(model, tokens, task.answers(), None)
        for chunk in (1, 5, tokens.shape[1]):
            cut = tasks.last_scores(model, tokens, task.answers(), chunk)
            assert torch.allclose(cut, whole, atol=1e-5)


def test_an_untrained_model_guesses_and_long_sequences_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    task = InductionHeads(length=32)
    model = task_model(task, "mamba", RECIPE, seed=0, device=CPU)
    whole = tasks.evaluate_task(model, task, length=64, sequences=200, seed=3)
    assert 0 <= whole < 0.3
    monkeypatch.setattr(tasks, "_WHOLE", 63)
    monkeypatch.setitem(tasks._DRAWN, "cpu", tasks._CHUNK["cpu"])
    calls = []
    monkeypatch.setitem(tasks._CHUNK, "cpu", 2048)
    original = tasks.last_scores
    monkeypatch.setattr(tasks, "last_scores", lambda *a: calls.append(a[-1]) or original(*a))
    assert tasks.evaluate_task(model, task, length=64, sequences=200, seed=3) == whole
    assert calls == [10]


def test_step_sizes_are_those_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan.mixers import mamba

    task = SelectiveCopying(length=12, tokens=2)
    model = task_model(task, ("mamba", "attention", "mamba"), Recipe(d_model=16, n_layer=3), seed=0, device=CPU)
    tokens, _ = task.sample(2, torch.Generator().manual_seed(0))
    seen = []
    scan = mamba.selective_scan

    def watch(u: torch.Tensor, dt: torch.Tensor, *rest: torch.Tensor, **options: object) -> object:
        seen.append(torch.nn.functional.softplus(dt + rest[5]))
        return scan(u, dt, *rest, **options)

    monkeypatch.setattr(mamba, "selective_scan", watch)
    monkeypatch.setattr(mamba.Mamba, "_is_plain", lambda self: False)
    model(tokens)
    given = list(seen)
    for found, wanted in zip(step_sizes(model, tokens), given, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_what_states_hold_is_what_the_model_carries() -> None:
    task = SelectiveCopying(length=12, tokens=2)
    model = task_model(task, ("attention", "mamba", "mamba"), Recipe(d_model=16, n_layer=3), seed=0, device=CPU)
    tokens, _ = task.sample(2, torch.Generator().manual_seed(0))
    found = selections(model, tokens)
    assert [layer.layer for layer in found] == [1, 2]
    for layer, dt in zip(found, step_sizes(model, tokens), strict=True):
        assert torch.equal(layer.dt, dt)
        for cut in (1, 5, tokens.shape[1]):
            with torch.no_grad():
                _, state = model.backbone(tokens[:, :cut], model.initial_state(2))
            carried = state.layers[layer.layer].ssm
            assert torch.allclose(layer.norms[:, cut - 1], carried.square().sum(-1).sqrt(), rtol=1e-3, atol=1e-6)
        rates = model.backbone.blocks[layer.layer].mixer.A_log.detach().exp()
        for t in range(tokens.shape[1]):
            left = torch.exp(-rates * dt[:, t + 1 :].sum(1)[..., None]).mean(-1)
            wanted = (left * dt[:, t]).sum(-1) / dt[:, t].sum(-1)
            assert torch.allclose(layer.kept[:, t], wanted, rtol=1e-4)
        assert torch.allclose(layer.kept[:, -1], torch.ones(2))
