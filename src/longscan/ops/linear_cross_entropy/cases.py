"""Shapes and options of the head's cross entropy, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossCase:
    """One call: `shape` is hidden's, channels last; `padding` rows of the weight are beyond the vocabulary."""

    name: str
    shape: tuple[int, ...] = (2, 13, 24)
    vocabulary: int = 50
    padding: int = 6
    ignored: bool = True


CASES = (
    LossCase("padded"),
    LossCase("whole", padding=0, ignored=False),
    LossCase("one-place", shape=(1, 1, 16), ignored=False),
    LossCase("vector", shape=(8,), ignored=False),
    LossCase("one-token", vocabulary=1),
    LossCase("large", shape=(3, 70, 8), vocabulary=9001, padding=7),
)

NAMES = ("hidden", "weight")


def make_inputs(
    case: LossCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the tensor arguments of `linear_cross_entropy` by name; weight is float32."""
    generator = torch.Generator().manual_seed(seed)
    *places, channels = case.shape
    targets = torch.randint(0, case.vocabulary, places, generator=generator)
    if case.ignored:
        targets = torch.where(torch.rand(places, generator=generator) < 0.3, -100, targets)
    rows = case.vocabulary + case.padding
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "hidden": torch.randn(case.shape, generator=generator, dtype=torch.float64).to(device, dtype),
        "weight": (torch.randn(rows, channels, generator=generator, dtype=torch.float64)).to(device, wide),
        "targets": targets.to(device),
    }
