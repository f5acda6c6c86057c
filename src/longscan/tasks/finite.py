"""Tasks whose sequences all lie in memory: a part to train on and one that is held out."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from longscan.tasks.task import Task, uniform


@dataclasses.dataclass(frozen=True)
class Split:
    """Sequences as they are stored (:meth:`FiniteTask.present` makes inputs of them) and their targets, in two parts
    that share none."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def to(self, device: torch.device) -> Split:
        """The same on a device."""
        return Split(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class FiniteTask(Task):
    """A finite set: it is loaded once, goes to the device once, and is drawn from with replacement there."""

    @abc.abstractmethod
    def load(self) -> Split:
        """Read or make the set, on the CPU.

        Raises:
            DataError: it cannot be read, or a package that reads it is not installed.
        """

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        """Inputs of a batch of stored sequences, on their device and without waiting for it."""
        return stored

    @functools.cached_property
    def _parts(self) -> dict[torch.device, Split]:
        return {torch.device("cpu"): self.load()}

    def on(self, device: torch.device) -> Split:
        """The set on a device; it stays there."""
        parts = self._parts
        if device not in parts:
            parts[device] = parts[torch.device("cpu")].to(device)
        return parts[device]

    def to(self, device: torch.device) -> None:
        self.on(device)

    @property
    def held_out(self) -> int:
        return len(self.on(torch.device("cpu")).test_targets)

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        split = self.on(generator.device)
        drawn = uniform(0, len(split.train_targets), (batch,), generator)
        return self.present(split.train_inputs[drawn], length), split.train_targets[drawn]

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole held-out part, in order."""
        split = self.on(device)
        for inputs, targets in zip(split.test_inputs.split(batch), split.test_targets.split(batch), strict=True):
            yield self.present(inputs, length), targets
