"""What stands beside the scan: attention, a long convolution, and the scan unfused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longscan.bench import others, scan, unfused
from longscan.ops import selective_scan

SHAPE = (2, 7, 128, 4)


@given(length=st.integers(1, 33), seed=st.integers(0, 99))
def test_parallel_scan_is_the_recurrence(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decays, inputs = (torch.rand(2, length, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    state, states = torch.zeros_like(inputs[:, 0]), []
    for t in range(length):
        state = decays[:, t] * state + inputs[:, t]
        states.append(state)
    torch.testing.assert_close(unfused.parallel_scan(decays, inputs), torch.stack(states, 1))


def test_unfused_is_the_scan_with_its_gradients() -> None:
    inputs = scan.make_inputs((2, 13, 6, 4), torch.float64, "cpu", seed=0)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    call, own = unfused.scan(leaves)
    truth = selective_scan(*leaves.values(), dt_softplus=True, backend="reference")
    assert isinstance(truth, torch.Tensor)
    torch.testing.assert_close(call(), truth)
    weights = torch.randn_like(truth)
    for found, expected in zip(
        torch.autograd.grad(call(), own, weights),
        torch.autograd.grad(truth, list(leaves.values()), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_unfused_does_not_ask_a_cpu_for_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = scan.make_inputs((1, 100, 100, 16), torch.float32, "cpu", seed=0)
    monkeypatch.setattr("longscan.diagnostics.machine.physical_memory", lambda: 10**6)
    with pytest.raises(MemoryError):
        unfused.scan(inputs)


def test_long_convolution_is_causal_and_by_channel() -> None:
    inputs, kernel = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    truth = torch.stack([(kernel[:, : t + 1].flip(-1) * inputs[..., : t + 1]).sum(-1) for t in range(9)], -1)
    torch.testing.assert_close(others.long_convolution(inputs, kernel), truth)


@pytest.mark.parametrize("phase", ["forward", "backward", "forward and backward"])
def test_passes_give_outputs_or_gradients(phase: str) -> None:
    attention = others.attention(SHAPE, torch.float32, "cpu", phase)
    convolution = others.convolution(SHAPE, "cpu", phase)
    for _ in range(2):  # a backward pass can be repeated
        found = [tuple(tensor.shape) for tensor in attention()]
        assert found == [(2, 2, 7, 64)] * (1 if phase == "forward" else 3)
        found = [tuple(tensor.shape) for tensor in convolution()]
        assert found == ([(2, 128, 7)] if phase == "forward" else [(2, 128, 7), (128, 7)])
    assert attention.backend is not None
    assert attention.note == f"{others.backend_name(attention.backend)}, float32"


def test_attention_is_in_half_precision_on_accelerators() -> None:
    assert others.attention_dtype("cuda", torch.float32) == torch.bfloat16
    assert others.attention_dtype("cuda", torch.float16) == torch.float16
    assert others.attention_dtype("cpu", torch.float32) == torch.float32
    assert (others.head_width(128), others.head_width(24)) == (64, 24)


def test_bytes_and_work_of_both_directions_add_up() -> None:
    inputs = scan.make_inputs(SHAPE, torch.bfloat16, "cpu", seed=0)
    counts = [
        lambda phase: scan.bytes_moved(inputs, phase),
        lambda phase: others.attention_moved(SHAPE, torch.bfloat16, "cpu", phase),
        lambda phase: others.attention_work(SHAPE, phase),
        lambda phase: others.convolution_moved(SHAPE, phase),
    ]
    for count in counts:
        assert count("forward") + count("backward") == count("forward and backward")
    # x, dt, z and y in two bytes, B and C in two, A, D and the bias in four.
    assert scan.bytes_moved(inputs, "forward") == 2 * 4 * 14 * 128 + 2 * 2 * 14 * 4 + 4 * 128 * (4 + 2)
    assert others.attention_work((1, 4, 64), "forward") == 2 * 64 * 16 / 2
