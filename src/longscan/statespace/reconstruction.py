r"""Online function approximation: a signal goes by sample by sample, a few coefficients of its past are kept.

Gu et al. 2020 (HiPPO, arXiv 2008.07669); bases and measures are those of :mod:`longscan.statespace.hippo`. Samples are
a unit of time apart and held for that unit.

What is lost is known for LegS. The memory of held samples by ``zoh`` is their exact projection. For a signal with
slopes of at most L, integration by parts of a coefficient (``(2n + 1) P_n`` is the derivative of P_n+1 - P_n-1) gives
it from the slope's two neighbouring ones, and so, with Bessel's inequality, the root mean square over the past of all
that N coefficients leave out. Holding the samples adds at most L:

.. math:: \mathrm{error} \le \frac{t L}{\sqrt{4 N^2 - 1}} + L
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.statespace.discretisation import ALPHAS, DENSE_METHODS, discretise_dense
from longscan.statespace.hippo import check_measure, transition


def basis(measure: str, size: int, ago: Tensor) -> Tensor:
    """The basis functions that coefficients multiply.

    Args:
        measure, size: as for :func:`longscan.statespace.transition`.
        ago: (...) real, the time ago: in windows for "legt", "lmu" and "fourier" (0 to 1), as a share of the time that
            has passed for "legs" (0 to 1), in time constants for "lagt" (from 0).

    Returns:
        (..., size) float64.
    """
    check_measure(measure, size)
    s = ago.to(torch.float64)
    if measure == "fourier":
        angle = 2 * math.pi * s[..., None] * torch.arange(size // 2, dtype=torch.float64, device=s.device)
        values = math.sqrt(2) * torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2)
        return torch.cat((torch.ones_like(values[..., :1]), values[..., 1:]), dim=-1)
    if measure == "lagt":
        return _polynomials(size, lambda n: ((2 * n + 1 - s) / (n + 1), -n / (n + 1)), torch.ones_like(s))
    x = 2 * s - 1 if measure == "lmu" else 1 - 2 * s
    values = _polynomials(size, lambda n: ((2 * n + 1) / (n + 1) * x, -n / (n + 1)), torch.ones_like(x))
    if measure == "lmu":
        return values
    return values * torch.sqrt(2 * torch.arange(size, dtype=torch.float64, device=s.device) + 1)


def memorise(signal: Tensor, measure: str, size: int, *, window: float | None = None, method: str = "zoh") -> Tensor:
    """The coefficients of the past after every sample, by the recurrence.

    "legs" follows ``h' = (A h + B u) / t`` from t = 0: step k is one of 1/k of the system without the division, as in
    the paper, and "zoh" is exact. The others forget at their measure's rate.

    Args:
        signal: (..., length) real, sample k held from time k - 1 to k.
        measure, size: as for :func:`longscan.statespace.transition`.
        window: for all but "legs": the window's length (time constant, of "lagt") in samples.
        method: of :func:`longscan.statespace.discretise_dense`; "gbt" is left out.

    Returns:
        (..., length, size) float64.

    Raises:
        ArgumentError: a window for "legs", none or one not positive for another measure, or an unknown method.
    """
    if method not in DENSE_METHODS or method == "gbt":
        raise ArgumentError(f"method must be one of zoh, {', '.join(ALPHAS)}; got {method!r}")
    if (window is None) != (measure == "legs") or (window is not None and not window > 0):
        raise ArgumentError(
            f"window must be a positive number of samples, and None for 'legs'; got {window!r} for {measure!r}"
        )
    A, B = (part.to(signal.device) for part in transition(measure, size))
    fixed = None if window is None else discretise_dense(A, B, 1 / window, method)
    state = signal.new_zeros((*signal.shape[:-1], size), dtype=torch.float64)
    states = []
    for place, sample in enumerate(signal.to(torch.float64).unbind(-1)):
        A_bar, B_bar = fixed or _legs_step(A, B, place + 1, method)
        state = state @ A_bar.mT + sample[..., None] * B_bar
        states.append(state)
    return torch.stack(states, dim=-2)


def reconstruct(coefficients: Tensor, measure: str, ago: Tensor) -> Tensor:
    """The past from coefficients (..., size): values (..., points) at times ago (points,), as in :func:`basis`."""
    return coefficients @ basis(measure, coefficients.shape[-1], ago).to(coefficients).mT


def project(function: Callable[[Tensor], Tensor], measure: str, size: int, *, pieces: int = 1) -> Tensor:
    """The exact coefficients of a known past, by Gauss quadrature: what :func:`memorise` approximates online.

    Args:
        function: takes times ago (points,) as in :func:`basis`, gives values (..., points), float64.
        measure, size: as for :func:`longscan.statespace.transition`.
        pieces: a window is cut into this many equal parts, each with a rule of its own, for functions with corners at
            their borders. "lagt" has no window, and one rule.

    Returns:
        (..., size) float64.

    Raises:
        ArgumentError: pieces is below 1, or not 1 for "lagt".
    """
    if pieces < 1 or (measure == "lagt" and pieces > 1):
        raise ArgumentError(f"pieces must be at least 1, and 1 for 'lagt'; got {pieces} for {measure!r}")
    check_measure(measure, size)
    if measure == "lagt":
        # More nodes than this overflow.
        places, weights = (torch.from_numpy(part) for part in np.polynomial.laguerre.laggauss(min(2 * size + 32, 180)))
    else:
        nodes, own = (
            torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(max(8, 2 * size // pieces + 8))
        )
        places = ((nodes + 1) / 2 + torch.arange(pieces, dtype=torch.float64)[:, None]).flatten() / pieces
        weights = (own / (2 * pieces)).repeat(pieces)
    values = basis(measure, size, places)
    if measure == "lmu":  # orthogonal, not normalised
        values = values * (2 * torch.arange(size, dtype=torch.float64) + 1)
    return (function(places) * weights) @ values


def lipschitz_bound(size: int, slope: float, time: float) -> float:
    """The most that LegS of N coefficients, by zero-order hold, can be wrong: root mean square over the past.

    Args:
        size: N.
        slope: the largest slope of the signal, per sample.
        time: samples that have passed.
    """
    return time * slope / math.sqrt(4 * size**2 - 1) + slope


def _legs_step(A: Tensor, B: Tensor, place: int, method: str) -> tuple[Tensor, Tensor]:
    if method != "zoh":
        return discretise_dense(A, B, 1 / place, method)
    if place == 1:
        # All of the past is this sample: the first coefficient is its value, the others are 0.
        return torch.zeros_like(A), torch.nn.functional.one_hot(torch.tensor(0), len(B)).to(B)
    return discretise_dense(A, B, math.log(place / (place - 1)), "zoh")


def _polynomials(size: int, factors: Callable[[int], tuple[Tensor, float]], first: Tensor) -> Tensor:
    """p_0 = 1, ``p_n+1 = a_n p_n + b_n p_n-1`` for (a_n, b_n) = factors(n): (..., size)."""
    values = [torch.zeros_like(first), first]
    for n in range(size - 1):
        a, b = factors(n)
        values.append(a * values[-1] + b * values[-2])
    return torch.stack(values[1:], dim=-1)
