"""Past 2^31 elements, where 32-bit offsets wrap: what lies there is computed as if it lay at the start."""

from __future__ import annotations

import pytest
import torch

from longscan.ops import causal_conv1d, selective_scan
from longscan.ops.causal_conv1d import cases as conv_cases
from longscan.ops.selective_scan import cases as scan_cases

CHANNELS = 2048
LENGTH = 2**31 // CHANNELS + 3000
TAIL = 2500


def long_input(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, LENGTH, CHANNELS, generator=generator, device="cuda", dtype=torch.bfloat16)


def assert_same_tail(whole: torch.Tensor, tail: torch.Tensor) -> None:
    assert torch.allclose(whole[:, -TAIL:].float(), tail.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
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


@pytest.mark.gpu
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


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the rows of the batch 2^31 elements apart: memory in between is never touched."""
    assert tensor.shape[0] > 1
    step = 2**31 + 64
    storage = torch.empty(step * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype)
    far = storage.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride()))
    far.copy_(tensor)
    return far


def test_rows_that_far_apart_on_a_cpu() -> None:
    inputs = scan_cases.make_inputs(scan_cases.CASES[0], dtype=torch.bfloat16)
    inputs = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    far = inputs | {name: far_apart(inputs[name]).requires_grad_() for name in ("x", "dt")}
    near = inputs | {name: inputs[name].requires_grad_() for name in ("x", "dt")}
    for tensors in (far, near):
        selective_scan(**tensors, dt_softplus=True, backend="cpu").float().square().sum().backward()
    assert torch.equal(far["x"].grad, near["x"].grad)
    assert torch.equal(far["dt"].grad, near["dt"].grad)

    filters = conv_cases.make_inputs(conv_cases.CASES[0], dtype=torch.bfloat16)
    x, weight = filters["x"].detach().requires_grad_(), filters["weight"]
    apart = far_apart(x.detach()).requires_grad_()
    for tensor in (apart, x):
        causal_conv1d(tensor, weight, activation="silu", backend="cpu").float().square().sum().backward()
    assert torch.equal(apart.grad, x.grad)
