from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from longscan.bench import Settings, memory

SIZE, LOADS = (2, 64, 50), [(1, 8), (2, 8), (3, 8)]


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
    rows = memory.measure(name, SIZE, LOADS, "bfloat16", Settings())
    assert [row.group for row in rows] == [f"(2, 64, 50, {batch}, 8) bfloat16" for batch in (1, 2, 3)]
    for row in rows:
        assert (row.value, row.memory, row.timing) == (3.0, 3_000_000_000, None), row.note
    assert [row.place for row in rows] == [1, 2, 3]
    for loss, norm in meter:
        assert torch.isfinite(loss)
        assert norm > 0


def test_compiled_and_eager_take_the_same_steps(meter: list[Any]) -> None:
    for name in ("transformer++", "transformer++-compiled"):
        memory.measure(name, SIZE, LOADS, "float32", Settings())
    torch.testing.assert_close(meter[:3], meter[3:])


def test_no_room_for_one_batch_and_no_peer(monkeypatch: pytest.MonkeyPatch, meter: list[Any]) -> None:
    step = memory.Trainer.step

    def limited(self: memory.Trainer, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        if tokens.shape[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, tokens, targets)

    monkeypatch.setattr(memory.Trainer, "step", limited)
    rows = memory.measure("longscan", SIZE, LOADS, "bfloat16", Settings())
    assert [(row.value, row.note) for row in rows] == [(3.0, ""), (None, "out of memory"), (3.0, "")]
    assert memory.measure("mamba-ssm", SIZE, LOADS, "bfloat16", Settings()) == []
