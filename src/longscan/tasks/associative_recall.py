"""Associative recall: pairs of keys and values, then a key (Fu et al. 2023); and many keys (Arora et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import IGNORED, Recipe, Task, distinct, uniform


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(Task):
    """``a 4 c 1 b 3 c 1 => b`` asks for ``3``: every sequence has its own map from keys to values.

    Args:
        length: of the pairs, even; "=>" and the key that is asked come on top.
        vocab: size of the vocabulary: keys, as many values, and two special tokens ("=>", and one that H3's generator
            keeps for an absent key, which never comes here).
    """

    length: int = 40
    vocab: int = 20

    name: ClassVar[str] = "associative_recall"
    recipe: ClassVar[Recipe] = Recipe(
        d_model=32, n_layer=2, d_intermediate=128, steps=62_400, batch_size=32, learning_rate=5e-4, weight_decay=0.1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2 or self.vocab % 2 or self.vocab < 6:
            raise ArgumentError(
                f"{self.name}: length must be even and vocab even and at least 6, got {self.length} and {self.vocab}"
            )

    @property
    def vocabulary(self) -> int:
        return self.vocab

    def answers(self, length: int | None = None) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 2 / (self.vocab - 2)

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        pairs, half = (length or self.length) // 2, (self.vocab - 2) // 2
        keys = uniform(0, half, (batch, pairs), generator)
        value_of = uniform(half, 2 * half, (batch, half), generator)
        asked = keys.gather(1, uniform(0, pairs, (batch, 1), generator))
        read = torch.stack([keys, value_of.gather(1, keys)], dim=-1).flatten(1)
        arrow = torch.full_like(asked, self.vocab - 2)
        return torch.cat([read, arrow, asked], dim=1), value_of.gather(1, asked)


@dataclasses.dataclass(frozen=True)
class MultiQueryAssociativeRecall(Task):
    """All pairs first, then every key once more, most of them soon; each asks for its value.

    Query j stands at place ``2 pairs + 2 g_j``, the g_j drawn without replacement with p(g) ~ (g + 1)^(a - 1), where
    a = 0.01. What is no query is random.

    Args:
        length: of the whole sequence, even, at least 4 pairs.
        pairs: of keys and values, all keys different and all values too.
        vocab: keys are the lower half without 0, values the upper.
    """

    length: int = 64
    pairs: int = 4
    vocab: int = 8192

    name: ClassVar[str] = "mqar"
    recipe: ClassVar[Recipe] = Recipe(
        d_model=64, n_layer=2, steps=12_500, batch_size=512, learning_rate=1e-3, weight_decay=0.1
    )
    _POWER: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ArgumentError(
                f"{self.name}: length must be even and at least 4 pairs, {4 * self.pairs}; got {self.length}"
            )
        if self.vocab % 2 or self.vocab // 2 - 1 < self.pairs:
            raise ArgumentError(
                f"{self.name}: vocab must be even and at least 2 pairs + 2, {2 * self.pairs + 2}; got {self.vocab}"
            )

    @property
    def vocabulary(self) -> int:
        return self.vocab

    def answers(self, length: int | None = None) -> int:
        return (length or self.length) - 2 * self.pairs

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        half, room = self.vocab // 2, self.answers(length)
        keys = 1 + distinct(self.pairs, half - 1, batch, generator)
        values = half + distinct(self.pairs, half, batch, generator)
        gaps = self._gaps(batch, room // 2, generator)
        rest = uniform(0, self.vocab, (batch, room), generator).scatter(1, 2 * gaps, keys)
        targets = torch.full_like(rest, IGNORED).scatter(1, 2 * gaps, values)
        return torch.cat([torch.stack([keys, values], dim=-1).flatten(1), rest], dim=1), targets

    def _gaps(self, batch: int, room: int, generator: torch.Generator) -> Tensor:
        """(batch, pairs) different places; the largest of log p + Gumbel noise are a sample without replacement."""
        logarithm = (self._POWER - 1) * torch.arange(1, room + 1, device=generator.device).log()
        noise = torch.rand(batch, room, generator=generator, device=generator.device)
        # rand may give 0, whose logarithm is no number to compare.
        exponential = -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()
        return (logarithm - exponential.log()).topk(self.pairs, dim=-1).indices
