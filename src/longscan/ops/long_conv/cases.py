"""Shapes and options of the long convolution, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LongConvCase:
    """One call of the long convolution.

    `taps`: length of the kernels, `systems`: how many there are (None: one a channel), `past`: inputs that came before
    (None: no state). `lengths` packs sequences of those lengths in one row.
    """

    name: str
    batch: int = 2
    length: int = 37
    channels: int = 6
    taps: int = 37
    systems: int | None = None
    skip: bool = True
    past: int | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


CASES = (
    LongConvCase("whole"),
    LongConvCase("plain", skip=False, length=64, taps=64),
    LongConvCase("one-step", length=1, past=36),
    LongConvCase("one-tap", taps=1, past=0),
    LongConvCase("short-kernel", taps=5, past=4),
    LongConvCase("kernel-beyond-the-sequence", taps=90),
    LongConvCase("short-past", past=7),
    LongConvCase("past-beyond-the-kernel", taps=9, past=40),
    LongConvCase("blocks", length=601, taps=20, channels=3),
    LongConvCase("blocks-past", batch=1, length=700, taps=33, channels=3, past=32),
    LongConvCase("blocks-short-past", length=530, taps=11, channels=2, past=3),
    LongConvCase("blocks-one-tap", batch=1, length=300, taps=1, channels=2, past=0),
    LongConvCase("shared", systems=2, past=5),
    LongConvCase("shared-blocks", batch=1, length=300, taps=8, systems=3, past=7),
    LongConvCase("packed", lengths=(5, 1, 40, 13)),
    LongConvCase("packed-states", lengths=(9, 0, 1, 66, 3), taps=20, systems=3, past=12),
    LongConvCase("packed-blocks", lengths=(300, 20), taps=7, channels=2, past=6),
)

#: A few of them that between them touch every option.
FEW = tuple(case for case in CASES if case.name in ("whole", "short-past", "shared-blocks", "packed-states"))

NAMES = ("u", "kernel", "D", "initial_state")


def make_inputs(
    case: LongConvCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the keyword arguments of `long_conv` by name, `cu_seqlens` among them.

    Drawn on the CPU in float64 and rounded, so that every dtype and device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    length = case.length if case.lengths is None else sum(case.lengths)
    batch = case.batch if case.lengths is None else 1
    systems = case.systems or case.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: dict[str, Tensor | None] = {
        "u": normal(batch, length, case.channels).to(device, dtype),
        "kernel": normal(systems, case.taps).to(device, accumulation),
        "D": normal(systems).to(device, accumulation) if case.skip else None,
        "initial_state": None,
    }
    if case.past is not None:
        inputs["initial_state"] = normal(case.sequences, case.past, case.channels).to(device, dtype)
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.tensor((0, *case.lengths)).cumsum(0).to(device)
    return inputs
