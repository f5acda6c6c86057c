"""The Vandermonde product and its transpose as real matrix products, in plain PyTorch on any device.

With l = q m + r the powers factor, A_bar^l = (A_bar^m)^q A_bar^r: of order sqrt(length) of them are made per state,
each from its own exponential, and the sum over states (or over r) is a matrix product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(*_: Tensor | None) -> str | None:
    """Plain PyTorch serves every call."""
    return None


def _split(length: int) -> tuple[int, int]:
    """Sizes (q, m) of a grid of at least `length` places, about square."""
    inner = math.isqrt(length - 1) + 1
    return -(-length // inner), inner


def _powers(log_A_bar: Tensor, places: Tensor) -> Tensor:
    """A_bar^place as pairs of real numbers: (channels, N) and (places,) to (channels, places, N, 2)."""
    exponent = log_A_bar[:, None, :] * places[:, None]
    size = torch.exp(exponent.real)
    return torch.stack((size * torch.cos(exponent.imag), size * torch.sin(exponent.imag)), dim=-1)


def _places(log_A_bar: Tensor, outer: int, inner: int) -> tuple[Tensor, Tensor]:
    """Where stretches start, and the places within one."""
    place = torch.arange(max(outer, inner), device=log_A_bar.device).to(log_A_bar.real.dtype)
    return inner * place[:outer], place[:inner]


def product(weights: Tensor, log_A_bar: Tensor, length: int) -> Tensor:
    """(batch, channels, N), (channels, N) to (batch, channels, length), real."""
    outer, inner = _split(length)
    starts, within = _places(log_A_bar, outer, inner)
    left = weights[:, :, None, :] * torch.view_as_complex(_powers(log_A_bar, starts))
    # The real part of a complex product is that of one with the conjugate: a product of pairs of real numbers.
    left = torch.view_as_real(torch.conj_physical(2 * left)).flatten(-2)
    return torch.matmul(left, _powers(log_A_bar, within).flatten(-2).mT).flatten(-2)[..., :length]


def moments(values: Tensor, log_A_bar: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Sums over l of values A_bar^l and, with `slope`, of l values A_bar^l: (batch, channels, length) to (..., N)."""
    outer, inner = _split(values.shape[-1])
    starts, within = _places(log_A_bar, outer, inner)
    grid = F.pad(values, (0, outer * inner - values.shape[-1])).unflatten(-1, (outer, inner))
    powers = _powers(log_A_bar, within)  # (channels, inner, N, 2)
    if slope:
        powers = torch.stack((powers, within[:, None, None] * powers), dim=2)
    sums = torch.matmul(grid, powers.flatten(2)).unflatten(-1, (-1, log_A_bar.shape[1], 2))
    sums = torch.view_as_complex(sums)  # (batch, channels, outer, 1 or 2, N)
    steps = torch.view_as_complex(_powers(log_A_bar, starts))  # (channels, outer, N)
    zeroth = sums[..., 0, :] * steps
    if not slope:
        return zeroth.sum(-2), None
    # l = q m + r
    return zeroth.sum(-2), (starts[:, None] * zeroth + sums[..., 1, :] * steps).sum(-2)
