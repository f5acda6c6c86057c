"""Shapes of the Cauchy product, shared by its tests and its benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CauchyCase:
    """One call: v of shape (*rows, channels, poles)."""

    name: str
    length: int
    rows: tuple[int, ...] = (2, 2)
    channels: int = 3
    poles: int = 4


CASES = (
    CauchyCase("four", 40),
    CauchyCase("one", 33, rows=()),
    CauchyCase("five", 17, rows=(5,)),
    CauchyCase("one-place", 1, rows=(1,), channels=1, poles=1),
    CauchyCase("long", 700, rows=(3,), channels=2, poles=37),
)

NAMES = ("v", "w")


def make_inputs(
    case: CauchyCase, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the tensor arguments of `cauchy` by name: a grid on the imaginary axis."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    v = torch.randn(*case.rows, case.channels, case.poles, generator=generator, dtype=torch.complex128)
    decay = torch.rand(case.channels, case.poles, generator=generator, dtype=torch.float64) + 0.5
    place = 4 * torch.randn(case.channels, case.poles, generator=generator, dtype=torch.float64)
    grid = torch.linspace(0, 10, case.length, dtype=torch.float64)
    return {
        "v": (v / math.sqrt(case.poles)).to(device, wide),
        "z": torch.complex(torch.zeros_like(grid), grid).to(device, wide),
        "w": torch.complex(-decay, place).to(device, wide),
    }
