"""The benchmark of the linear scan in miniature."""

from __future__ import annotations

import pytest

from longscan.bench import Settings, linear_scan
from longscan.errors import ArgumentError


def test_it_runs_and_everyone_agrees() -> None:
    report = linear_scan.run(Settings(shapes=((2, 40, 5),), dtypes=("float32", "bfloat16"), repeats=1, budget=0.1))
    assert report.failed == []
    assert [group.split(") ")[1] for group in report.groups()] == [
        "real forward float32",
        "real forward and backward float32",
        "complex forward float32",
        "complex forward and backward float32",
        "real forward bfloat16",
        "real forward and backward bfloat16",
    ]
    for group in report.groups():
        rows = report.of(group)
        assert [row.contender for row in rows] == ["longscan", "reference", "chunked", "unfused"]
        if "float32" in group:
            assert all(row.value is not None and row.value > 0 for row in rows), [row.note for row in rows]
            assert all(row.error is not None for row in rows)


def test_shapes_have_three_axes() -> None:
    with pytest.raises(ArgumentError, match="batch,length,channels"):
        linear_scan.run(Settings(shapes=((1, 40),)))
