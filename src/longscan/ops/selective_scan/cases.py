"""Shapes and options of the selective scan, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanCase:
    """One call of the selective scan.

    `lengths` packs sequences of those lengths in one row (batch is then 1 and length their sum). `b`, `c`: "step" for
    one B or C per time step, "constant" for one per channel.
    """

    name: str
    batch: int = 2
    length: int = 37
    channels: int = 24
    state: int = 16
    groups: int = 1
    b: str = "step"
    c: str = "step"
    complex: bool = False
    skip: bool = True
    gate: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = False
    lengths: tuple[int, ...] | None = None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


CASES = (
    ScanCase("mamba"),
    ScanCase("one-step", length=1, initial=True),
    ScanCase("one-channel", channels=1, batch=1),
    ScanCase("odd-channels", channels=19, initial=True),
    ScanCase("wide", channels=70, length=21),
    ScanCase("long", batch=1, length=301, channels=8, initial=True),
    ScanCase("bare", skip=False, gate=False, bias=False, softplus=False),
    ScanCase("no-gate", gate=False),
    ScanCase("no-skip", skip=False),
    ScanCase("no-softplus", softplus=False),
    ScanCase("initial-state", initial=True),
    ScanCase("state-1", state=1, initial=True),
    ScanCase("state-5", state=5, initial=True),
    ScanCase("state-40", state=40, channels=9, length=19),
    ScanCase("groups-2", groups=2),
    ScanCase("groups-3-odd", groups=3, channels=15, state=4),
    ScanCase("group-per-channel", groups=6, channels=6),
    ScanCase("constant-b", b="constant", initial=True),
    ScanCase("constant-c", c="constant"),
    ScanCase("constant-b-c", b="constant", c="constant"),
    ScanCase("packed", lengths=(5, 1, 70, 13)),
    ScanCase("packed-states", lengths=(64, 0, 65, 3, 129), initial=True, channels=10),
    ScanCase("packed-groups", lengths=(9, 20), groups=2, initial=True),
    ScanCase("complex", complex=True),
    ScanCase("complex-initial", complex=True, initial=True, state=5, channels=19),
    ScanCase("complex-groups", complex=True, groups=2, state=4, gate=False),
    ScanCase("complex-constant", complex=True, b="constant", c="constant", state=3, initial=True),
    ScanCase("complex-packed", complex=True, lengths=(7, 66, 2), initial=True, state=4, channels=5),
    ScanCase("state-256", state=256, channels=3, length=5, batch=1, initial=True),
)

#: A few of them that between them touch every option: for slow ways of running a backend.
FEW = tuple(
    case for case in CASES if case.name in ("mamba", "groups-3-odd", "packed-states", "complex-packed", "constant-b-c")
)

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def make_inputs(
    case: ScanCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the keyword arguments of `selective_scan` by name, `cu_seqlens` among them.

    Drawn on the CPU in float64 and rounded, so that every dtype and device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    length = case.length if case.lengths is None else sum(case.lengths)
    batch = case.batch if case.lengths is None else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def varying(form: str) -> Tensor:
        shape: tuple[int, ...] = (case.channels, case.state)
        if form == "step":
            shape = (batch, length, case.groups, case.state)
        if form == "step" and case.groups == 1:
            shape = (batch, length, case.state)
        return torch.complex(normal(*shape), normal(*shape)) if case.complex else normal(*shape)

    A = -torch.exp(normal(case.channels, case.state))
    dt = normal(batch, length, case.channels)
    states = (case.sequences, case.channels, case.state)
    inputs: dict[str, Tensor | None] = {
        "x": normal(batch, length, case.channels),
        "dt": dt if case.softplus else torch.rand(dt.shape, generator=generator, dtype=torch.float64),
        "A": torch.complex(A, normal(case.channels, case.state) * 3) if case.complex else A,
        "B": varying(case.b),
        "C": varying(case.c),
        "D": normal(case.channels) if case.skip else None,
        "z": normal(batch, length, case.channels) if case.gate else None,
        "dt_bias": normal(case.channels) - 1 if case.bias and case.softplus else None,
        "initial_state": None,
    }
    if case.initial:
        inputs["initial_state"] = torch.complex(normal(*states), normal(*states)) if case.complex else normal(*states)
    parameters = ("A", "D", "dt_bias", "initial_state")
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        if tensor.is_complex():
            tensor = tensor.to(torch.complex128 if accumulation == torch.float64 else torch.complex64)
        else:
            tensor = tensor.to(accumulation if name in parameters else dtype)
        inputs[name] = tensor.to(device)
    if case.lengths is not None:
        offsets = torch.tensor((0, *case.lengths)).cumsum(0)
        inputs["cu_seqlens"] = offsets.to(device)
    return inputs
