from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longscan.bench import Settings
from longscan.bench.contest import Call, Contender, compare, relative_error
from longscan.errors import ArgumentError

TRUTH = (torch.tensor([1.0, 2.0]),)
QUICK = Settings(repeats=1, budget=0.1)


def gives(*values: float) -> Callable[[], Call]:
    return lambda: lambda: (torch.tensor(values),)


def test_a_right_contender_is_timed() -> None:
    (row,) = compare(
        "g", [Contender("a", "peer", gives(1, 2))], TRUTH, QUICK, dtype=torch.float32, to_value=lambda s: s * 1e3
    )
    assert row.timing is not None
    assert row.value == row.timing.median * 1e3
    assert row.error == 0


def test_wrong_numbers_are_never_timed() -> None:
    calls = []

    def call() -> tuple[Tensor, ...]:
        calls.append(1)
        return (torch.tensor([1.0, 2.1]),)

    (row,) = compare("g", [Contender("a", "ours", lambda: call)], TRUTH, QUICK, dtype=torch.float32, to_value=float)
    assert row.value is None
    assert "differs from the definition's" in row.note
    assert len(calls) == 1


@pytest.mark.parametrize(("kind", "calls"), [("ours", 2), ("peer", 1)])
def test_only_a_slow_peer_is_timed_by_its_first_pass(kind: str, calls: int) -> None:
    seconds = []

    def call() -> tuple[Tensor, ...]:
        start = time.perf_counter()
        time.sleep(0.05 if seconds else 0.3)  # the first pass is slow, as one that compiles
        seconds.append(time.perf_counter() - start)
        return TRUTH

    settings = Settings(repeats=1, budget=0.01)
    (row,) = compare("g", [Contender("a", kind, lambda: call)], TRUTH, settings, dtype=torch.float32, to_value=float)
    assert len(seconds) == calls
    assert row.value == pytest.approx(seconds[-1], rel=0.5)


def test_not_a_number_is_wrong() -> None:
    (row,) = compare(
        "g", [Contender("a", "ours", gives(1, float("nan")))], TRUTH, QUICK, dtype=torch.float32, to_value=float
    )
    assert row.value is None


def fails_with(error: Exception) -> Callable[[], Call]:
    def prepare() -> Call:
        raise error

    return prepare


def test_a_missing_peer_is_left_out_and_a_broken_one_named() -> None:
    contenders = [
        Contender("missing", "peer", fails_with(ImportError("no module"))),
        Contender("broken", "peer", fails_with(RuntimeError("first line\nsecond line"))),
        Contender("ours", "ours", fails_with(ImportError("no module"))),
    ]
    rows = compare("g", contenders, TRUTH, QUICK, dtype=torch.float32, to_value=float)
    assert [row.contender for row in rows] == ["broken", "ours"]
    assert rows[0].note == "fails: RuntimeError: first line"


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(ArgumentError, match="output"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_settings_are_checked() -> None:
    with pytest.raises(ArgumentError, match="peers"):
        Settings(peers=("mamba",))
    with pytest.raises(ArgumentError, match="dtype"):
        Settings(dtypes=("float8",))
    with pytest.raises(ArgumentError, match="repeats"):
        Settings(repeats=0)
    with pytest.raises(ArgumentError, match="expected 2 positive integers: batch,length"):
        Settings(shapes=((1, 2, 3),)).shapes_of("batch,length", (1, 1))
    with pytest.raises(ArgumentError, match="shape"):
        Settings(shapes=((1, 0),)).shapes_of("batch,length", (1, 1))
