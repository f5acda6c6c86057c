"""Pathfinder of the Long Range Arena, row by row: do two dots end the same dashed path? (Linsley et al. 2018)"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longscan.tasks.generated import GeneratedTask
from longscan.tasks.generators.pathfinder import arena_paths, draw_paths
from longscan.tasks.pixels import PixelTask
from longscan.tasks.task import Recipe
from longscan.tasks.watching import blocks

# Of the paths that images are drawn from, memory is held for so many images.
_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Pathfinder(GeneratedTask, PixelTask):
    """A brightness from -1 to 1 at each place; two classes, equally many of each.

    Args:
        length: pixels of an image: 1024, 4096 or 16384.
        dashes: of the two long paths: 14 is the Arena's hardest level and what is published, 9 and 6 the others.
        train, valid, test, tested_on: see :class:`GeneratedTask`.
    """

    length: int = 1024
    train: int = 160_000
    valid: int = 20_000
    test: int = 20_000
    dashes: int = 14

    name: ClassVar[str] = "pathfinder"
    recipe: ClassVar[Recipe] = Recipe(d_model=256, n_layer=6, steps=500_000, batch_size=64, learning_rate=4e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        arena_paths(self.side, self.dashes)

    @property
    def outputs(self) -> int:
        return 2

    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        images, labels = np.empty((count, self.length), np.uint8), np.empty(count, np.uint8)
        for first, some in blocks("drawing images", count, _AT_ONCE):
            drawn = draw_paths(some, arena_paths(self.side, self.dashes), seed=0, first=first)
            images[first : first + some] = drawn.images.reshape(some, -1)
            labels[first : first + some] = drawn.labels
        return images, labels


@dataclasses.dataclass(frozen=True)
class PathX(Pathfinder):
    """Images of 128 x 128 pixels, 16,384 places; arguments as of the small ones."""

    length: int = 16_384

    name: ClassVar[str] = "path_x"
    recipe: ClassVar[Recipe] = Recipe(d_model=256, n_layer=6, steps=500_000, batch_size=16, learning_rate=1e-3)
