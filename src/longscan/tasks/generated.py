"""Finite sets that are made by code, from a seed that is theirs: everyone has the same, in the same three parts."""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
import torch

from longscan.errors import ArgumentError
from longscan.tasks.finite import FiniteTask, Split

_HELD_OUT = ("valid", "test")


@dataclasses.dataclass(frozen=True)
class GeneratedTask(FiniteTask):
    """Sequences number 0, 1, ... of a set: first those to train on, then two held-out parts.

    Args:
        train, valid, test: sequences of each part.
        tested_on: "valid" or "test", the part that tests are of; settings are chosen on the first.
    """

    train: int = 96_000
    valid: int = 2_000
    test: int = 2_000
    tested_on: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tested_on not in _HELD_OUT:
            raise ArgumentError(f"{self.name}: tested_on must be one of {', '.join(_HELD_OUT)}; got {self.tested_on!r}")

    @abc.abstractmethod
    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``count`` sequences, as they are stored, and their classes."""

    def load(self) -> Split:
        before = self.train + self.valid
        inputs, targets = (torch.from_numpy(array) for array in self.make(before + self.test))
        part = slice(self.train, before) if self.tested_on == "valid" else slice(before, None)
        targets = targets.long()
        return Split(inputs[: self.train], targets[: self.train], inputs[part].clone(), targets[part].clone())
