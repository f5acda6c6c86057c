"""Selective copying: remember the data tokens among noise, and give them back in order (Gu and Dao 2023, table 1).

Gaps between the data tokens are random, so that no fixed convolution can pick them out. The paper's own code was never
released; this is the form of the S4 repository's generator with random places (``variable``).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import Recipe, Task, distinct, uniform


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Task):
    """``0 3 0 0 9 0 5 0 | M M M`` asks for ``3 9 5``, one at each marker M.

    Args:
        length: of the part to read, noise and data; the markers come on top.
        tokens: how many data tokens there are.
        vocab: size of the vocabulary: noise (0), data tokens and the marker (the last).
    """

    length: int = 4096
    tokens: int = 16
    vocab: int = 16

    name: ClassVar[str] = "selective_copying"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2, steps=400_000, batch_size=64, learning_rate=1e-4, clip=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_copying(self.name, self.length, self.tokens, self.vocab)

    @property
    def vocabulary(self) -> int:
        return self.vocab

    def answers(self, length: int | None = None) -> int:
        return self.tokens

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 2)

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        data = uniform(1, self.vocab - 1, (batch, self.tokens), generator)
        places = self._places(batch, length or self.length, generator)
        read = torch.zeros(batch, length or self.length, dtype=torch.int64, device=generator.device)
        return torch.cat([read.scatter(1, places, data), torch.full_like(data, self.vocab - 1)], dim=1), data

    def _places(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        return distinct(self.tokens, length, batch, generator).sort(dim=-1).values


def check_copying(name: str, length: int, tokens: int, vocab: int) -> None:
    """Raise ArgumentError unless the data tokens fit and the vocabulary has noise, marker and at least one more."""
    if length < tokens:
        raise ArgumentError(f"{name}: length must be at least tokens, {tokens}; got {length}")
    if vocab < 3:
        raise ArgumentError(f"{name}: vocab must be at least 3 (noise, marker and data), got {vocab}")
