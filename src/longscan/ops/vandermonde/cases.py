"""Shapes of the Vandermonde product, shared by its tests and its benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VandermondeCase:
    """One call: weights of shape (*rows, channels, states)."""

    name: str
    length: int
    rows: tuple[int, ...] = ()
    channels: int = 3
    states: int = 4


CASES = (
    VandermondeCase("square", 64),
    VandermondeCase("uneven", 37, rows=(2,)),
    VandermondeCase("one-place", 1),
    VandermondeCase("two-places", 2, rows=(2, 3)),
    VandermondeCase("one-state", 50, channels=1, states=1),
    VandermondeCase("long", 1000, rows=(2,), channels=2, states=33),
)

NAMES = ("weights", "log_A_bar")


def make_inputs(
    case: VandermondeCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the tensor arguments of `vandermonde` by name."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    shape = (*case.rows, case.channels, case.states)
    weights = torch.randn(shape, generator=generator, dtype=torch.complex128) / math.sqrt(case.states)
    decay = torch.rand(case.channels, case.states, generator=generator, dtype=torch.float64) + 0.05
    turn = torch.randn(case.channels, case.states, generator=generator, dtype=torch.float64)
    # Memories of about the length, so that late places count, and angles that float32 can say at the end of them.
    turn = turn * min(1.0, 50 / case.length)
    return {
        "weights": weights.to(device, wide),
        "log_A_bar": torch.complex(-2 * decay / case.length, turn).to(device, wide),
    }
