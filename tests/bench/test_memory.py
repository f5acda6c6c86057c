from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from longscan.bench import Settings, memory
from longscan.bench.train import training_step

SHAPE = (2, 64, 50, 2, 8)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Only a GPU has an allocator to ask: here the steps are taken, and the answer is made up."""
    calls: list[Any] = []

    def timed_with_memory(call: Any, device: str, before: int) -> tuple[float, int]:
        calls.append(call())
        return 0.1, 3_000_000_000

    monkeypatch.setattr(memory, "timed_with_memory", timed_with_memory)
    # The compiler proper needs one for C++; tracing is what could go wrong in us.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    return calls


@pytest.mark.parametrize("name", ["longscan", "transformer++", "transformer++-compiled"])
def test_a_second_step_is_measured(name: str, meter: list[Any]) -> None:
    (row,) = memory.measure(name, SHAPE, "bfloat16", Settings())
    assert (row.value, row.memory, row.place, row.timing) == (3.0, 3_000_000_000, 2, None), row.note
    (loss, norm) = meter[0]
    assert torch.isfinite(loss)
    assert norm > 0


def test_compiled_and_eager_take_the_same_step(meter: list[Any]) -> None:
    for name in ("transformer++", "transformer++-compiled"):
        memory.measure(name, SHAPE, "float32", Settings())
    torch.testing.assert_close(meter[0], meter[1])


def test_no_room_and_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "training_step", full)
    (row,) = memory.measure("longscan", SHAPE, "bfloat16", Settings())
    assert (row.value, row.note) == (None, "out of memory")
    assert memory.measure("mamba-ssm", SHAPE, "bfloat16", Settings()) == []
    assert training_step is not full
