"""Where the diagonal A of a state space model starts: the S4D family (Gu et al. 2022, arXiv 2206.11893, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.statespace.nplr import nplr

KINDS = ("s4d-legs", "s4d-inv", "s4d-lin", "s4d-real", "dss")


def diagonal(kind: str, size: int) -> Tensor:
    """The eigenvalues A_n, n = 0 .. size - 1, each standing for itself and its conjugate.

    ============  ===============================================================
    ``s4d-lin``   -1/2 + i pi n
    ``s4d-inv``   -1/2 + i N/pi (N / (2n + 1) - 1), with N = 2 size
    ``s4d-legs``  eigenvalues of the normal part of HiPPO-LegS of order N
    ``s4d-real``  -(n + 1)
    ``dss``       those of ``s4d-legs``: the same matrix, "skew-HiPPO", without its low-rank part
    ============  ===============================================================

    Returns:
        (size,) complex128.
    """
    n = torch.arange(size, dtype=torch.float64)
    if kind == "s4d-real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind == "s4d-lin":
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if kind == "s4d-inv":
        order = 2 * size
        return torch.complex(torch.full_like(n, -0.5), order / math.pi * (order / (2 * n + 1) - 1))
    if kind in ("s4d-legs", "dss"):
        return nplr("legs", 2 * size).w[:size]
    raise ArgumentError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


def log_uniform_steps(size: int, dt_min: float, dt_max: float, device: torch.device | str | None = None) -> Tensor:
    """Logarithms of ``size`` steps, drawn uniformly between log dt_min and log dt_max: (size,) float32."""
    if not 0 < dt_min <= dt_max:
        raise ArgumentError(f"0 < dt_min <= dt_max must hold, got dt_min {dt_min} and dt_max {dt_max}")
    return torch.rand(size, device=device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
