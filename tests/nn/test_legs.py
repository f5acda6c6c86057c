"""Steps of HiPPO-LegS by blocks against the dense system, solved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.nn.legs import block_size, legs_steps, numbers
from longscan.statespace import discretise_dense, transition


def dense(m: Tensor, u: Tensor, time: int, alpha: float) -> Tensor:
    A_bar, B_bar = discretise_dense(*transition("legs", m.shape[-1]), 1 / time, "gbt", alpha=alpha)
    return m @ A_bar.T + u[..., None] * B_bar


@pytest.mark.parametrize("order", [1, 2, 7, 12, 64, 66, 72])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_blocks_are_the_dense_system(order: int, alpha: float) -> None:
    """At a common age and at ages of their own, forward and backward."""
    torch.manual_seed(0)
    m, u = torch.randn(3, 2, order, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for clock in (torch.tensor([0]), torch.tensor([0, 5, 10_000])):
        for number, step in enumerate(legs_steps(order, clock, 3, alpha, m.dtype), start=1):
            given = m.clone().requires_grad_(), u.clone().requires_grad_()
            ages = (clock + number).expand(3).tolist()
            expected = torch.stack([dense(*row, age, alpha) for *row, age in zip(*given, ages, strict=True)])
            torch.testing.assert_close(step.ahead(m, u), expected)
            gradient = torch.randn_like(m)
            for found, own in zip(step.back(gradient), torch.autograd.grad(expected, given, gradient), strict=True):
                torch.testing.assert_close(found, own)


def test_float32_keeps_its_digits() -> None:
    """Where a triangular solver in float32 loses three of them."""
    m, u = torch.randn(1, 1, 256, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64)
    for time, step in enumerate(legs_steps(256, torch.tensor([0]), 40, 0.5, torch.float32), start=1):
        expected = dense(m, u, time, 0.5)
        error = (step.ahead(m.float(), u.float()) - expected).abs().max() / expected.abs().max()
        assert error < 2e-6, time


def test_blocks_divide_the_order() -> None:
    assert [block_size(order) for order in (1, 64, 66, 72, 1024)] == [1, 64, 6, 8, 32]
    step = legs_steps(72, torch.tensor([0]), 1, 0.5, torch.float64)[0]
    assert numbers(72) == sum(tensor.numel() for tensor in step)
