"""The benchmark of every mixer by length in miniature."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from longscan.bench import Settings, mixers
from longscan.mixers import MIXERS, LinearAttention
from longscan.nn import State
from longscan.plots.lines import draw_lines


def test_every_mixer_has_its_line() -> None:
    report = mixers.run(Settings(shapes=((1, 8, 16), (1, 16, 16)), repeats=1, budget=0.01))
    assert report.failed == []
    for phase in ("forward", "forward and backward"):
        own = [row for row in report.rows if row.series == f"{phase} float32"]
        assert [(row.contender, row.place) for row in own] == [(name, n) for n in (8, 16) for name in MIXERS]
        assert all(row.value is not None and row.value > 0 for row in own), [row.note for row in own]
    panels = draw_lines(json.loads(report.to_json())).axes
    looks = [{(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panel.lines} for panel in panels]
    assert [len(look) for look in looks] == [len(MIXERS)] * 2


class _Slow(LinearAttention):
    """Out of memory at length 32."""

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        if x.shape[1] == 32:
            raise torch.OutOfMemoryError
        return super().forward(x, state, cu_seqlens=cu_seqlens)  # type: ignore[return-value]


def test_what_takes_too_long_or_has_no_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixers, "MIXERS", {"slow": _Slow})
    shapes = tuple((1, length, 8) for length in (8, 16, 32, 64))
    rows = mixers.run(Settings(shapes=shapes, repeats=1, budget=0.01)).rows
    forward = [row for row in rows if row.series == "forward float32"]
    assert [row.note for row in forward] == ["", "", "out of memory", "skipped: fails at a shorter length"]
    monkeypatch.setattr(mixers, "_LONGEST_PASS", {"cpu": 0.0})
    rows = mixers.run(Settings(shapes=shapes[:2], repeats=1, budget=0.01)).rows
    assert [bool(row.note) for row in rows] == [False, False, True, True]
