"""From a continuous diagonal system ``h' = A h + B x`` to a discrete one ``h[t] = A_bar h[t-1] + B_bar x[t]``."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError

METHODS = ("zoh", "bilinear")


def discretise(A: Tensor, dt: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """Discretise a diagonal system with B = 1.

    ``zoh`` holds the input constant over a step, ``bilinear`` is the trapezoid rule (Gu et al. 2022, S4D, section 3.1):
    ``log A_bar = dt A``, ``B_bar = (exp(dt A) - 1) / A`` and ``A_bar = (1 + dt A / 2) / (1 - dt A / 2)``,
    ``B_bar = dt / (1 - dt A / 2)``.

    Args:
        A: (..., state) complex or real, real part negative.
        dt: (..., 1) or broadcastable to A: the step, positive.
        method: "zoh" or "bilinear".

    Returns:
        The logarithm of A_bar, from which every power of A_bar is exact, and B_bar; both (..., state).
    """
    if method == "zoh":
        log_A_bar = A * dt
        return log_A_bar, _expm1(log_A_bar) / A
    if method == "bilinear":
        half = A * dt / 2
        return torch.log1p(half) - torch.log1p(-half), dt / (1 - half)
    raise ArgumentError(f"method must be one of {', '.join(METHODS)}; got {method!r}")


def _expm1(x: Tensor) -> Tensor:
    if not x.is_complex():
        return torch.expm1(x)
    # exp(a + ib) - 1 without cancellation near 0; torch.expm1 does not take complex numbers on every device.
    real = torch.expm1(x.real) * torch.cos(x.imag) - 2 * torch.sin(x.imag / 2) ** 2
    return torch.complex(real, torch.exp(x.real) * torch.sin(x.imag))
