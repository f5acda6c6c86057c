"""Grey images as sequences: a pixel at each place, row by row."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.finite import FiniteTask


@dataclasses.dataclass(frozen=True)
class PixelTask(FiniteTask):
    """The class of a square image, stored as (pixels,) uint8 and read as a brightness from -1 to 1 at each place."""

    inputs = "values"
    readout = "pooled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side**2 != self.length:
            raise ArgumentError(f"{self.name}: length must be the pixels of a square image, got {self.length}")

    @property
    def side(self) -> int:
        """Pixels of a row."""
        return math.isqrt(self.length)

    @property
    def channels(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / self.outputs

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.side, self.side

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        return stored[..., None] / 127.5 - 1
