"""From a continuous system ``h' = A h + B x`` to a discrete one ``h[t] = A_bar h[t-1] + B_bar x[t]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError

METHODS = ("zoh", "bilinear")

#: Of dense systems: zero-order hold, and the share of the step's end in the slope, which the others differ by.
ALPHAS = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}
DENSE_METHODS = ("zoh", *ALPHAS, "gbt")


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


def discretise_dense(
    A: Tensor, B: Tensor, dt: Tensor | float, method: str = "bilinear", *, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Discretise a dense system.

    ``zoh`` is exact for an input that is constant over a step. The others are the generalised bilinear transform (Zhang
    et al. 2007, as in Gu et al. 2021, LSSL, arXiv 2110.13985, equation 3): ``A_bar = (1 - a dt A)^-1 (1 + (1 - a) dt
    A)``, ``B_bar = (1 - a dt A)^-1 dt B``, with a = 0 "euler", 1/2 "bilinear", 1 "backward_euler", any other "gbt".

    Args:
        A: (..., N, N), B (..., N), real or complex, of one dtype, which everything is computed in; float64 is advised.
        dt: the step, a number, or a tensor of the shape of the leading axes; these broadcast.
        method: "zoh", "euler", "bilinear", "backward_euler", or "gbt".
        alpha: a of "gbt", from 0 to 1.

    Returns:
        A_bar (..., N, N) and B_bar (..., N). Gradients flow to A, B and dt.

    Raises:
        ArgumentError: the method is unknown, or alpha is missing, out of range, or given to a method that has its own.
    """
    if method not in DENSE_METHODS:
        raise ArgumentError(f"method must be one of {', '.join(DENSE_METHODS)}; got {method!r}")
    if (alpha is None) != (method != "gbt"):
        raise ArgumentError(
            f"alpha belongs to method 'gbt' alone, and must be given there; got {alpha!r} for {method!r}"
        )
    if A.shape[-1] != A.shape[-2] or B.shape[-1:] != A.shape[-1:] or A.dtype != B.dtype:
        raise ArgumentError(
            f"A must be (..., N, N) and B (..., N) of one dtype; got {A.dtype} of shape {tuple(A.shape)} and {B.dtype} "
            f"of shape {tuple(B.shape)}"
        )
    step = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)[..., None, None]
    scaled, column = A * step, B[..., None] * step
    if method == "zoh":
        size = A.shape[-1]
        # The input as one more state, which stays what it is: its exponential holds both matrices.
        lead = torch.broadcast_shapes(scaled.shape[:-2], column.shape[:-2])
        upper = torch.cat((scaled.expand(*lead, size, size), column.expand(*lead, size, 1)), dim=-1)
        both = torch.linalg.matrix_exp(F.pad(upper, (0, 0, 0, 1)))
        return both[..., :size, :size], both[..., :size, size]
    share = ALPHAS.get(method, alpha)
    if share is None or not 0 <= share <= 1:
        raise ArgumentError(f"alpha must lie between 0 and 1, got {alpha!r}")
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    implicit = identity - share * scaled
    A_bar = torch.linalg.solve(implicit, identity + (1 - share) * scaled)
    return A_bar, torch.linalg.solve(implicit, column).squeeze(-1)


def _expm1(x: Tensor) -> Tensor:
    if not x.is_complex():
        return torch.expm1(x)
    # exp(a + ib) - 1 without cancellation near 0; torch.expm1 does not take complex numbers on every device.
    real = torch.expm1(x.real) * torch.cos(x.imag) - 2 * torch.sin(x.imag / 2) ** 2
    return torch.complex(real, torch.exp(x.real) * torch.sin(x.imag))
