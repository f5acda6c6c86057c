r"""HiPPO: matrices of memories ``h' = A h + B u`` whose state holds the coefficients of the past in a basis.

With the measures of Gu, Dao, Ermon, Rudra and Re 2020 (arXiv 2008.07669; "HiPPO"), of Voelker, Kajic and Eliasmith 2019
("LMU"), and of Gu, Johnson, Timalsina, Rudra and Re 2022 (arXiv 2206.12037; "HTTYH"), and s the time ago:

============  ==========================================  =============================================================
``legs``      all of the past, evenly (HiPPO theorem 2)   u(t - s) = sum_n h_n sqrt(2n + 1) P_n(1 - 2 s / t)
``legt``      a window of length 1, evenly (theorem 1)    u(t - s) = sum_n h_n sqrt(2n + 1) P_n(1 - 2 s)
``lmu``       the same window (LMU equations 1 to 3)      u(t - s) = sum_n h_n P_n(2 s - 1)
``lagt``      exp(-s) (HiPPO appendix D.2)                u(t - s) = sum_n h_n L_n(s)
``fourier``   a window of length 1, evenly (HTTYH)        u(t - s) = sum_m sqrt(2) (h_2m cos + h_2m+1 sin)(2 pi m s)
============  ==========================================  =============================================================

Another window is another unit of time: divide A and B by its length. LegS proper divides by the time that has passed,
``h' = (A h + B u) / t``; without the division it remembers in exponentially stretched time, ``P_n(2 exp(-s) - 1)``.

The LMU's matrices are those of the Pade approximant of a delay, and a rescaling of LegT's: its h_n is
``(-1)^n sqrt(2n + 1)`` times theirs. In the Fourier basis m = 0 has 1 for its cosine; its sine is 0 and so is that
state, which keeps the states in pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longscan.errors import ArgumentError

MEASURES = ("legs", "legt", "lmu", "lagt", "fourier")


def transition(measure: str, size: int) -> tuple[Tensor, Tensor]:
    """The matrices of ``h' = A h + B u``.

    Args:
        measure: "legs", "legt", "lmu", "lagt" or "fourier", see above.
        size: N, the order of the memory; even for "fourier".

    Returns:
        A (N, N) and B (N,), float64. Every eigenvalue of A has a real part of at most 0.

    Raises:
        ArgumentError: the measure is unknown, or the size is not a positive integer, or odd for "fourier".
    """
    check_measure(measure, size)
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    outer = root[:, None] * root
    sign = 1 - 2 * (n % 2)
    if measure == "legs":
        return -torch.tril(outer, -1) - torch.diag(n + 1), root
    if measure == "legt":
        return -torch.tril(outer) - torch.triu(outer * sign[:, None] * sign, 1), root
    if measure == "lmu":
        alternating = -torch.tril(sign[:, None] * sign) - torch.triu(torch.ones_like(outer), 1)
        return (2 * n + 1)[:, None] * alternating, (2 * n + 1) * sign
    if measure == "lagt":
        return -torch.tril(torch.ones_like(outer)), torch.ones_like(n)
    now = fourier_now(size)
    turn = torch.zeros_like(outer)
    even = torch.arange(0, size, 2)
    turn[even + 1, even] = math.pi * n[even]
    turn[even, even + 1] = -math.pi * n[even]
    # The window's other end is not kept: a periodic sum is the mean of both ends, and so tells it from u(t).
    return turn - 2 * now[:, None] * now, 2 * now


def fourier_now(size: int) -> Tensor:
    """The Fourier basis at the present, s = 0: (size,) float64."""
    now = torch.zeros(size, dtype=torch.float64)
    now[::2] = math.sqrt(2)
    now[0] = 1
    return now


def check_measure(measure: str, size: int) -> None:
    """Raise ArgumentError unless there is such a memory."""
    if measure not in MEASURES:
        raise ArgumentError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
    if not isinstance(size, int) or size < 1:
        raise ArgumentError(f"size must be an integer of at least 1, got {size!r}")
    if measure == "fourier" and size % 2:
        raise ArgumentError(f"size must be even for the Fourier measure, a sine for every cosine; got {size}")
