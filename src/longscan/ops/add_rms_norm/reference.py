"""The fused residual sum and RMSNorm as it is defined: plain PyTorch, forward and backward.

    residual' = x + residual
    normed    = weight * residual' * rstd,    rstd = 1 / sqrt(mean(residual'^2) + eps)

(Zhang and Sennrich 2019, equation 4, over the sum that a pre-norm block takes; the residual is rounded to its own dtype
before it is normalised.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, *, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed (tokens, channels) in x's dtype, the new residual in `residual_dtype`, and rstd (tokens,)."""
    real = weight.dtype
    total = x.to(real) if residual is None else x.to(real) + residual.to(real)
    # A copy even where no sum changes it: an operator's outputs share no memory with its inputs.
    residual_out = total.to(residual_dtype, copy=True)
    total = residual_out.to(real)
    rstd = torch.rsqrt(total.square().mean(-1) + eps)
    normed = total * rstd[:, None] * weight
    return normed.to(x.dtype), residual_out, rstd


def backward(
    dnormed: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and residual (None where there was none)."""
    real = ACCUMULATION[weight.dtype]
    unit = residual_out.to(real) * rstd[:, None]
    g = dnormed.to(real)
    dweight = (g * unit).sum(0)
    g = g * weight
    total = dresidual_out.to(real) + rstd[:, None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    dresidual = total.to(residual_out.dtype, copy=True) if has_residual else None
    return total.to(x_dtype), dweight, dresidual
