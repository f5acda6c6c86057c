"""The residual sum and RMSNorm that begin a pre-norm block, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.add_rms_norm import library
from longscan.ops.checks import ACCUMULATION, activation_dtype, check_floating, check_shape, check_tensors

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds a block's output to the residual stream and normalises the sum.

    .. math:: r' = x + r, \qquad
              \mathrm{normed} = w \odot \frac{r'}{\sqrt{\mathrm{mean}(r'^2) + \epsilon}}

    (Zhang and Sennrich 2019, equation 4.)

    Args:
        x: (..., channels), float32, bfloat16 or float16; float64 is served by the reference.
        weight: (channels,).
        residual: like x; None at the first block, where r' = x.
        eps: added to the mean square, at least 0.
        residual_dtype: dtype the stream is kept in. float32 holds it to the precision of its sums whatever x's dtype;
            float64 x keeps a float64 stream.
        backend: "auto" (None), "reference", "cpu" or "triton"; a name never falls back to another.

    Returns:
        (normed, r'): normed (..., channels) in x's dtype (autocast's, where it is on), r' (..., channels) in
        `residual_dtype`. Both carry gradients. Arithmetic is float32 (float64 for float64).

    Raises:
        ArgumentError: a shape, dtype, device or eps is not allowed.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> normed, stream = add_rms_norm(torch.randn(2, 5, 8), torch.ones(8))
        >>> normed, stream = add_rms_norm(torch.randn(2, 5, 8), torch.ones(8), stream)
    """
    check_floating("x", x)
    if x.dim() < 1 or 0 in x.shape:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (..., channels), each at least 1")
    channels = x.shape[-1]
    check_floating("weight", weight)
    check_shape("weight", weight, (channels,), "(channels,)")
    if residual is not None:
        check_floating("residual", residual)
        check_shape("residual", residual, tuple(x.shape), "(..., channels) like x")
    check_tensors(x=x, weight=weight, residual=residual)
    if not eps >= 0:
        raise ArgumentError(f"eps: got {eps}, expected a number of at least 0")
    if residual_dtype not in ACCUMULATION:
        raise ArgumentError(f"residual_dtype: got {residual_dtype}, allowed are {', '.join(map(str, ACCUMULATION))}")
    if x.dtype == torch.float64:
        residual_dtype = torch.float64
    normed, residual_out, _ = library.add_rms_norm(
        x.reshape(-1, channels),
        weight.to(ACCUMULATION[x.dtype]),
        None if residual is None else residual.reshape(-1, channels).to(residual_dtype),
        eps,
        residual_dtype,
        backends.requested(backend),
    )
    # Autocast reaches the output alone: rounding x first would cost the stream its precision.
    return normed.to(activation_dtype(x)).reshape(x.shape), residual_out.reshape(x.shape)
