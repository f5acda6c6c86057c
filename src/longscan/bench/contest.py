"""One contest: contenders that do the same work are checked against the definition, then timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longscan.bench.report import Row
from longscan.bench.timing import Timing, measure, synchronise, timed
from longscan.errors import ArgumentError

#: Peers that `--peers` can name; see `longscan.bench.peers`.
PEERS = ("reference", "transformers", "mambapy", "llama.cpp", "mamba-ssm")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Largest relative difference (root mean square) from the definition with which a contender's time still counts. What
#: half precision rounds away adds up over the layers of a model.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Settings:
    """What every benchmark is told. `shapes` and `dtypes` of None mean its own defaults."""

    device: str = "cpu"
    shapes: tuple[tuple[int, ...], ...] | None = None
    dtypes: tuple[str, ...] | None = None
    peers: tuple[str, ...] = PEERS
    repeats: int = 20
    budget: float = 10.0
    seed: int = 0
    progress: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        for name in self.peers:
            if name not in PEERS:
                raise ArgumentError(f"peers: got {name!r}; allowed are {', '.join(PEERS)}")
        for name in self.dtypes or ():
            if name not in DTYPES:
                raise ArgumentError(f"dtype: got {name!r}; allowed are {', '.join(DTYPES)}")
        if self.repeats < 1:
            raise ArgumentError(f"repeats: got {self.repeats}, expected at least 1")

    def shapes_of(self, names: str, *defaults: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes asked for, else `defaults`; `names` is what their axes mean, such as "batch,length,channels"."""
        count = len(names.split(","))
        for shape in self.shapes or ():
            if len(shape) != count or min(shape) < 1:
                given = ",".join(map(str, shape))
                raise ArgumentError(f"shape: got {given}, expected {count} positive integers: {names}")
        return self.shapes or defaults

    def dtypes_of(self, *defaults: str) -> tuple[str, ...]:
        """The names of dtypes asked for, else `defaults`."""
        return self.dtypes or defaults


#: One pass; what it returns is compared with the definition's, output by output.
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work.

    `prepare` builds whatever is needed and returns the call that is timed, which returns the outputs that are compared.
    It raises ImportError when the peer is not installed or not for this device: the contender is then left out.
    """

    name: str
    kind: str
    prepare: Callable[[], Call]


def compare(
    group: str,
    contenders: Sequence[Contender],
    truth: tuple[Tensor, ...],
    settings: Settings,
    *,
    dtype: torch.dtype,
    to_value: Callable[[float], float],
) -> list[Row]:
    """Runs each contender in turn: build, first pass, comparison with `truth`, then the timed passes.

    A contender that is not installed is left out; one that fails or gives other numbers gets a row that says so.

    Args:
        to_value: seconds per call to the report's unit.
    """
    rows = []
    for contender in contenders:
        settings.progress(f"{group}: {contender.name}")
        try:
            rows.append(_run(group, contender, truth, settings, dtype, to_value))
        except Exception as error:  # a peer may break in any way; its row says how
            if isinstance(error, ImportError) and contender.kind == "peer":
                continue
            note = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append(Row(group, contender.name, contender.kind, note=note))
        finally:
            gc.collect()
    return rows


def _run(
    group: str,
    contender: Contender,
    truth: tuple[Tensor, ...],
    settings: Settings,
    dtype: torch.dtype,
    to_value: Callable[[float], float],
) -> Row:
    call = contender.prepare()
    start = time.perf_counter()
    outputs = call()
    synchronise(settings.device)
    first = time.perf_counter() - start
    error = max(relative_error(output, expected) for output, expected in zip(outputs, truth, strict=True))
    del outputs
    if not error <= TOLERANCE[dtype]:
        note = f"not timed: its output differs from the definition's by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
        return Row(group, contender.name, contender.kind, error=error, note=note)
    # A slow peer's first pass may be its only one; ours, and any on a GPU, compiles in it.
    compiles = contender.kind == "ours" or settings.device != "cpu"
    if compiles:
        first = timed(call, settings.device)
    timing = measure(call, settings.device, repeats=settings.repeats, budget=settings.budget, first=first)
    note = "one pass" if timing.samples == 1 else ""
    return Row(group, contender.name, contender.kind, timing, to_value(timing.median), error, note)


def floor(group: str, name: str, timing: Timing | float, to_value: Callable[[float], float], note: str = "") -> Row:
    """The row of a floor, from its seconds; `note` says what it counts."""
    if not isinstance(timing, Timing):
        timing = Timing(timing, timing, timing, 1)
    return Row(group, f"floor: {name}", "floor", timing, to_value(timing.median), note=note)


def relative_error(output: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, over that of the truth."""
    output, truth = output.detach().double().cpu(), truth.detach().double().cpu()
    if output.shape != truth.shape:
        raise ArgumentError(f"output: got shape {tuple(output.shape)}, the definition gives {tuple(truth.shape)}")
    return float((output - truth).norm() / truth.norm().clamp(min=1e-30))


def describe(shape: Sequence[int], dtype: str, **more: Any) -> str:
    """The name of a group: its shape, dtype, and what else tells it from others."""
    parts = [f"({', '.join(map(str, shape))})", *(f"{key} {value}" for key, value in more.items()), dtype]
    return " ".join(parts)
