"""Shapes and options of the decay attention, shared by its tests and its benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecayCase:
    """One call of the decay attention.

    `groups`: heads of q and k, where there are fewer of them. `decay`: "none", "head" (constant in time) or "step".
    `lengths` packs sequences of those lengths in one row. `normalise`: keys and queries are then positive.
    """

    name: str
    batch: int = 2
    length: int = 37
    heads: int = 3
    d_k: int = 8
    d_v: int = 6
    decay: str = "step"
    normalise: bool = False
    initial: bool = False
    lengths: tuple[int, ...] | None = None
    groups: int | None = None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


CASES = (
    DecayCase("step"),
    DecayCase("retention", decay="head", length=150, initial=True),
    DecayCase("no-decay", decay="none", initial=True),
    DecayCase("linear-attention", decay="none", normalise=True, initial=True, length=70),
    DecayCase("normalised-step", normalise=True, initial=True),
    DecayCase("one-step", length=1, initial=True),
    DecayCase("one-step-head", length=1, decay="head", initial=True),
    DecayCase("whole-chunks", length=128, initial=True),
    DecayCase("long", batch=1, length=301, heads=2, initial=True),
    DecayCase("long-head", batch=1, length=301, heads=2, decay="head"),
    DecayCase("scalars", d_k=1, d_v=1, initial=True),
    DecayCase("wide", batch=1, heads=1, d_k=33, d_v=70, length=90, initial=True),
    DecayCase("mamba-2", batch=1, heads=2, groups=1, d_k=128, d_v=64, length=200, initial=True),
    DecayCase("groups", heads=6, groups=2, length=70, initial=True),
    DecayCase("one-group", batch=1, heads=4, groups=1, length=131, decay="head"),
    DecayCase("packed", lengths=(5, 1, 70, 13)),
    DecayCase("packed-states", lengths=(64, 0, 65, 3, 129), initial=True, heads=2),
    DecayCase("packed-head", lengths=(7, 66, 0, 2), initial=True, decay="head"),
    DecayCase("packed-groups", heads=4, groups=2, lengths=(3, 70, 1), initial=True),
    DecayCase("packed-linear", lengths=(9, 20, 100), decay="none", normalise=True, initial=True),
)

#: A few of them that between them touch every option: for slow ways of running a backend.
FEW = tuple(case for case in CASES if case.name in ("step", "linear-attention", "packed-head", "packed-groups"))

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def make_inputs(
    case: DecayCase,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Fresh inputs of one case, as the keyword arguments of `decay_attention` by name, `cu_seqlens` among them.

    Drawn on the CPU in float64 and rounded, so that every dtype and device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    length = case.length if case.lengths is None else sum(case.lengths)
    batch = case.batch if case.lengths is None else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def vectors(width: int, heads: int | None = None) -> Tensor:
        return normal(batch, length, heads or case.heads, width)

    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = vectors(case.d_k, case.groups) / case.d_k**0.5, vectors(case.d_k, case.groups)
    if case.normalise:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    inputs: dict[str, Tensor | None] = {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "v": vectors(case.d_v).to(device, dtype),
        "log_decay": None,
        "initial_state": None,
    }
    if case.decay != "none":
        shape = (case.heads,) if case.decay == "head" else (batch, length, case.heads)
        inputs["log_decay"] = -torch.exp(normal(*shape) - 2).to(device, accumulation)
    if case.initial:
        state = normal(case.sequences, case.heads, case.d_k, case.d_v + case.normalise)
        if case.normalise:
            state[..., -1] = state[..., -1].abs()
        inputs["initial_state"] = state.to(device, accumulation)
    if case.lengths is not None:
        inputs["cu_seqlens"] = torch.tensor((0, *case.lengths)).cumsum(0).to(device)
    return inputs
