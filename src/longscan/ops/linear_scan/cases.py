"""Shapes and options of the linear scan, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearCase:
    """One call of the linear scan.

    `decay`: which axes of a are as long as b's, of "batch", "time" and "channel". `lengths` packs sequences of those
    lengths in one row.
    """

    name: str
    batch: int = 2
    length: int = 37
    channels: int = 24
    decay: tuple[str, ...] = ("batch", "time", "channel")
    complex: bool = False
    initial: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


CASES = (
    LinearCase("real"),
    LinearCase("complex", complex=True, initial=True),
    LinearCase("constant", decay=("channel",), initial=True, length=130),
    LinearCase("constant-complex", decay=("channel",), complex=True, channels=19),
    LinearCase("shared-by-rows", decay=("time", "channel"), initial=True),
    LinearCase("shared-by-channels", decay=("batch", "time"), initial=True, channels=5),
    LinearCase("one-number", decay=()),
    LinearCase("one-step", length=1, initial=True),
    LinearCase("one-channel", channels=1, batch=1, length=300, initial=True),
    LinearCase("wide", channels=150, length=9, complex=True),
    LinearCase("long", batch=1, length=700, channels=5, initial=True),
    LinearCase("packed", lengths=(5, 1, 70, 2)),
    LinearCase("packed-states", lengths=(3, 0, 1, 66, 0), initial=True, channels=10),
    LinearCase("packed-complex", lengths=(0, 9, 70), initial=True, channels=3, complex=True, decay=("channel",)),
)

#: A few of them that between them touch every option: for slow ways of running a backend.
FEW = tuple(case for case in CASES if case.name in ("real", "constant-complex", "packed-states", "packed-complex"))

NAMES = ("a", "b", "initial_state")


def make_inputs(
    case: LinearCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the keyword arguments of `linear_scan` by name, `cu_seqlens` among them.

    Drawn on the CPU in float64 and rounded, so that every dtype and device sees the same numbers. `dtype` is that of b;
    a and the state are float32, or float64 with it. Of a complex case, b is complex unless `dtype` is a narrow one.
    """
    generator = torch.Generator().manual_seed(seed)
    length = case.length if case.lengths is None else sum(case.lengths)
    batch = case.batch if case.lengths is None else 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def complex_like(real: Tensor) -> Tensor:
        return torch.complex(real, normal(*real.shape))

    sizes = {"batch": batch, "time": length, "channel": case.channels}
    a = torch.sigmoid(2 * normal(*(size if axis in case.decay else 1 for axis, size in sizes.items())) + 1)
    b = normal(batch, length, case.channels)
    state = normal(case.sequences, case.channels)
    complex_wide = torch.complex128 if wide == torch.float64 else torch.complex64
    if case.complex:
        a = (a * torch.exp(1j * normal(*a.shape))).to(complex_wide)
        state = complex_like(state).to(complex_wide)
        b = complex_like(b).to(complex_wide) if dtype == wide else b.to(dtype)
    else:
        a, b, state = a.to(wide), b.to(dtype), state.to(wide)
    inputs: dict[str, Tensor | None] = {
        "a": a.to(device),
        "b": b.to(device),
        "initial_state": state.to(device) if case.initial else None,
    }
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.tensor((0, *case.lengths)).cumsum(0).to(device)
    return inputs
