"""`longscan bench mixers`: what every system costs by length; the figure that shows who is linear."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longscan.bench.contest import DTYPES, OUT_OF_TIME, Settings, describe, failure, release
from longscan.bench.report import Report, Row
from longscan.bench.timing import measure, timed_with_memory
from longscan.mixers import MIXERS
from longscan.nn.mixer import SequenceMixer

AXES = "batch,length,d_model"

_PHASES = ("forward", "forward and backward")

#: Seconds of a pass above which a mixer is not run at a length any more, judging by the one before it.
_LONGEST_PASS = {"cpu": 1.0, "cuda": 1.0}

#: Seconds for the passes at one length.
_BUDGET = {"cpu": 0.1, "cuda": 1.0}


def default_shapes(device: str) -> tuple[tuple[int, ...], ...]:
    """One sequence of 512 to 65,536 steps; 64 channels on a CPU, 1,024 elsewhere."""
    d_model = 64 if device == "cpu" else 1024
    return tuple((1, 2**power, d_model) for power in range(9, 17))


def run(settings: Settings) -> Report:
    """Milliseconds a pass of one layer, with its default options; on NVIDIA GPUs also its peak memory.

    The others stand beside Mamba. What would take too long, judging by the growth from length to length so far, is left
    out and says so.
    """
    shapes = settings.shapes_of(AXES, *default_shapes(settings.device))
    dtypes = settings.dtypes_of("float32" if settings.device == "cpu" else "bfloat16")
    rows: list[Row] = []
    for dtype in dtypes:
        for name in MIXERS:
            settings.progress(f"{name}, {dtype}")
            rows += _Line(name, dtype, settings).measure(shapes)
    # Measured mixer by mixer, told length by length.
    groups = list(dict.fromkeys(row.group for row in rows))
    rows.sort(key=lambda row: groups.index(row.group))
    about = {"device": settings.device, "axes": AXES, "shapes": shapes}
    return Report("mixers", "ms", higher_is_better=False, rows=rows, settings=about)


class _Line:
    """One mixer in one dtype over all lengths, with what the shorter ones taught."""

    def __init__(self, name: str, dtype: str, settings: Settings) -> None:
        self._name, self._dtype, self._settings = name, dtype, settings
        #: Of each phase: the lengths and the seconds of a pass so far, and whether it has failed.
        self._seconds: dict[str, list[tuple[int, float]]] = {phase: [] for phase in _PHASES}
        self._failed: set[str] = set()

    def measure(self, shapes: tuple[tuple[int, ...], ...]) -> list[Row]:
        rows = []
        for shape in shapes:
            for phase in _PHASES:
                rows.append(self._row(shape, phase))
            release(self._settings.device)
        return rows

    def _row(self, shape: tuple[int, ...], phase: str) -> Row:
        settings = self._settings
        about: dict[str, Any] = {
            "group": describe(shape, self._dtype, phase=phase).replace("phase ", ""),
            "contender": self._name,
            "kind": "ours" if self._name == "mamba" else "other",
            "series": f"{phase} {self._dtype}",
            "place": shape[1],
        }
        if phase in self._failed:
            return Row(**about, note="skipped: fails at a shorter length")
        if settings.late():
            return Row(**about, note=OUT_OF_TIME)
        predicted = self._predict(shape[1], phase)
        if predicted > _LONGEST_PASS.get(settings.device, 5.0):
            return Row(**about, note=f"skipped: about {predicted:.0f} s a pass")
        try:
            call = self._prepare(shape, phase)
            call()  # compiles, some libraries anew for each length
            first, memory = timed_with_memory(call, settings.device)
            budget = settings.budget or _BUDGET.get(settings.device, 1.0)
            timing = measure(call, settings.device, repeats=settings.repeats, budget=budget, first=first)
        except (RuntimeError, MemoryError, ValueError) as error:
            self._failed.add(phase)
            return Row(**about, note=failure(error))
        self._seconds[phase].append((shape[1], timing.median))
        return Row(**about, timing=timing, value=1e3 * timing.median, memory=memory)

    def _predict(self, length: int, phase: str) -> float:
        """Seconds of a pass, from the last two: in proportion to the length at least, to its square at most."""
        known = self._seconds[phase]
        if not known:
            return 0.0
        (before, seconds), ratio, growth = known[-1], length / known[-1][0], 1.0
        if len(known) > 1:
            earlier, fewer = known[-2]
            growth = math.log(seconds / fewer) / math.log(before / earlier)
        return seconds * ratio ** min(max(growth, 1.0), 2.0)

    def _prepare(self, shape: tuple[int, ...], phase: str) -> Callable[[], object]:
        settings = self._settings
        torch.manual_seed(settings.seed)
        kind = MIXERS[self._name]
        # Where a mixer has to know how long sequences may get.
        options = {"max_length": shape[1]} if "max_length" in inspect.signature(kind.__init__).parameters else {}
        mixer: SequenceMixer = kind(shape[2], **options).to(settings.device, DTYPES[self._dtype])
        generator = torch.Generator().manual_seed(settings.seed)
        x = torch.randn(shape, generator=generator).to(settings.device, DTYPES[self._dtype])
        if phase == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return mixer(x)[0]

            return forward
        x.requires_grad_()
        weights = [x, *mixer.parameters()]

        def both() -> tuple[Tensor, ...]:
            y = mixer(x)[0]
            return torch.autograd.grad(y, weights, torch.ones_like(y))

        return both
