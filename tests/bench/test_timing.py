from __future__ import annotations

import time

import pytest

from longscan.bench.timing import Timing, measure, measure_in_turn


def test_median_and_spread_are_quantiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median, timing.samples) == (3.0, 5)
    assert timing.low == pytest.approx(1.8)
    assert timing.high == pytest.approx(4.2)


def test_one_sample_has_no_spread() -> None:
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


def test_takes_the_samples_asked_for() -> None:
    calls = []
    assert measure(lambda: calls.append(1), repeats=4).samples == 4
    assert len(calls) == 8  # one more at first, and one before each turn


def test_stops_when_the_budget_is_spent() -> None:
    timing = measure(lambda: time.sleep(0.02), repeats=1000, budget=0.1)
    assert 1 <= timing.samples < 20
    assert timing.median >= 0.02


def test_what_is_slower_than_the_budget_is_not_repeated() -> None:
    calls = []
    timing = measure(lambda: calls.append(1), budget=1.0, first=65.0)
    assert timing == Timing(65.0, 65.0, 65.0, 1)
    assert calls == []


def test_several_calls_take_turns() -> None:
    order: list[str] = []
    quick, slow, once = measure_in_turn(
        [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")],
        repeats=6,
        budget=5.0,
        firsts=[0.0, 0.0, 6.0],
    )
    assert (quick.samples, slow.samples, once) == (6, 6, Timing(6.0, 6.0, 6.0, 1))
    # Three turns of a pass to warm up and two that count.
    assert "".join(order) == "aaabbb" * 3
