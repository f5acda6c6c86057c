"""The benchmark of decay attention in miniature."""

from __future__ import annotations

import pytest

from longscan.bench import Settings, decay
from longscan.errors import ArgumentError


def test_it_runs_and_everyone_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decay, "_DECAYS", ("step",))
    report = decay.run(Settings(shapes=((2, 40, 2, 4, 8),), dtypes=("float32",), repeats=1, budget=0.1))
    assert report.failed == []
    assert len(report.groups()) == 2
    for group in report.groups():
        rows = report.of(group)
        assert [row.contender for row in rows] == ["longscan", "reference", "attention"]
        assert all(row.value is not None and row.value > 0 for row in rows), [row.note for row in rows]
        assert all(row.error is not None for row in rows[:2])
        assert rows[0].bandwidth is not None


def test_half_precision_alone() -> None:
    report = decay.run(Settings(shapes=((1, 40, 2, 4, 8),), dtypes=("bfloat16",), peers=(), repeats=1, budget=0.1))
    assert report.failed == []
    assert len(report.groups()) == 6
    assert {row.contender for row in report.rows} == {"longscan"}


def test_shapes_have_five_axes() -> None:
    with pytest.raises(ArgumentError, match="batch,length,heads,d_k,d_v"):
        decay.run(Settings(shapes=((1, 40, 8),)))
