"""One system of an experiment, trained and tested in as many pieces as it takes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longscan import diagnostics
from longscan.errors import CheckpointError
from longscan.evaluation.tasks import evaluate_task
from longscan.experiments.results import Result
from longscan.experiments.settings import Settings, System
from longscan.tasks.task import Recipe
from longscan.training.carry_over import carry_over
from longscan.training.tasks import Point, TaskTrainer, task_model

CHECKPOINT = "checkpoint.safetensors"

# Between checkpoints.
_SECONDS = 60.0


class Run:
    """Trains and tests; everything that was done is in a checkpoint, from which the next run of the same goes on.

    Args:
        settings, system: what to do.
        seed: of weights and data.
        device: where.
        folder: of the checkpoint.
    """

    def __init__(self, settings: Settings, system: System, *, seed: int, device: torch.device, folder: Path) -> None:
        self.settings, self.system, self.seed, self.device = settings, system, seed, device
        self.path = _checkpoint(folder, f"{settings.name}/{system.name}", settings.scale, seed)
        self._folder = folder
        self.model = task_model(settings.task, system.mixer, system.recipe, seed=seed, device=device)
        self.curve: list[list[float]] = []
        self.figures: dict[str, float] = {}
        self.train_seconds = self.test_seconds = 0.0
        # Whether the last stretch was of the last stage: a figure at a shorter length is none of the task's.
        self._whole = True
        self._trainer: TaskTrainer | None = None
        self._saved = time.monotonic()
        # Some two hundred points on the curve, and on a GPU never a wait for a few small steps.
        self._stretch = max(1, min(500, system.recipe.steps // 200))

    @property
    def trained(self) -> bool:
        """Whether all steps are done, or enough was learnt."""
        if not self.curve:
            return False
        step, _, figure = self.curve[-1]
        until = self.settings.until
        enough = bool(until) and self._whole and self.settings.task.metric.reaches(figure, until)
        return step >= self.system.recipe.steps or enough

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; gives the steps done.

        Raises:
            CheckpointError: it is damaged, or its settings are not these; or there is none, nor one of the pretraining.
        """
        begin = time.monotonic()
        recipe = self.system.recipe
        self._trainer = TaskTrainer(self.settings.task, self.model, recipe, seed=self.seed, device=self.device)
        if self.path.exists():
            about = self._trainer.load(self.path)
            found, wanted = about["settings"], self._description()
            # What the version that wrote it did not know is at its default.
            found["recipe"] = _plain_recipe(Recipe()) | found["recipe"]
            found.setdefault("pretrained", "")
            if found != wanted:
                raise CheckpointError(
                    f"{self.path} was made with other settings: {found}; here {wanted}. Remove it to start afresh"
                )
            self.curve, self.figures = about["curve"], about["figures"] if "figures" in about else about["accuracy"]
            self.train_seconds, self.test_seconds = about["train_seconds"], about["test_seconds"]
            self._whole = about.get("whole", True)
        elif self.system.pretrained:
            self._carry_over()
        self.train_seconds += time.monotonic() - begin
        return self._trainer.steps_done

    def _carry_over(self) -> None:
        experiment, _, system = self.system.pretrained.partition("/")
        path = _checkpoint(self._folder, self.system.pretrained, self.settings.scale, self.seed)
        if not path.exists():
            command = f"longscan reproduce {experiment.replace('_', '-')} --only {system} --scale {self.settings.scale}"
            raise CheckpointError(f"{self.system.name} starts from {path}, which is not there; first: {command}")
        carry_over(path, self.model)

    def go_on(self, should_stop: Callable[[], bool], tell: Callable[[Point | None, dict[str, float]], Any]) -> bool:
        """Train and test until all is done (True) or ``should_stop`` (False); then everything is saved.

        Args:
            should_stop: asked between stretches of training and between lengths.
            tell: called after each with the newest point of the curve (None while testing) and the figures so far.
        """
        trainer = self._trainer
        assert trainer is not None, "resume() comes first"
        while not self.trained:
            begin = time.monotonic()
            self._whole = trainer.at_last_stage
            point = trainer.advance(min(self._stretch, self.system.recipe.steps - trainer.steps_done))
            self.train_seconds += time.monotonic() - begin
            self.curve.append([point.step, point.loss, point.figure])
            tell(point, self.figures)
            if should_stop():
                self._save()
                return False
            if time.monotonic() - self._saved > _SECONDS:
                self._save()
        self._save()
        return self._test(should_stop, tell)

    def _test(self, should_stop: Callable[[], bool], tell: Callable[[Point | None, dict[str, float]], Any]) -> bool:
        left = [length for length in self.settings.lengths_of(self.system) if str(length) not in self.figures]
        for index, length in enumerate(left):
            # After the first: however short the pieces are, each gets on.
            if index and should_stop():
                self._save()
                return False
            begin = time.monotonic()
            self.figures[str(length)] = evaluate_task(
                self.model,
                self.settings.task,
                length=length,
                sequences=self.settings.sequences,
                seed=self.seed,
                precision=self.system.recipe.precision,
            )
            self.test_seconds += time.monotonic() - begin
            tell(None, self.figures)
            if time.monotonic() - self._saved > _SECONDS:
                self._save()
        if left:
            self._save()
        return True

    def _description(self) -> dict[str, Any]:
        """What a checkpoint has to agree with, as JSON gives it back."""
        values = {
            "task": self._task(),
            "mixer": self.system.mixer,
            "recipe": _plain_recipe(self.system.recipe),
            "pretrained": self.system.pretrained,
            "seed": self.seed,
        }
        return dict(json.loads(json.dumps(values)))

    def _task(self) -> dict[str, Any]:
        return {"name": self.settings.task.name, **dataclasses.asdict(self.settings.task)}

    def _save(self) -> None:
        assert self._trainer is not None
        about = {
            "settings": self._description(),
            "curve": self.curve,
            "figures": self.figures,
            "whole": self._whole,
            "train_seconds": self.train_seconds,
            "test_seconds": self.test_seconds,
        }
        self._trainer.save(self.path, about)
        self._saved = time.monotonic()

    def result(self, sharing: int = 1) -> Result:
        """What came out; ``sharing``: how many trainings the device had at a time."""
        machine = diagnostics.describe_machine()
        processor = f"{machine['cpu']}, {machine['threads']} threads"
        settings = self.settings
        known = {key: settings.task.best(int(key), settings.sequences, self.seed) for key in self.figures}
        return Result(
            experiment=settings.name,
            title=settings.title,
            scale=settings.scale,
            system=self.system.name,
            label=self.system.label,
            family=self.system.family,
            size=self.system.size,
            seed=self.seed,
            task=self._task(),
            mixer=_plain(self.system.mixer),
            recipe=dataclasses.asdict(self.system.recipe),
            pretrained=self.system.pretrained,
            published=settings.published,
            parameters=self.model.num_parameters(),
            steps=int(self.curve[-1][0]),
            metric=settings.task.metric,
            figures=self.figures,
            best={key: best for key, best in known.items() if best is not None},
            axis=settings.task.axis,
            sequences=settings.task.held_out or settings.sequences,
            curve=self.curve,
            train_seconds=round(self.train_seconds, 1),
            test_seconds=round(self.test_seconds, 1),
            device=machine["gpus"][0] if self.device.type == "cuda" else processor,
            sharing=sharing,
            machine=machine,
            versions=diagnostics.versions(),
            commit=diagnostics.commit(),
        )


def _checkpoint(folder: Path, system: str, scale: str, seed: int) -> Path:
    """Of "EXPERIMENT/SYSTEM"."""
    return folder / f"{system}-{scale}-seed{seed}" / CHECKPOINT


def _plain(mixer: str | tuple[str, ...]) -> str | list[str]:
    return mixer if isinstance(mixer, str) else list(mixer)


def _plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe must not change between pieces: where the rate does not fall, a training may become longer."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if recipe.schedule == "constant":
        del values["steps"]
    return dict(values)
