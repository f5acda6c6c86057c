"""The Vandermonde product and its transpose as they are defined: every power in memory, in plain PyTorch.

With c channels, N states and A_bar[c, n] = exp(log_A_bar[c, n]),

    kernel[b, c, l] = 2 Re sum_n weights[b, c, n] A_bar[c, n]^l        (product)
    sums[b, c, n]   =      sum_l values[b, c, l] A_bar[c, n]^l         (moments, with l A_bar^l in place of A_bar^l too)

These two are each other's gradients: library.py puts them together, for every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def _powers(log_A_bar: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A_bar^l, (channels, N, length), and l, (length,)."""
    place = torch.arange(length, device=log_A_bar.device).to(log_A_bar.real.dtype)
    return torch.exp(log_A_bar[..., None] * place), place


def product(weights: Tensor, log_A_bar: Tensor, length: int) -> Tensor:
    """(batch, channels, N), (channels, N) to (batch, channels, length), real."""
    powers, _ = _powers(log_A_bar, length)
    return 2 * (weights[..., None] * powers).sum(-2).real


def moments(values: Tensor, log_A_bar: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Sums over l of values A_bar^l and, with `slope`, of l values A_bar^l: (batch, channels, length) to (..., N)."""
    powers, place = _powers(log_A_bar, values.shape[-1])
    sums = (values[..., None, :] * powers).sum(-1)
    return sums, ((place * values)[..., None, :] * powers).sum(-1) if slope else None
