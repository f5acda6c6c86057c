"""One contest: contenders that do the same work are checked against the definition, then timed."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longscan.bench.report import Row
from longscan.bench.timing import Replays, Timing, measure_in_turn, synchronise, timed, timed_with_memory
from longscan.errors import ArgumentError, BackendError

#: Whom `--peers` can name: the definition, plain PyTorch in chunks or as a parallel scan, packages
#: (`longscan.bench.peers`), and what does something else over the same shape (`longscan.bench.others`,
#: `longscan.bench.models`).
PEERS = (
    "reference",
    "chunked",
    "unfused",
    "transformers",
    "transformers+longscan",
    "mambapy",
    "llama.cpp",
    "mamba-ssm",
    "fla",
    "attention",
    "convolution",
    "transformer++",
    "transformer++-compiled",
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Int8 weights with float32 activations: what some benchmarks measure beside dtypes.
INT8 = "int8"

#: Largest relative difference (root mean square) from the definition with which a contender's time still counts. What
#: half precision rounds away adds up over the layers of a model.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


#: The note of a row that the deadline left without a figure.
OUT_OF_TIME = "not run: out of time"

#: Seconds for each contender in a setting, where neither the user nor the benchmark says otherwise.
DEFAULT_BUDGET = 10.0


@dataclass(frozen=True)
class Settings:
    """What every benchmark is told. `shapes`, `dtypes`, `peers` and `budget` of None mean its own defaults.

    `sizes` are names of `longscan.bench.models.SIZES`, for the benchmarks of whole models: their default shapes with
    the layers and the width of those. `deadline` is a reading of `time.monotonic` after which no contender is begun.
    """

    device: str = "cpu"
    shapes: tuple[tuple[int, ...], ...] | None = None
    sizes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    repeats: int = 20
    budget: float | None = None
    seed: int = 0
    deadline: float = math.inf
    progress: Callable[[str], None] = lambda message: None

    def __post_init__(self) -> None:
        for name in self.peers or ():
            if name not in PEERS:
                raise ArgumentError(f"peers: got {name!r}; allowed are {', '.join(PEERS)}")
        for name in self.dtypes or ():
            if name not in (*DTYPES, INT8):
                raise ArgumentError(f"dtype: got {name!r}; allowed are {', '.join((*DTYPES, INT8))}")
        if self.repeats < 1:
            raise ArgumentError(f"repeats: got {self.repeats}, expected at least 1")

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def shapes_of(self, names: str, *defaults: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes asked for, else `defaults`; `names` is what their axes mean, such as "batch,length,channels"."""
        count = len(names.split(","))
        for shape in self.shapes or ():
            if len(shape) != count or min(shape) < 1:
                given = ",".join(map(str, shape))
                raise ArgumentError(f"shape: got {given}, expected {count} positive integers: {names}")
        return self.shapes or defaults

    def dtypes_of(self, *defaults: str) -> tuple[str, ...]:
        """The names of dtypes asked for, else `defaults`; int8 only where it is one of these."""
        if INT8 in (self.dtypes or ()) and INT8 not in defaults:
            raise ArgumentError("dtype: int8 weights are measured by decode, on the CPU")
        return self.dtypes or defaults

    def peers_of(self, *possible: str, slow_on_gpu: Sequence[str] = (), on_request: Sequence[str] = ()) -> list[str]:
        """Those of `possible` that were asked for, in their order.

        Where nothing was asked for, all but those `on_request`, and on an accelerator but those that would walk the
        time steps one by one there.
        """
        if self.peers is not None:
            return [name for name in possible if name in self.peers]
        left_out = {*on_request, *(() if self.device == "cpu" else slow_on_gpu)}
        return [name for name in possible if name not in left_out]


#: One pass; what it returns is compared with the definition's, output by output.
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work.

    Attributes:
        kind: "ours", "peer", or "other" for one that computes something else over the same shape; its outputs are not
            compared.
        prepare: builds whatever is needed and returns the call that is timed, which returns the outputs that are
            compared. It raises ImportError when the peer is not installed or not for this device: the contender is then
            left out. An attribute `note` of the call is said beside its figure.
        check: likewise for the call whose outputs are compared, where that is a smaller one than what is timed.
        moved: bytes that a pass has to move, read or written; None: those of its group.
        floor: seconds that nothing can beat, for an "other", which does not share its group's floors.
        note: what to know of its figure.
        skip: why it is not run; it gets a row that says so.
        own_memory: it keeps memory that the allocator does not count as allocated (a captured graph's): its peak is not
            known.
    """

    name: str
    kind: str
    prepare: Callable[[], Call]
    check: Callable[[], Call] | None = None
    moved: float | None = None
    floor: float | None = None
    note: str = ""
    skip: str = ""
    own_memory: bool = False


@dataclass(frozen=True)
class _Ready:
    """A contender whose outputs are right, how long a pass took it, and the most memory it held meanwhile."""

    contender: Contender
    call: Callable[[], Any]
    first: float
    error: float | None
    memory: int | None
    note: str


def compare(
    group: str,
    contenders: Sequence[Contender],
    truth: tuple[Tensor, ...],
    settings: Settings,
    *,
    dtype: torch.dtype,
    to_value: Callable[[float], float],
    graphs: bool = False,
    moved: float | None = None,
    whole: bool = False,
) -> list[Row]:
    """Builds each contender, compares its first pass with `truth`, then times those that are right.

    On the CPU they take turns, so that a slow stretch of the machine meets them all. On a GPU, whose
    memory may not hold them all, each is timed before the next one is built. One that is not installed is left out; one
    that fails, has no room or gives other numbers gets a row that says so.

    Args:
        to_value: seconds per call to the report's unit.
        graphs: on NVIDIA GPUs, time passes of less than 50 ms captured in a CUDA graph, without their launches.
        moved: bytes that a pass has to move, where the contender does not say otherwise.
        whole: peak memory counts what the contender built as well (weights, optimiser), not a pass alone.
    """
    rows: dict[str, Row] = {}
    ready: list[_Ready] = []
    for contender in contenders:
        skip = contender.skip or (OUT_OF_TIME if settings.late() else "")
        if skip:
            rows[contender.name] = Row(group, contender.name, contender.kind, note=skip)
            continue
        settings.progress(f"{group}: {contender.name}")
        contender = replace(contender, moved=moved if contender.moved is None else contender.moved)
        try:
            with _capturable(graphs and settings.device == "cuda") as captures:
                found = _first_pass(group, contender, truth, settings, dtype, captures, whole)
        except Exception as error:  # a peer may break in any way; its row says how
            if settings.device == "cuda" and not _runs_on():
                raise BackendError(f"{group}: {contender.name} {failure(error)}; no more runs on this GPU") from error
            if isinstance(error, ImportError) and contender.kind == "peer":
                continue
            found = Row(group, contender.name, contender.kind, note=failure(error))
        if isinstance(found, Row):
            rows[contender.name] = found
        elif settings.device == "cpu":
            ready.append(found)
        else:
            rows.update(_timed_rows(group, [found], settings, to_value))
        del found
        release(settings.device)
    rows.update(_timed_rows(group, ready, settings, to_value))
    return [rows[contender.name] for contender in contenders if contender.name in rows]


#: How allocators other than PyTorch's own for GPUs say it: that of the CPU, of the FFT, of matrix products.
_NO_ROOM = ("DefaultCPUAllocator", "CUFFT_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def failure(error: Exception) -> str:
    """Why there is no figure, for a row's note."""
    named = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or named:
        return "out of memory"
    return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _runs_on() -> bool:
    """Whether the GPU still works in this process, which it does not after an access to memory that is not there."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def release(device: str) -> None:
    """Gives back the memory of what is no longer used, so that the next contender has all there is."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # Compiled functions hold on to what they were compiled for.
    if device == "cuda":
        torch.cuda.empty_cache()


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
        budget=DEFAULT_BUDGET if settings.budget is None else settings.budget,
        firsts=[one.first for one in ready],
    )
    rows = {}
    for one, timing in zip(ready, timings, strict=True):
        own = one.contender
        rows[own.name] = Row(
            group,
            own.name,
            own.kind,
            timing,
            to_value(timing.median),
            one.error,
            "; ".join(note for note in (own.note, one.note, "one pass" if timing.samples == 1 else "") if note),
            bandwidth=None if own.moved is None else own.moved / timing.median,
            of_floor=None if own.floor is None else own.floor / timing.median,
            memory=one.memory,
        )
    return rows


#: A pass that takes longer than this is not captured in a graph: its launches are hidden behind its work.
_CAPTURED_BELOW = 0.05


def _first_pass(
    group: str,
    contender: Contender,
    truth: tuple[Tensor, ...],
    settings: Settings,
    dtype: torch.dtype,
    graphs: bool,
    whole: bool,
) -> Row | _Ready:
    before = torch.cuda.memory_allocated() if whole and settings.device == "cuda" else None
    error = None
    if contender.check is not None and contender.kind != "other":
        error = _largest_error(contender.check()(), truth)
        if settings.device != "cpu":
            release(settings.device)
        if not error <= TOLERANCE[dtype]:
            return _wrong(group, contender, error, dtype)
    call = contender.prepare()
    start = time.perf_counter()
    outputs = call()
    synchronise(settings.device)
    first = time.perf_counter() - start
    if error is None and contender.kind != "other":
        error = _largest_error(outputs, truth)
    del outputs
    if error is not None and not error <= TOLERANCE[dtype]:
        return _wrong(group, contender, error, dtype)
    memory = None
    # A slow peer's first pass may be its only one; ours, those on our operators, and any on a GPU, compile in it.
    if contender.kind == "ours" or contender.name.endswith("+longscan") or settings.device != "cpu":
        first, memory = timed_with_memory(call, settings.device, before)
    if contender.own_memory:
        memory = None
    note = getattr(call, "note", "")
    if graphs and first < _CAPTURED_BELOW:
        try:
            replays = Replays(call, first)
            return _Ready(contender, replays, timed(replays, settings.device), error, memory, note)
        except Exception:  # not everybody can be captured
            torch.cuda.synchronize()
            note = "; ".join(filter(None, (note, "launches included")))
    return _Ready(contender, call, first, error, memory, note)


def _wrong(group: str, contender: Contender, error: float, dtype: torch.dtype) -> Row:
    note = f"not timed: its output differs from the definition's by {error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
    return Row(group, contender.name, contender.kind, error=error, note=note)


def _largest_error(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(relative_error(output, expected) for output, expected in zip(outputs, truth, strict=True))


def floor(group: str, name: str, timing: Timing | float, to_value: Callable[[float], float], note: str = "") -> Row:
    """The row of a floor, from its seconds; `note` says what it counts."""
    if not isinstance(timing, Timing):
        timing = Timing(timing, timing, timing, 1)
    return Row(group, f"floor: {name}", "floor", timing, to_value(timing.median), note=note)


def beside(rows: Sequence[Row], floors: Sequence[Row]) -> list[Row]:
    """Rows of one group and then its floors; each row that does the group's work says what part of its time is the
    floor's: the slowest one, which binds."""
    bound = max((own.timing.median for own in floors if own.timing is not None), default=None)
    found = []
    for row in rows:
        if bound is not None and row.timing is not None and row.kind != "other":
            row = replace(row, of_floor=bound / row.timing.median)
        found.append(row)
    return [*found, *floors]


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
