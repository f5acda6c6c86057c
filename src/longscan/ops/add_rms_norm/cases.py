"""Shapes and options of the fused residual sum and RMSNorm, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormCase:
    """One call: `shape` is x's, channels last; `strided` makes x a view with gaps between its rows."""

    name: str
    shape: tuple[int, ...] = (2, 13, 48)
    residual: bool = True
    residual_dtype: torch.dtype = torch.float32
    strided: bool = False


CASES = (
    NormCase("block"),
    NormCase("first-block", residual=False),
    NormCase("one-token", shape=(1, 1, 64)),
    NormCase("odd-channels", shape=(3, 5, 77)),
    NormCase("one-channel", shape=(7, 1)),
    NormCase("vector", shape=(40,)),
    NormCase("many-rows", shape=(2, 300, 32)),
    NormCase("strided", strided=True),
    NormCase("bfloat16-residual", residual_dtype=torch.bfloat16),
)

NAMES = ("x", "weight", "residual")


def make_inputs(
    case: NormCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the tensor arguments of `add_rms_norm` by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    *rows, channels = case.shape
    wide = normal(*rows, 2 * channels if case.strided else channels).to(device, dtype)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    residual_dtype = torch.float64 if dtype == torch.float64 else case.residual_dtype
    return {
        "x": wide[..., :channels],
        "weight": (1 + 0.3 * normal(channels)).to(device, accumulation),
        "residual": normal(*case.shape).to(device, residual_dtype) if case.residual else None,
    }
