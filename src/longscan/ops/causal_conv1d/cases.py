"""Shapes and options of the causal convolution, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvCase:
    """One call of the causal convolution; `lengths` packs sequences of those lengths in one row."""

    name: str
    batch: int = 2
    length: int = 37
    channels: int = 24
    width: int = 4
    bias: bool = True
    silu: bool = True
    initial: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


CASES = (
    ConvCase("mamba"),
    ConvCase("plain", silu=False, bias=False),
    ConvCase("one-step", length=1, initial=True),
    ConvCase("two-steps", length=2, initial=True),
    ConvCase("initial-state", initial=True, channels=19),
    ConvCase("width-1", width=1, initial=True),
    ConvCase("width-2", width=2, initial=True),
    ConvCase("width-3", width=3),
    ConvCase("width-7", width=7, initial=True, length=5),
    ConvCase("wide", channels=70, length=130),
    ConvCase("one-channel", channels=1),
    ConvCase("packed", lengths=(5, 1, 70, 2)),
    ConvCase("packed-states", lengths=(3, 0, 1, 66, 2), initial=True, channels=10),
)

FEW = tuple(case for case in CASES if case.name in ("mamba", "width-7", "packed-states"))

NAMES = ("x", "weight", "bias", "initial_state")


def make_inputs(
    case: ConvCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the keyword arguments of `causal_conv1d` by name, `cu_seqlens` among them."""
    generator = torch.Generator().manual_seed(seed)
    length = case.length if case.lengths is None else sum(case.lengths)
    batch = case.batch if case.lengths is None else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: dict[str, Tensor | None] = {
        "x": normal(batch, length, case.channels).to(device, dtype),
        "weight": normal(case.channels, case.width).to(device, accumulation),
        "bias": normal(case.channels).to(device, accumulation) if case.bias else None,
        "initial_state": None,
    }
    if case.initial:
        inputs["initial_state"] = normal(case.sequences, case.width - 1, case.channels).to(device, dtype)
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.tensor((0, *case.lengths)).cumsum(0).to(device)
    return inputs
