"""Which character is being written? Pen trajectories, tested at another sampling rate than they were trained at.

The time-scale shift of HiPPO (Gu et al. 2020, section 4): LegS has no time scale to go wrong. The set is the user's
(UCI Character Trajectories); the stand-in draws smooth curves of as many classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import ArgumentError, DataError
from longscan.tasks.finite import FiniteTask, Split
from longscan.tasks.task import Recipe, Task, uniform
from longscan.tasks.time_series import read_time_series

_RECIPE = Recipe(d_model=256, n_layer=1, steps=2000, batch_size=100, learning_rate=1e-3)
# The authors train on seven tenths.
_TRAINED = 0.7


@dataclasses.dataclass(frozen=True)
class CharacterTrajectories(FiniteTask):
    """2,858 characters of 20 classes: the pen's velocity in x and y, and its force, at up to 182 places.

    Args:
        length: places at most, at the file's own rate.
        rate: trained at, in percent of the file's; a divisor of 100.
        data: the file, ``.ts`` (timeseriesclassification.com) or ``.mat`` (UCI), or a folder with the former's two.
    """

    length: int = 182
    rate: int = 100
    data: str = "CharacterTrajectories"

    name: ClassVar[str] = "character_trajectories"
    recipe: ClassVar[Recipe] = _RECIPE
    inputs = "values"
    readout = "pooled"
    axis: ClassVar[str] = "sampling rate in percent"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self.rate)

    @property
    def channels(self) -> int:
        return 3

    @property
    def outputs(self) -> int:
        return 20

    @property
    def chance(self) -> float:
        return 1 / 20

    def load(self) -> Split:
        series, labels = read_time_series(Path(self.data).expanduser())
        if {len(values) for values in series} != {self.channels} or len(set(labels)) > self.outputs:
            raise DataError(f"data: {self.data} is not of {self.channels} channels and at most {self.outputs} classes")
        stored = torch.zeros(len(series), self.length, self.channels)
        for row, values in zip(stored, series, strict=True):
            row[: values.shape[1]] = torch.from_numpy(values.T[: self.length])
        names = {label: index for index, label in enumerate(sorted(set(labels)))}
        targets = torch.tensor([names[label] for label in labels])
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))
        train, test = order.split([round(_TRAINED * len(order)), len(order) - round(_TRAINED * len(order))])
        return Split(stored[train], targets[train], stored[test], targets[test])

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        """``length`` is the rate in percent."""
        rate = self.rate if length is None else length
        _check_rate(rate)
        return stored[:, :: 100 // rate]

    def lengths(self, inputs: Tensor) -> Tensor:
        places = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
        return ((inputs != 0).any(-1) * places).amax(1).clamp(min=1)


@dataclasses.dataclass(frozen=True)
class TrajectoriesStandin(Task):
    """Smooth closed curves, each class around one of its own: the velocity in x and y, and a force.

    A curve takes the same time at whatever rate it is sampled, so that ``length`` is the rate.

    Args:
        length: places.
        classes: how many.
        harmonics: of a curve; the more, the faster it turns.
    """

    length: int = 100
    classes: int = 20
    harmonics: int = 6

    name: ClassVar[str] = "trajectories_standin"
    recipe: ClassVar[Recipe] = _RECIPE
    inputs = "values"
    readout = "pooled"
    #: How far curves stray from their class's own, and the noise of a measurement.
    _STRAY: ClassVar[float] = 0.6
    _NOISE: ClassVar[float] = 0.1

    @property
    def channels(self) -> int:
        return 3

    @property
    def outputs(self) -> int:
        return self.classes

    @property
    def chance(self) -> float:
        return 1 / self.classes

    def to(self, device: torch.device) -> None:
        self._curves_on(device)

    @functools.cached_property
    def _curves(self) -> dict[torch.device, Tensor]:
        return {}

    def _curves_on(self, device: torch.device) -> Tensor:
        """The classes' own: sines and cosines, (classes, harmonics, 2, channels)."""
        if device not in self._curves:
            generator = torch.Generator().manual_seed(0)
            shape = (self.classes, self.harmonics, 2, self.channels)
            self._curves[device] = torch.randn(shape, generator=generator).to(device)
        return self._curves[device]

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        device, length = generator.device, length or self.length
        classes = uniform(0, self.classes, (batch,), generator)
        shape = (self.harmonics, 2, self.channels)
        own = self._curves_on(device)[classes]
        waves = own + self._STRAY * torch.randn(batch, *shape, generator=generator, device=device)
        # Curves run at their own pace: a smooth change of time that keeps both ends.
        time = torch.arange(length, device=device) / length
        pace = 0.05 * torch.randn(batch, 1, generator=generator, device=device)
        time = time + pace * torch.sin(2 * math.pi * time)
        angles = 2 * math.pi * time[..., None] * torch.arange(1, self.harmonics + 1, device=device)
        basis = torch.stack([angles.sin(), angles.cos()], dim=-1)
        values = torch.einsum("blhp,bhpc->blc", basis, waves) / math.sqrt(self.harmonics)
        return values + self._NOISE * torch.randn(values.shape, generator=generator, device=device), classes


def _check_rate(rate: int) -> None:
    if rate < 1 or 100 % rate:
        raise ArgumentError(f"character_trajectories: a rate in percent must divide 100, got {rate}")
