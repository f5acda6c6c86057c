"""Online memories against exact projections by quadrature, and against what is known of their errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.statespace.hippo import MEASURES
from longscan.statespace.reconstruction import basis, lipschitz_bound, memorise, project, reconstruct


def smooth(time: Tensor) -> Tensor:
    """A signal of slow waves, time in samples; slopes of at most 0.0475."""
    return torch.sin(time / 40) + 0.5 * torch.cos(time / 23 + 1) + 0.001 * time.mul(0.03).sin()


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("measure", MEASURES)
def test_the_basis_is_orthonormal_under_its_measure(measure: str) -> None:
    size = 6
    gram = project(lambda ago: basis(measure, size, ago).T, measure, size)
    expected = torch.eye(size, dtype=torch.float64)
    if measure == "fourier":
        expected[1, 1] = 0  # the sine of frequency 0
    torch.testing.assert_close(gram, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", ["legs", "legt", "lmu"])
def test_polynomials_come_back_exactly(measure: str) -> None:
    def cubic(ago: Tensor) -> Tensor:
        return 1 - ago + 3 * ago**3

    ago = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(reconstruct(project(cubic, measure, 4), measure, ago), cubic(ago))


@pytest.mark.parametrize("length", [1, 2, 40])
def test_legs_with_hold_is_the_exact_projection_of_held_samples(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(length, dtype=torch.float64, generator=generator)
    exact = project(lambda ago: samples[((1 - ago) * length).long()], "legs", 12, pieces=length)
    torch.testing.assert_close(memorise(samples, "legs", 12)[-1], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["bilinear", "backward_euler"])
def test_legs_by_other_methods_comes_near_the_exact_projection(method: str) -> None:
    """At a rate of 1/t, as the samples of one past get finer."""
    errors = []
    for length in (200, 400):
        scale = 200 / length
        samples = smooth(scale * (torch.arange(length, dtype=torch.float64) + 0.5))
        exact = project(lambda ago: smooth(200 * (1 - ago)), "legs", 6)
        errors.append((memorise(samples, "legs", 6, method=method)[-1] - exact).abs().max().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] > 1.7


@pytest.mark.parametrize("size", [2, 8, 32])
def test_the_error_of_legs_is_within_its_bound(size: int) -> None:
    """A triangle wave, the hardest signal of its slope, which comes within a small factor of the bound."""
    time = 256
    samples = torch.arange(time, dtype=torch.float64)
    samples = 1 - (samples % 64 - 32).abs() / 32
    ago = (torch.arange(8 * time, dtype=torch.float64) + 0.5) / (8 * time)
    exact = 1 - ((time * (1 - ago)) % 64 - 32).abs() / 32
    error = rms(reconstruct(memorise(samples, "legs", size)[-1], "legs", ago) - exact)
    bound = lipschitz_bound(size, 1 / 32, time)
    assert bound / 20 < error < bound


def test_scale_of_time_does_not_matter_to_legs() -> None:
    """Every sample twice: the same coefficients (HiPPO, proposition 3)."""
    samples = smooth(torch.arange(100, dtype=torch.float64))
    slow = samples.repeat_interleave(2)
    torch.testing.assert_close(memorise(slow, "legs", 8)[1::2], memorise(samples, "legs", 8), rtol=1e-8, atol=1e-10)


WINDOWS = [("legt", 1e-3, 1e-4), ("lmu", 1e-3, 1e-4), ("fourier", 0.2, 0.02)]


@pytest.mark.parametrize(("measure", "error", "left"), WINDOWS)
def test_windows_forget_what_has_left_them(measure: str, error: float, left: float) -> None:
    """The reconstruction of a window is close, and the same whatever came before it."""
    window, length = 100, 500
    time = torch.arange(length, dtype=torch.float64) + 0.5
    samples = torch.stack((smooth(time), torch.where(time < 150, torch.ones_like(time), smooth(time))))
    ago = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    found = reconstruct(memorise(samples, measure, 12, window=window)[:, -1], measure, ago)
    assert (found[0] - smooth(length - window * ago)).abs().max() < error
    assert (found[0] - found[1]).abs().max() < left


@pytest.mark.parametrize("measure", ["legt", "lmu"])
def test_a_window_comes_near_its_exact_projection_with_order(measure: str) -> None:
    """A window's far end is estimated from the coefficients themselves: the error falls with their number."""
    window, length = 200, 800
    samples = smooth(torch.arange(length, dtype=torch.float64) + 0.5)
    errors = []
    for size in (4, 7, 10):
        exact = project(lambda ago: smooth(length - window * ago), measure, size)
        errors.append(rms(memorise(samples, measure, size, window=window)[-1] - exact))
    assert errors[0] > 5 * errors[1] > 50 * errors[2]
    assert errors[2] < 1e-3


def test_lagt_is_its_exact_projection() -> None:
    """Nothing is cut off, so only the hold differs from the integral."""
    constant, length = 30.0, 1500
    time = torch.arange(length, dtype=torch.float64) + 0.5
    exact = project(lambda ago: smooth(length - constant * ago), "lagt", 6)
    errors = (memorise(smooth(time), "lagt", 6, window=constant)[-1] - exact).abs()
    assert errors.max() < 1e-3


def test_what_goes_wrong_is_said() -> None:
    signal = torch.ones(3)
    for call, words in (
        (lambda: memorise(signal, "legs", 4, window=3), "None for 'legs'"),
        (lambda: memorise(signal, "legt", 4), "window"),
        (lambda: memorise(signal, "legt", 4, window=0), "window"),
        (lambda: memorise(signal, "legt", 4, window=9, method="gbt"), "zoh, euler"),
        (lambda: project(torch.sin, "lagt", 4, pieces=2), "pieces"),
        (lambda: basis("legs", 0, signal), "at least 1"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
    assert math.isfinite(lipschitz_bound(1, 1.0, 1.0))
