"""Lengths that rise over training, and a classifier that starts from a language model's layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from longscan.errors import CheckpointError
from longscan.models import Classifier, LanguageModel
from longscan.tasks.dna_standin import DNASpeciesStandin, DNAStandin
from longscan.tasks.task import Recipe
from longscan.training.carry_over import carry_over
from longscan.training.task_schedules import stage_at
from longscan.training.tasks import TaskModel, TaskTrainer, task_model

CPU = torch.device("cpu")
RECIPE = Recipe(d_model=16, n_layer=2, steps=12, batch_size=2, learning_rate=1e-2, shortest=4, length_warmup=6)


def trained(recipe: Recipe, *, device: torch.device = CPU, capture: bool = True) -> TaskTrainer:
    task = DNAStandin(16, sequences=8)
    model = task_model(task, "mamba", recipe, seed=0, device=device)
    return TaskTrainer(task, model, recipe, seed=1, device=device, capture=capture)


def test_lengths_double_over_stages_of_as_many_steps() -> None:
    stages = [stage_at(RECIPE, 16, step, 0) for step in range(8)]
    assert [stage.length for stage in stages] == [4, 4, 4, 8, 8, 8, None, None]
    assert [stage.batches for stage in stages] == [4, 4, 4, 2, 2, 2, 1, 1]
    assert [stage.ends for stage in stages] == [3, 3, 3, 6, 6, 6, None, None]
    uneven = dataclasses.replace(RECIPE, length_warmup=7, shortest=3)
    lengths = [stage_at(uneven, 16, step, 0).length for step in range(8)]
    assert lengths == [3, 3, 3, 6, 6, 12, 12, None]
    for step in range(7):
        ends = stage_at(uneven, 16, step, 0).ends
        assert ends is not None
        assert stage_at(uneven, 16, ends - 1, 0).length == lengths[step] != stage_at(uneven, 16, ends, 0).length
    assert stage_at(dataclasses.replace(RECIPE, shortest=0), 16, 0, 0).length is None
    assert stage_at(dataclasses.replace(RECIPE, shortest=16), 16, 0, 0).length is None


def test_batches_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    drawn = DNAStandin.sample

    def sample(task: DNAStandin, batch: int, generator: torch.Generator, length: int | None = None) -> object:
        inputs, targets = drawn(task, batch, generator, length)
        shapes.append(tuple(inputs.shape))  # type: ignore[arg-type]
        return inputs, targets

    monkeypatch.setattr(DNAStandin, "sample", sample)
    trainer = trained(RECIPE)
    shapes.clear()
    # A stretch may go over the borders of stages.
    trainer.advance(5)
    trainer.advance(3)
    assert shapes == [(8, 4)] * 3 + [(4, 8)] * 3 + [(2, 16)] * 2


def test_a_run_goes_on_in_its_stage(tmp_path: Path) -> None:
    whole = trained(RECIPE)
    points = [whole.advance(2) for _ in range(4)]
    begun = trained(RECIPE)
    assert begun.advance(2) == points[0]
    assert begun.advance(2) == points[1]
    path = begun.save(tmp_path / "a.safetensors", {})
    again = trained(RECIPE)
    again.load(path)
    assert [again.advance(2) for _ in range(2)] == points[2:]


def test_lengths_that_rise_change_what_is_learnt() -> None:
    plain = trained(dataclasses.replace(RECIPE, shortest=0))
    assert trained(RECIPE).advance(8).loss != plain.advance(8).loss


def classifier(recipe: Recipe) -> TaskModel:
    return task_model(DNASpeciesStandin(16, sequences=8), "mamba", recipe, seed=5, device=CPU)


@pytest.mark.parametrize("d_intermediate", [0, 24])
def test_a_classifier_starts_from_the_layers_of_a_language_model(tmp_path: Path, d_intermediate: int) -> None:
    recipe = dataclasses.replace(RECIPE, d_intermediate=d_intermediate)
    trainer = trained(recipe)
    trainer.advance(4)
    path = trainer.save(tmp_path / "a.safetensors", {})
    model = classifier(dataclasses.replace(recipe, model_options={"norm": "rms"}))
    assert isinstance(model, Classifier)
    assert isinstance(trainer.model, LanguageModel)
    decoder = model.decoder.weight.clone()  # type: ignore[operator]
    carry_over(path, model)
    bases = torch.randint(4, (3, 16))
    hidden, _ = trainer.model.backbone(bases)
    seen, _ = model.stacks[0](model.encoder(bases))
    torch.testing.assert_close(model.norm(seen), hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.decoder.weight, decoder)  # type: ignore[arg-type]


def test_other_layers_are_not_carried_over(tmp_path: Path) -> None:
    path = trained(RECIPE).save(tmp_path / "a.safetensors", {})
    rms = {"norm": "rms"}
    for changes, word in (
        ({}, "it needs norm 'rms'"),
        ({"model_options": {**rms, "direction": "sum"}}, "direction 'forward'"),
        ({"model_options": rms, "n_layer": 3}, r"stacks\.0\.layers\.2.* is not the same"),
        ({"model_options": rms, "n_layer": 1}, r"stacks\.0\.layers\.1.* is not the same"),
        ({"model_options": rms, "d_model": 8}, "is not the same"),
    ):
        model = classifier(dataclasses.replace(RECIPE, **changes))  # type: ignore[arg-type]
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(CheckpointError, match=word):
            carry_over(path, model)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.gpu
def test_stages_are_captured_one_after_the_other() -> None:
    device = torch.device("cuda")
    losses = []
    for capture in (True, False):
        trainer = trained(RECIPE, device=device, capture=capture)
        losses.append([trainer.advance(2).loss for _ in range(5)])
        assert (trainer._graph is not None) == capture
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-3)
