from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longscan.bench import Row, Settings, Timing
from longscan.bench.contest import OUT_OF_TIME, Call, Contender, beside, compare, floor, relative_error
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


def test_something_else_is_timed_and_not_compared() -> None:
    other = Contender("a", "other", gives(5.0), moved=30.0, floor=1e-9, note="something else")
    (row,) = compare("g", [other], TRUTH, QUICK, dtype=torch.float32, to_value=float)
    assert row.timing is not None
    assert (row.error, row.note.split("; ")[0]) == (None, "something else")
    assert row.bandwidth == pytest.approx(30 / row.timing.median)
    assert row.of_floor == pytest.approx(1e-9 / row.timing.median)
    assert beside([row], [floor("g", "memory", 1.0, float)])[0] == row


def test_what_is_compared_may_be_smaller_than_what_is_timed() -> None:
    right = Contender("right", "ours", gives(7.0), check=gives(1, 2))
    wrong = Contender("wrong", "peer", fails_with(AssertionError("never built")), check=gives(1, 3))
    rows = compare("g", [right, wrong], TRUTH, QUICK, dtype=torch.float32, to_value=float, moved=8.0)
    assert (rows[0].error, rows[0].value is None) == (0, False)
    assert rows[0].bandwidth is not None
    assert "differs from the definition's" in rows[1].note


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_no_room_is_said(error: Exception) -> None:
    (row,) = compare(
        "g", [Contender("a", "peer", fails_with(error))], TRUTH, QUICK, dtype=torch.float32, to_value=float
    )
    assert (row.value, row.note) == (None, "out of memory")


def test_who_is_skipped_is_not_built() -> None:
    skipped = Contender("a", "other", fails_with(AssertionError("never built")), skip="skipped: about 9 s a pass")
    (row,) = compare("g", [skipped], TRUTH, QUICK, dtype=torch.float32, to_value=float)
    assert row.note == "skipped: about 9 s a pass"


def test_nobody_begins_after_the_deadline() -> None:
    settings = dataclasses.replace(QUICK, deadline=time.monotonic() - 1)
    contenders = [Contender("a", "ours", gives(1, 2)), Contender("b", "other", lambda: pytest.fail("built"))]
    rows = compare("g", contenders, TRUTH, settings, dtype=torch.float32, to_value=float)
    assert [(row.value, row.note) for row in rows] == [(None, OUT_OF_TIME)] * 2


def test_the_slowest_floor_binds() -> None:
    row = Row("g", "a", "ours", Timing(4.0, 4.0, 4.0, 1), 4.0)
    bounds = [floor("g", "memory", 1.0, float), floor("g", "arithmetic", 3.0, float)]
    assert [found.of_floor for found in beside([row, Row("g", "b", "peer", note="fails")], bounds)] == [
        0.75,
        None,
        None,
        None,
    ]


def test_peers_by_default_and_by_name() -> None:
    names = ("reference", "attention", "mamba-ssm")
    assert Settings().peers_of(*names, slow_on_gpu=("reference",)) == list(names)
    assert Settings(device="cuda").peers_of(*names, slow_on_gpu=("reference",)) == ["attention", "mamba-ssm"]
    assert Settings().peers_of(*names, on_request=("attention",)) == ["reference", "mamba-ssm"]
    asked = Settings(device="cuda", peers=("mamba-ssm", "reference", "mambapy"))
    assert asked.peers_of(*names, slow_on_gpu=("reference",)) == ["reference", "mamba-ssm"]


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
