"""ListOps of the Long Range Arena: the value of a nested list operation of hundreds of symbols (Tay et al. 2021)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from torch import Tensor

from longscan.tasks.generated import GeneratedTask
from longscan.tasks.generators.listops import PADDING, SYMBOLS, expressions
from longscan.tasks.task import Recipe


@dataclasses.dataclass(frozen=True)
class ListOps(GeneratedTask):
    """``[MAX 2 9 [MIN 4 7 ] 0 ]`` asks for ``9``, one of ten classes; no expression comes twice.

    Args:
        length: longest expression; shorter ones are padded at the end.
        shortest: expression.
        max_depth: of the tree, its digits included.
        max_args: most arguments of an operator.
        train, valid, test, tested_on: see :class:`GeneratedTask`.
    """

    length: int = 1999
    shortest: int = 501
    max_depth: int = 10
    max_args: int = 10

    name: ClassVar[str] = "listops"
    recipe: ClassVar[Recipe] = Recipe(d_model=128, n_layer=6, steps=120_000, batch_size=32, learning_rate=1e-2)
    readout = "pooled"

    @property
    def vocabulary(self) -> int:
        return len(SYMBOLS)

    @property
    def outputs(self) -> int:
        return 10

    @property
    def chance(self) -> float:
        return 0.1

    def lengths(self, inputs: Tensor) -> Tensor:
        return (inputs != PADDING).sum(dim=1)

    def words(self, tokens: Tensor) -> str:
        return " ".join(SYMBOLS[token] for token in tokens.tolist() if token != PADDING)

    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        bounds = {"above": self.shortest - 1, "under": self.length + 1}
        tokens, _, values = expressions(count, seed=0, max_depth=self.max_depth, max_args=self.max_args, **bounds)
        return tokens, values

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        return stored.long()
