"""The delay task: what was the signal so many steps ago? (Voelker, Kajic and Eliasmith 2019, capacity experiment)

A memory that holds a window of the past answers for every delay within it at once. The signal is white noise without
the frequencies above a bound, so that a window is a few numbers' worth; how many the memory has is its capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import NRMSE, Metric, Recipe, Task


@dataclasses.dataclass(frozen=True)
class Delay(Task):
    """At every place after the first window: the signal at evenly spaced delays from 0 to the whole window.

    Args:
        length: of the window in steps, the longest delay; a sequence is two and a half windows.
        delays: how many, both ends included.
        cycles: of the highest frequency in a window.
    """

    length: int = 1600
    delays: int = 5
    cycles: int = 10

    name: ClassVar[str] = "delay"
    recipe: ClassVar[Recipe] = Recipe(d_model=100, n_layer=1, steps=1000, batch_size=50, learning_rate=1e-3)
    inputs = "values"
    readout = "every"
    metric: ClassVar[Metric] = NRMSE
    axis: ClassVar[str] = "delay"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delays < 2 or self.length % (self.delays - 1) or self.length % 2:
            raise ArgumentError(
                f"delay: length must be even and a multiple of delays - 1, which is at least 1; got {self.length} and "
                f"{self.delays} delays"
            )

    @property
    def channels(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return self.delays

    @property
    def chance(self) -> float:
        return 1.0

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        length = length or self.length
        signal = white_signal(batch, 5 * length // 2, 5 * self.cycles // 2, generator)
        step = length // (self.delays - 1)
        targets = [signal.roll(k * step, dims=1) for k in range(self.delays)]
        asked = torch.arange(signal.shape[1], device=signal.device) >= length
        return signal[..., None], torch.stack(targets, dim=-1).where(asked[:, None], torch.nan)

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Fresh draws that ask for one delay, ``length`` steps.

        Raises:
            ArgumentError: it is not one of the task's.
        """
        allowed = [k * self.length // (self.delays - 1) for k in range(self.delays)]
        if length not in allowed:
            raise ArgumentError(f"delay: got {length} steps; allowed are {', '.join(map(str, allowed))}")
        asked = torch.tensor([delay == length for delay in allowed], device=device)
        for inputs, targets in super().tests(self.length, sequences, batch, device, seed):
            yield inputs, targets.where(asked, torch.nan)


def white_signal(batch: int, length: int, highest: int, generator: torch.Generator) -> Tensor:
    """Periodic noise (batch, length) of equal power at 1 .. ``highest`` cycles a period and of none above.

    Each starts where it is nearest to 0, and reaches 1 or -1 as its farthest.
    """
    device = generator.device
    parts = torch.randn(batch, highest, 2, generator=generator, device=device)
    spectrum = torch.nn.functional.pad(torch.view_as_complex(parts), (1, length // 2 - highest))
    signal = torch.fft.irfft(spectrum, n=length, norm="forward")
    places = (signal.abs().argmin(1, keepdim=True) + torch.arange(length, device=device)) % length
    return signal.gather(1, places) / signal.abs().amax(1, keepdim=True)
