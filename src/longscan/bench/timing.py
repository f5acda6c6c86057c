"""How long a call takes: warm-up first, then a median and the spread around it. And how much memory it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longscan.nn.capture import captured


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the 20th and 80th percentile, and how many calls were timed."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Of the samples themselves, in any order, at least one."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


def _quantile(ordered: list[float], fraction: float) -> float:
    """Linear between the two nearest samples."""
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def measure(
    call: Callable[[], Any],
    device: torch.device | str = "cpu",
    *,
    repeats: int = 20,
    budget: float = 10.0,
    first: float | None = None,
) -> Timing:
    """Times `call` after a warm-up.

    Args:
        call: does one pass; its result is dropped.
        device: on a GPU, time is taken by events on its stream, so that launching is not counted where work is.
        repeats: samples to take, at least 1.
        budget: seconds after which no further sample is started; one is always taken.
        first: seconds of an earlier pass, if there was one with nothing left to compile. When it is longer than the
            whole budget the call is not repeated: that pass is then its only sample.

    Returns:
        Seconds per call.
    """
    (timing,) = measure_in_turn([call], device, repeats=repeats, budget=budget, firsts=[first])
    return timing


#: Turns that every call gets when several are timed together.
_TURNS = 3


def measure_in_turn(
    calls: Sequence[Callable[[], Any]],
    device: torch.device | str = "cpu",
    *,
    repeats: int = 20,
    budget: float = 10.0,
    firsts: Sequence[float | None],
) -> list[Timing]:
    """Times several calls in three rounds, so that a slow stretch of the machine meets them all.

    A turn begins with a pass that is not timed, unless that would take the whole turn: caches and allocators have to
    get used to the call again.

    Args:
        calls, firsts: what :func:`measure` takes, one of each per contender.
        device, repeats, budget: as there; the budget is each call's own.
    """
    passes = [timed(call, device) if first is None else first for call, first in zip(calls, firsts, strict=True)]
    samples: list[list[float]] = [[seconds] if seconds > budget else [] for seconds in passes]
    open_ = [i for i, seconds in enumerate(passes) if seconds <= budget]
    for turn in range(1, _TURNS + 1):
        for i in open_:
            # Samples and seconds that may be there when this turn ends.
            most, until = -(-max(repeats, 1) * turn // _TURNS), budget * turn / _TURNS
            if passes[i] < budget / _TURNS:
                timed(calls[i], device)
            while len(samples[i]) < most and (not samples[i] or sum(samples[i]) < until):
                samples[i].append(timed(calls[i], device))
    return [Timing.of(seconds) for seconds in samples]


class Replays:
    """A call captured in a CUDA graph several times over: what is left to time is the work, not its launching."""

    def __init__(self, call: Callable[[], Any], seconds: float) -> None:
        """Captures on the current stream, which must not be the default one.

        `seconds`: about how long the call takes, of which a graph holds enough for 20 ms.
        """
        self.count = max(1, min(100, int(0.02 / max(seconds, 1e-6))))
        # A graph does not keep the memory that was there before it.
        self._call = call
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph, torch.cuda.current_stream()):
            for _ in range(self.count):
                call()

    def __call__(self) -> None:
        self._graph.replay()


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, of which :class:`Replays` holds several."""
    if torch.device(device).type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / getattr(call, "count", 1)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def timed_with_memory(
    call: Callable[[], Any], device: torch.device | str, before: int | None = None
) -> tuple[float, int | None]:
    """Seconds of one call, and the bytes that were allocated at its peak beyond `before`.

    Args:
        before: bytes allocated earlier; None: those that are when the call begins.

    Returns:
        Memory is that of PyTorch's allocator on NVIDIA GPUs, None elsewhere.
    """
    if torch.device(device).type != "cuda":
        return timed(call, device), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if before is None else before
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(call, device)
    return seconds, torch.cuda.max_memory_allocated() - before


def synchronise(device: torch.device | str) -> None:
    """Waits for the work of an accelerator."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize()
