"""Induction heads: what came after this token the last time? (Olsson et al. 2022; Gu and Dao 2023, table 2)

Solved at one length, a mechanism is right at any; most are not.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import Recipe, Task, uniform


@dataclasses.dataclass(frozen=True)
class InductionHeads(Task):
    """``4 7 S 2 9 ... 1 S`` asks for ``2``: S stands once at a random place and once at the end.

    Args:
        length: of the sequence, both S included.
        vocab: size of the vocabulary, with S (the last).
    """

    length: int = 256
    vocab: int = 16

    name: ClassVar[str] = "induction_heads"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2, steps=204_800, batch_size=8, learning_rate=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 3 or self.vocab < 2:
            raise ArgumentError(
                f"{self.name}: length must be at least 3 and vocab at least 2, got {self.length} and {self.vocab}"
            )

    @property
    def vocabulary(self) -> int:
        return self.vocab

    def answers(self, length: int | None = None) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 1)

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        length = length or self.length
        special = self.vocab - 1
        tokens = uniform(0, special, (batch, length), generator)
        place = uniform(0, length - 2, (batch, 1), generator)
        tokens = tokens.scatter(1, place, special)
        tokens[:, -1] = special
        return tokens, tokens.gather(1, place + 1)
