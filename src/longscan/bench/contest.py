"""One contest: contenders that do the same work are checked against the definition, then timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longscan.bench.report import Row
from longscan.bench.timing import Replays, Timing, measure_in_turn, synchronise, timed
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


@dataclass(frozen=True)
class _Ready:
    """A contender whose outputs are right, and how long a pass took it."""

    contender: Contender
    call: Callable[[], Any]
    first: float
    error: float


def compare(
    group: str,
    contenders: Sequence[Contender],
    truth: tuple[Tensor, ...],
    settings: Settings,
    *,
    dtype: torch.dtype,
    to_value: Callable[[float], float],
    graphs: bool = False,
) -> list[Row]:
    """Builds each contender, compares its first pass with `truth`, then times those that are right.

    On the CPU they take turns, so that a slow stretch of the machine meets them all. On a GPU, whose
    memory may not hold them all, each is timed before the next one is built. One that is not installed is left out; one
    that fails or gives other numbers gets a row that says so.

    Args:
        to_value: seconds per call to the report's unit.
        graphs: on NVIDIA GPUs, time passes captured in a CUDA graph, without their launches.
    """
    rows: dict[str, Row] = {}
    ready: list[_Ready] = []
    for contender in contenders:
        settings.progress(f"{group}: {contender.name}")
        try:
            with _capturable(graphs and settings.device == "cuda") as captures:
                found = _first_pass(group, contender, truth, settings, dtype, captures)
        except Exception as error:  # a peer may break in any way; its row says how
            if isinstance(error, ImportError) and contender.kind == "peer":
                continue
            note = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found = Row(group, contender.name, contender.kind, note=note)
        if isinstance(found, Row):
            rows[contender.name] = found
        elif settings.device == "cpu":
            ready.append(found)
        else:
            rows.update(_timed_rows(group, [found], settings, to_value))
        del found
        gc.collect()
    rows.update(_timed_rows(group, ready, settings, to_value))
    return [rows[contender.name] for contender in contenders if contender.name in rows]


@contextmanager
def _capturable(graphs: bool) -> Iterator[bool]:
    """Work inside runs on a stream of its own: a backward pass runs where its forward pass did, and the default stream
    cannot be captured."""
    if not graphs:
        yield False
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield True
    torch.cuda.current_stream().wait_stream(side)


def _timed_rows(
    group: str, ready: Sequence[_Ready], settings: Settings, to_value: Callable[[float], float]
) -> dict[str, Row]:
    if not ready:
        return {}
    settings.progress(f"{group}: timing {', '.join(one.contender.name for one in ready)}")
    timings = measure_in_turn(
        [one.call for one in ready],
        settings.device,
        repeats=settings.repeats,
        budget=settings.budget,
        firsts=[one.first for one in ready],
    )
    rows = {}
    for one, timing in zip(ready, timings, strict=True):
        note = "one pass" if timing.samples == 1 else ""
        name, kind = one.contender.name, one.contender.kind
        rows[name] = Row(group, name, kind, timing, to_value(timing.median), one.error, note)
    return rows


def _first_pass(
    group: str,
    contender: Contender,
    truth: tuple[Tensor, ...],
    settings: Settings,
    dtype: torch.dtype,
    graphs: bool,
) -> Row | _Ready:
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
    if contender.kind == "ours" or settings.device != "cpu":
        first = timed(call, settings.device)
    if graphs:
        replays = Replays(call, first)
        return _Ready(contender, replays, timed(replays, settings.device), error)
    return _Ready(contender, call, first, error)


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
