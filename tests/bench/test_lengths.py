from __future__ import annotations

from typing import Any

import pytest
from torch.nn.attention import SDPBackend

from longscan import ops
from longscan.bench import Settings, lengths, others


def test_rows_are_points_of_lines() -> None:
    settings = Settings(shapes=((2, 8, 24, 4), (1, 16, 24, 4)), repeats=1, budget=0.1)
    with ops.backend("reference"):  # nothing to compile
        report = lengths.run(settings)
    assert report.failed == []
    points = [row for row in report.rows if row.kind != "floor"]
    assert {(row.series, row.place) for row in points} == {
        (f"{phase} float32", place) for phase in ("forward", "forward and backward") for place in (8, 16)
    }
    assert {"longscan", "unfused", "attention", "convolution"} <= {row.contender for row in points}
    for row in points:
        assert row.value is not None, row.note
        assert (row.error is None) == (row.kind == "other")
        assert row.of_floor is not None


@pytest.fixture
def attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longscan.bench.scan.contestants", lambda settings: [])


@pytest.mark.usefixtures("attention_alone")
def test_attention_is_left_out_where_it_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_LONGEST_PASS", 1e-9)
    settings = Settings(shapes=((2, 8, 24, 4), (1, 16, 24, 4)), peers=("attention",), repeats=1, budget=0.1)
    report = lengths.run(settings)
    rows = [row for row in report.rows if row.contender == "attention"]
    # The shortest teaches how long the next would take.
    assert [row.value is not None for row in rows] == [True, True, False, False]
    assert all(row.note.startswith("skipped: about") for row in rows[2:])


@pytest.mark.usefixtures("attention_alone")
def test_long_attention_keeps_the_backend_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    # Judged by eight tokens, 3,000 would take more than the 5 seconds.
    monkeypatch.setattr(lengths, "_LONGEST_PASS", 1e9)
    tried: list[object] = []
    attention = others.attention

    def spy(*arguments: Any) -> others.Pass:
        tried.append(arguments[4] if len(arguments) > 4 else None)
        return attention(*arguments)

    monkeypatch.setattr(others, "attention", spy)
    settings = Settings(shapes=((1, 8, 64, 4), (1, 3000, 64, 4)), peers=("attention",), repeats=1, budget=0.1)
    report = lengths.run(settings)
    notes = {row.group: row.note for row in report.rows if row.contender == "attention"}
    assert tried[:2] == [None, None]
    for backend, note in zip(tried[2:], list(notes.values())[2:], strict=True):
        assert isinstance(backend, SDPBackend)
        assert f"{others.backend_name(backend)}, float32" in note


def test_defaults_double_at_about_as_many_tokens() -> None:
    shapes = lengths.default_shapes("cuda")
    assert [shape[1] for shape in shapes] == [2**power for power in range(9, 21)]
    assert shapes[0] == (128, 512, 1024, 16)
    assert shapes[-1] == (1, 1048576, 1024, 16)
    assert [shape[1] for shape in lengths.default_shapes("cpu")] == [512, 1024, 2048, 4096, 8192]
