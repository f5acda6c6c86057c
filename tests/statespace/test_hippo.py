"""HiPPO's matrices, their normal-plus-low-rank forms, and dense discretisation, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.statespace import diagonal, discretise, discretise_dense, nplr, transition
from longscan.statespace.hippo import MEASURES

normalised = pytest.mark.parametrize("measure", [name for name in MEASURES if name != "lmu"])


def published(measure: str, size: int) -> tuple[list[list[float]], list[float]]:
    """The matrices entry by entry, as the papers write them, signs as in h' = A h + B u."""

    def entry(n: int, k: int) -> float:
        if measure == "legs":
            return -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1.0) if n == k else 0.0
        if measure == "legt":
            return -math.sqrt((2 * n + 1) * (2 * k + 1)) * (1 if k <= n else (-1) ** (n - k))
        if measure == "lmu":
            return (2 * n + 1.0) * (-1 if n < k else (-1) ** (n - k + 1))
        return -1.0 if n >= k else 0.0

    first = {"legs": lambda n: math.sqrt(2 * n + 1), "lmu": lambda n: (2 * n + 1.0) * (-1) ** n, "lagt": lambda n: 1.0}
    first["legt"] = first["legs"]
    return [[entry(n, k) for k in range(size)] for n in range(size)], [first[measure](n) for n in range(size)]


@pytest.mark.parametrize("measure", ["legs", "legt", "lmu", "lagt"])
def test_matrices_are_the_published_ones(measure: str) -> None:
    expected_A, expected_B = published(measure, 6)
    A, B = transition(measure, 6)
    torch.testing.assert_close(A, torch.tensor(expected_A, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor(expected_B, dtype=torch.float64))


def test_fourier_is_derived_from_its_basis() -> None:
    """Integration by parts: h_n' = g_n(0) u(t) - g_n(1) u(t - 1) + (g_n' in the basis), u(t - 1) = 2 sum - u(t)."""
    size, root = 6, math.sqrt(2)
    now = [1, 0, root, 0, root, 0]
    A = [[-2.0 * now[n] * now[k] for k in range(size)] for n in range(size)]
    for m in range(1, size // 2):
        A[2 * m][2 * m + 1] -= 2 * math.pi * m  # the cosine's derivative is minus a sine
        A[2 * m + 1][2 * m] += 2 * math.pi * m
    got_A, got_B = transition("fourier", size)
    torch.testing.assert_close(got_A, torch.tensor(A, dtype=torch.float64))
    torch.testing.assert_close(got_B, 2 * torch.tensor(now, dtype=torch.float64))


def test_lmu_is_legt_rescaled() -> None:
    n = torch.arange(8, dtype=torch.float64)
    scale = (-1) ** n * torch.sqrt(2 * n + 1)
    A, B = transition("legt", 8)
    lmu_A, lmu_B = transition("lmu", 8)
    torch.testing.assert_close(scale[:, None] * A / scale, lmu_A)
    torch.testing.assert_close(scale * B, lmu_B)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("size", [2, 8, 32])
def test_memories_are_stable(measure: str, size: int) -> None:
    A, _ = transition(measure, size)
    # LegS and LagT are triangular: their eigenvalues are known, and out of reach of a numerical solver.
    eigenvalues = A.diagonal() if measure in ("legs", "lagt") else torch.linalg.eigvals(A).real
    assert eigenvalues.max() < 1e-9


SIZES = [
    (name, size)
    for name in MEASURES
    if name != "lmu"
    for size in (1, 2, 5, 8, 64)
    if name != "fourier" or size % 2 == 0
]


@pytest.mark.parametrize(("measure", "size"), SIZES)
def test_normal_plus_low_rank_is_the_matrix(measure: str, size: int) -> None:
    A, B = transition(measure, size)
    w, P, B_own, V = nplr(measure, size)
    assert P.shape == (size, 2 if measure == "legt" else 1)

    def same(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other.to(torch.complex128), rtol=1e-12, atol=1e-12 * size**2)

    same(V @ (torch.diag(w) - P @ P.mH) @ V.mH, A)
    same(V @ B_own, B)
    same(V.mH @ V, torch.eye(size))
    half = size // 2
    for part in (w, P, B_own, V.T):
        torch.testing.assert_close(part[half : 2 * half], part[:half].conj(), rtol=0, atol=1e-12 * size)
        if size % 2:
            assert part[-1].imag.abs().max() == 0
    assert (w[:half].imag.diff() > 0).all()
    assert (w[:half].imag >= 0).all()


@normalised
def test_half_of_the_states_gives_the_kernel(measure: str) -> None:
    """C exp(t A) B from the first half alone, twice the real part, for a real C."""
    A, B = transition(measure, 8)
    w, P, B_own, V = nplr(measure, 8)
    C = torch.linspace(1, 2, 8, dtype=torch.float64)
    time = 0.3
    exponential = torch.linalg.matrix_exp(time * (torch.diag(w) - P @ P.mH))
    own = (V.T @ C.to(V.dtype))[:4] @ (exponential @ B_own)[:4]
    torch.testing.assert_close(2 * own.real, C @ torch.linalg.matrix_exp(time * A) @ B)


METHODS = [
    ("euler", None, 1),
    ("backward_euler", None, 1),
    ("bilinear", None, 2),
    ("gbt", 0.25, 1),
    ("zoh", None, None),
]


@pytest.mark.parametrize(("method", "alpha", "order"), METHODS)
def test_dense_discretisation_converges(method: str, alpha: float | None, order: int | None) -> None:
    """A constant input for a time of 1: the order of each method, and no error at all with a hold."""
    A, B = transition("legs", 4)
    exact = torch.linalg.solve(A, (torch.linalg.matrix_exp(A) - torch.eye(4, dtype=torch.float64)) @ B)
    errors = []
    for steps in (200, 400):
        A_bar, B_bar = discretise_dense(A, B, 1 / steps, method, alpha=alpha)
        h = torch.zeros(4, dtype=torch.float64)
        for _ in range(steps):
            h = A_bar @ h + B_bar
        errors.append((h - exact).abs().max().item())
    if order is None:
        assert max(errors) < 1e-11
    else:
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_named_methods_are_generalised_bilinear_ones() -> None:
    A, B = transition("legt", 5)
    for name, alpha in (("euler", 0.0), ("bilinear", 0.5), ("backward_euler", 1.0)):
        for one, other in zip(
            discretise_dense(A, B, 0.1, name), discretise_dense(A, B, 0.1, "gbt", alpha=alpha), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_dense_and_diagonal_discretisation_agree(method: str) -> None:
    A = diagonal("s4d-lin", 4)
    dt = torch.tensor([0.01, 0.1], dtype=torch.float64)
    log_A_bar, B_bar = discretise(A, dt[:, None], method)
    dense_A, dense_B = discretise_dense(torch.diag(A), torch.ones_like(A), dt, method)
    torch.testing.assert_close(dense_A, torch.diag_embed(log_A_bar.exp()))
    torch.testing.assert_close(dense_B, B_bar)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_dense_discretisation_has_gradients(method: str) -> None:
    A, B = (part.requires_grad_() for part in transition("legs", 3))
    dt = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *values: discretise_dense(*values, method), (A, B, dt))


def test_what_goes_wrong_is_said() -> None:
    A, B = transition("legs", 4)
    for call, words in (
        (lambda: transition("chebyshev", 4), "legs, legt"),
        (lambda: transition("legs", 0), "at least 1"),
        (lambda: transition("fourier", 5), "even"),
        (lambda: nplr("lmu", 4), "'legt'"),
        (lambda: nplr("legs", 0), "at least 1"),
        (lambda: discretise_dense(A, B, 0.1, "heun"), "zoh, euler"),
        (lambda: discretise_dense(A, B, 0.1, "gbt"), "alpha"),
        (lambda: discretise_dense(A, B, 0.1, "gbt", alpha=1.5), "between 0 and 1"),
        (lambda: discretise_dense(A, B, 0.1, "euler", alpha=0.5), "alpha"),
        (lambda: discretise_dense(A, B.float(), 0.1), "one dtype"),
        (lambda: discretise_dense(A, B[:3], 0.1), r"\(3,\)"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
