"""Rotary positions: queries and keys turned by angles that grow with their position (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn pairs of features by ``position * base^(-2 i / head_dim)``.

    The pairs are (i, i + head_dim / 2), the layout of GPT-NeoX and Llama. Angles are computed in float32, exact to
    positions of 2^24; nothing is cached, so there is no longest length.

    Args:
        x: (batch, heads, length, head_dim), head_dim even.
        positions: (batch or 1, length) integers.
        base: wavelengths run from 2 pi to 2 pi * base.

    Returns:
        x turned, in the dtype of x.
    """
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions[:, None, :, None].float() * base**-exponents  # (batch, 1, length, half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
