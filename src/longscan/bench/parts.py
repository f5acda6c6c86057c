"""`longscan bench parts`: what processes that share a sequence send one another, mixer by mixer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.bench.contest import Settings, describe
from longscan.bench.kept import Kept
from longscan.bench.report import Report, Row
from longscan.bench.spawned import spawned
from longscan.bench.timing import measure_in_turn
from longscan.errors import ArgumentError
from longscan.mixers import MIXERS, make_mixer
from longscan.nn.mixer import SequenceMixer
from longscan.nn.sequence_parallel import sequence_parallel

AXES = "processes,length,d_model"


def run(settings: Settings) -> Report:
    """kB that the busiest process sends for one layer and one sequence, forward and backward, float32.

    CPU processes (gloo). Counted, so the same on any network. A note has the messages, and the bytes a token that
    autograd keeps in a process that has a part and in one that has the whole sequence. With one process, whose part is
    the whole sequence, a note also has how much longer it takes than without a group: what parts cost besides sending.
    A mixer that cannot be cut says why.
    """
    if settings.device != "cpu":
        raise ArgumentError(f"device: got {settings.device!r}; bytes are counted between processes on CPUs (cpu)")
    shapes = settings.shapes_of(AXES, (2, 1024, 256), (1, 2048, 256), (4, 1024, 256), (4, 2048, 256))
    rows = [row for shape in shapes for row in measure(shape, tuple(MIXERS), settings)]
    about = {"device": "cpu", "axes": AXES, "shapes": shapes}
    return Report("parts", "kB", higher_is_better=False, rows=rows, settings=about)


def measure(shape: tuple[int, ...], names: tuple[str, ...], settings: Settings) -> list[Row]:
    """The rows of some mixers at one shape."""
    processes, length, _ = shape
    settings.progress(f"{describe(shape, 'float32')}: {len(names)} mixers")
    found = spawned(_worker, processes, shape, names, settings.seed)
    rows = []
    for name in names:
        own: list[dict[str, Any]] = [each[name] for each in found]
        value, note = None, own[0].get("refused", "")
        if not note:
            most = max(own, key=lambda part: part["bytes"])
            value = most["bytes"] / 1e3
            kept, whole = max(part["kept"] for part in own), own[0]["whole"]
            note = f"{most['messages']} messages; kept a token {kept:,.0f} bytes, whole {whole:,.0f}"
            if processes == 1:
                note += f"; {own[0]['times']:.2f} of the time"
        series, place = f"{processes} processes, width {shape[2]}", length if processes > 1 else None
        rows.append(Row(describe(shape, "float32"), name, "peer", None, value, note=note, series=series, place=place))
    return rows


def _times(mixer: SequenceMixer, x: Tensor) -> float:
    """How many times as long forward and backward take within a part."""

    def whole() -> None:
        mixer(x)[0].sum().backward()

    def in_part() -> None:
        with sequence_parallel(length=x.shape[1]):
            whole()

    own, plain = measure_in_turn([in_part, whole], repeats=6, budget=2.0, firsts=[None, None])
    return own.median / plain.median


def _worker(shape: tuple[int, ...], names: tuple[str, ...], seed: int) -> dict[str, Any]:
    _, length, d_model = shape
    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(seed)
        mixer = make_mixer(name, d_model)
        x = torch.randn(1, length, d_model).requires_grad_()

        try:
            with Kept(mixer.parameters()) as whole:
                mixer(x)[0].sum().backward()
            with Kept(mixer.parameters()) as kept, sequence_parallel(length=length) as part:
                mixer(part.take(x))[0].sum().backward()
            found[name] = {
                **dataclasses.asdict(part.traffic),
                "kept": kept.peak / (part.end - part.start),
                "whole": whole.peak / length,
            }
            if part.size == 1:
                found[name]["times"] = _times(mixer, x)
        except ArgumentError as error:
            found[name] = {"refused": str(error)}
        dist.barrier()
    return found
