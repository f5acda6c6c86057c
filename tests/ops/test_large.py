"""Past 2^31 elements, where 32-bit offsets wrap: the end of a long sequence is what its steps give on their own."""

from __future__ import annotations

import pytest
import torch

from longscan.ops import causal_conv1d, selective_scan

pytestmark = pytest.mark.gpu

CHANNELS = 2048
LENGTH = 2**31 // CHANNELS + 3000
TAIL = 2500


def long_input(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, LENGTH, CHANNELS, generator=generator, device="cuda", dtype=torch.bfloat16)


def assert_same_tail(whole: torch.Tensor, tail: torch.Tensor) -> None:
    assert torch.allclose(whole[:, -TAIL:].float(), tail.float(), rtol=2e-2, atol=2e-2)


def test_scan_and_its_gradients() -> None:
    x, dt = long_input(0).requires_grad_(), long_input(1)
    narrow = torch.Generator("cuda").manual_seed(2)
    A = -torch.rand(CHANNELS, 16, generator=narrow, device="cuda") - 0.5
    B, C = torch.randn(2, 1, LENGTH, 16, generator=narrow, device="cuda", dtype=torch.bfloat16).unbind(0)
    y = selective_scan(x, dt, A, B, C, dt_softplus=True)
    y[:, -TAIL:].float().sum().backward()
    with torch.no_grad():
        cut = LENGTH - TAIL
        _, state = selective_scan(
            x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], dt_softplus=True, return_final_state=True
        )
    tail = x.detach()[:, cut:].clone().requires_grad_()
    y_tail = selective_scan(tail, dt[:, cut:], A, B[:, cut:], C[:, cut:], initial_state=state, dt_softplus=True)
    y_tail.float().sum().backward()
    assert_same_tail(y.detach(), y_tail.detach())
    assert_same_tail(x.grad, tail.grad)
    # What came before the tail reaches it through the state.
    assert x.grad[:, cut - 1].abs().max() > 0


def test_convolution_and_its_gradients() -> None:
    x = long_input(0).requires_grad_()
    weight = torch.randn(CHANNELS, 4, device="cuda")
    y = causal_conv1d(x, weight, activation="silu")
    y[:, -TAIL:].float().sum().backward()
    cut = LENGTH - TAIL
    tail = x.detach()[:, cut:].clone().requires_grad_()
    state = x.detach()[:, cut - 3 : cut].clone()
    y_tail = causal_conv1d(tail, weight, initial_state=state, activation="silu")
    y_tail.float().sum().backward()
    assert_same_tail(y.detach(), y_tail.detach())
    assert_same_tail(x.grad, tail.grad)
