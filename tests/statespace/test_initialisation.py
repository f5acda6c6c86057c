"""Initialisations against the matrices they come from."""

from __future__ import annotations

import math

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.statespace import diagonal, discretise, log_uniform_steps


def test_legs_is_the_diagonal_of_hippos_normal_part() -> None:
    order = 8
    hippo = torch.zeros(order, order, dtype=torch.float64)
    for n in range(order):
        for k in range(order):
            hippo[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else (-(n + 1.0) if n == k else 0.0)
    low_rank = torch.sqrt(torch.arange(order, dtype=torch.float64) + 0.5)
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(low_rank, low_rank))
    expected = eigenvalues[eigenvalues.imag > 0]
    expected = expected[expected.imag.argsort()]
    torch.testing.assert_close(diagonal("s4d-legs", order // 2), expected, rtol=1e-9, atol=1e-9)


def test_dss_is_the_skew_hippo_matrix() -> None:
    """Gupta, Gu and Berant 2022 (arXiv 2203.14343), the matrix that DSS's eigenvalues are those of."""
    order = 6
    root = torch.sqrt(2 * torch.arange(order, dtype=torch.float64) + 1)
    outer = root[:, None] * root / 2
    skew = torch.triu(outer, 1) - torch.tril(outer, -1) - torch.eye(order, dtype=torch.float64) / 2
    eigenvalues = torch.linalg.eigvals(skew)
    expected = eigenvalues[eigenvalues.imag > 0]
    torch.testing.assert_close(diagonal("dss", 3), expected[expected.imag.argsort()], rtol=1e-9, atol=1e-9)


def test_the_written_formulas() -> None:
    n = torch.arange(4, dtype=torch.float64)
    half = torch.full((4,), -0.5, dtype=torch.float64)
    torch.testing.assert_close(diagonal("s4d-lin", 4), torch.complex(half, math.pi * n))
    torch.testing.assert_close(diagonal("s4d-inv", 4), torch.complex(half, 8 / math.pi * (8 / (2 * n + 1) - 1)))
    torch.testing.assert_close(diagonal("s4d-real", 4).real, -(n + 1))
    with pytest.raises(ArgumentError, match="s4d-legs"):
        diagonal("legs", 4)


@pytest.mark.parametrize(("method", "order"), [("zoh", None), ("bilinear", 2)])
def test_discretisation_converges_to_the_continuous_system(method: str, order: int | None) -> None:
    """One step of h' = A h + 1 from 0: bilinear is of second order, zero-order hold exact for a constant input."""
    A, errors = torch.tensor([-0.5 + 2j], dtype=torch.complex128), []
    for steps in (20, 40):
        log_A_bar, B_bar = discretise(A, torch.tensor([1 / steps], dtype=torch.float64), method)
        h = torch.zeros(1, dtype=torch.complex128)
        for _ in range(steps):
            h = log_A_bar.exp() * h + B_bar
        errors.append((h - (A.exp() - 1) / A).abs().item())
    if order is None:
        assert max(errors) < 1e-12
    else:
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_small_steps_do_not_cancel() -> None:
    A = torch.tensor([-1e-4 + 1e-4j], dtype=torch.complex64)
    _, B_bar = discretise(A, torch.tensor([1e-3]))
    torch.testing.assert_close(B_bar.real, torch.tensor([1e-3]), rtol=1e-6, atol=0)
    _, real = discretise(torch.tensor([-1e-4]), torch.tensor([1e-3]))
    torch.testing.assert_close(real, torch.tensor([1e-3]), rtol=1e-6, atol=0)
    with pytest.raises(ArgumentError, match="zoh, bilinear"):
        discretise(A, torch.tensor([1e-3]), "euler")


def test_steps() -> None:
    torch.manual_seed(0)
    steps = log_uniform_steps(1000, 0.01, 1.0)
    assert steps.min() >= math.log(0.01)
    assert steps.max() <= 0
    with pytest.raises(ArgumentError):
        log_uniform_steps(3, 1.0, 0.1)
