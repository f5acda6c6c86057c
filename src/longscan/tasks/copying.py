"""Copying: give back tokens that were read long ago, always after the same pause (Hochreiter and Schmidhuber 1997).

The classic form (Arjovsky et al. 2016): a fixed convolution can solve it, so it needs memory but no selection.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.task import Recipe


@dataclasses.dataclass(frozen=True)
class Copying(SelectiveCopying):
    """``3 9 5 0 0 0 0 0 | M M M`` asks for ``3 9 5``; arguments as in selective copying."""

    name: ClassVar[str] = "copying"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2, steps=100_000, batch_size=64, learning_rate=1e-3)

    def _places(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.arange(self.tokens, device=generator.device).expand(batch, -1)
