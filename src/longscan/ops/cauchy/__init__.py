"""Sums of simple poles in conjugate pairs: the generating functions of structured state space models."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.cauchy import library
from longscan.ops.checks import check_shape, check_tensors

__all__ = ["cauchy"]


def cauchy(v: Tensor, z: Tensor, w: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Several Cauchy products over the poles of one system per channel, each pole with its conjugate.

    .. math:: y_l = \sum_n \frac{v_n}{z_l - w_n} + \frac{\bar v_n}{z_l - \bar w_n}

    Gu, Goel and Re 2021 (S4, arXiv 2111.00396, proposition 5 and appendix C.3), where four products share the poles.

    Args:
        v: (..., channels, N) complex numerators; the products over one system stand along the leading axes.
        z: (length,) complex, a grid that all channels share. It gets no gradient.
        w: (channels, N) complex poles, away from the grid.
        backend: "auto" (None), "reference", "chunked", "cpu" or "triton"; a name never falls back to another.

    Returns:
        (..., channels, length) complex64, or complex128 if an argument is. Carries gradients of v and w.

    Cost: of order N length operations a channel and product; only a stretch of the quotients is ever in memory
    ("reference": all), and nothing but the arguments is kept for the backward pass.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or z asks for a gradient.
        BackendError: the backend asked for cannot serve the call.
    """
    for name, tensor in (("v", v), ("z", z), ("w", w)):
        if not tensor.is_complex():
            raise ArgumentError(f"{name}: got {tensor.dtype}, allowed are complex64 and complex128")
    if v.dim() < 2 or 0 in v.shape:
        raise ArgumentError(f"v: got shape {tuple(v.shape)}, expected (..., channels, N), each at least 1")
    if z.dim() != 1 or z.shape[0] < 1:
        raise ArgumentError(f"z: got shape {tuple(z.shape)}, expected (length,), at least 1")
    check_shape("w", w, tuple(v.shape[-2:]), "(channels, N) as v")
    check_tensors(v=v, z=z, w=w)
    if z.requires_grad:
        raise ArgumentError("z: asks for a gradient, which this operator does not give; detach it")
    wide = torch.promote_types(torch.promote_types(v.dtype, w.dtype), torch.promote_types(z.dtype, torch.complex64))
    rows = v.reshape(-1, *v.shape[-2:]).to(wide)
    y = library.cauchy(rows, z.to(wide), w.to(wide), backends.requested(backend))
    return y.view(*v.shape[:-1], z.shape[0])
