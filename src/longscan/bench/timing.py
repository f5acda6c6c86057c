"""How long a call takes: warm-up first, then a median and the spread around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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
    if first is None:
        first = timed(call, device)
    if first > budget:
        return Timing.of([first])
    timed(call, device)
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < max(repeats, 1) and (not seconds or time.perf_counter() - start < budget):
        seconds.append(timed(call, device))
    return Timing.of(seconds)


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call."""
    if torch.device(device).type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device | str) -> None:
    """Waits for the work of an accelerator."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize()
