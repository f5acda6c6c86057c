"""What was measured: one JSON file per experiment, scale, system and seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.errors import StorageError
from longscan.nn.storage import write_text
from longscan.tasks.task import ACCURACY, Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A trained and tested system.

    Args:
        experiment, title, scale, system, label, seed: what it is.
        family, size: of the system, where an experiment has sizes.
        task: its name and options.
        recipe: of model and training; ``mixer`` beside it.
        pretrained: experiment and system whose layers it started from; empty: none.
        published: name of the table of published figures.
        parameters: of the model.
        steps: done.
        metric: what the figures are of.
        figures: by length (text, as JSON has it), or by another key of the task; accuracies from 0 to 1.
        best: by key, figures that no model beats but by luck, where they are known.
        axis: what the keys are.
        sequences: tested with at each.
        curve: of training, rows of step, loss, figure on each batch before it was learnt.
        train_seconds, test_seconds: wall time, over all pieces.
        device: the GPU's name, or the processor's.
        sharing: how many trainings there were on it at a time: with more than one, the times are no speeds.
        machine, versions, commit: where it was measured (:mod:`longscan.diagnostics`).
    """

    experiment: str
    title: str
    scale: str
    system: str
    label: str
    family: str = ""
    size: str = ""
    seed: int
    task: Mapping[str, Any]
    mixer: Any
    recipe: Mapping[str, Any]
    pretrained: str = ""
    published: str
    parameters: int
    steps: int
    metric: Metric = ACCURACY
    figures: Mapping[str, float]
    best: Mapping[str, float] = dataclasses.field(default_factory=dict)
    axis: str = "length"
    sequences: int
    curve: list[list[float]]
    train_seconds: float
    test_seconds: float
    device: str
    sharing: int = 1
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str | None

    def save(self, folder: Path) -> Path:
        """Write it to ``folder/EXPERIMENT/SYSTEM-SCALE-seedN.json``, atomically.

        Raises:
            StorageError: the disk refused.
        """
        path = folder / self.experiment / f"{self.system}-{self.scale}-seed{self.seed}.json"
        return write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_results(folder: Path, experiment: str | None = None) -> list[Result]:
    """All results below a folder, or those of one experiment, in the order of their files' names.

    Raises:
        StorageError: a file is unreadable or no result.
    """
    return [read_result(path) for path in sorted(folder.glob(f"{experiment or '*'}/*-seed*.json"))]


def read_result(path: Path) -> Result:
    """The result in one file.

    Raises:
        StorageError: it is unreadable or no result.
    """
    names = {field.name for field in dataclasses.fields(Result)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "accuracy" in values:  # from before there were other metrics
            values["figures"] = values.pop("accuracy")
        if "metric" in values:
            values["metric"] = Metric(**values["metric"])
        return Result(**{key: value for key, value in values.items() if key in names})
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise StorageError(f"{path} is no result of `longscan reproduce`: {error}") from error
