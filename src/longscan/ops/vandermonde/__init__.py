"""Sums of powers: the kernel of a diagonal state space model, and its transpose, the state after a signal."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import REAL, check_floating, check_shape, check_tensors
from longscan.ops.vandermonde import library

__all__ = ["vandermonde", "vandermonde_transpose"]


def vandermonde(weights: Tensor, log_A_bar: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    r"""The convolution kernel of a diagonal system whose states each stand for a conjugate pair.

    .. math:: K_l = 2\,\mathrm{Re} \sum_n w_n \bar A_n^l, \qquad l < \text{length}

    Gu, Gupta, Goel and Re 2022 (S4D, arXiv 2206.11893, section 3.3).

    Args:
        weights: (..., channels, N) complex: :math:`C_n \bar B_n` for a kernel, :math:`C_n \bar A_n h_n` for what a
            state h still gives out.
        log_A_bar: (channels, N) complex: logarithms, from which every power is exact.
        length: number of places, at least 1.
        backend: "auto" (None), "chunked", "triton" (complex64) or "reference"; a name never falls back to another.

    Returns:
        (..., channels, length), float32, or float64 if an argument is complex128. Carries gradients of weights and
        log_A_bar.

    Precision: in float32 an angle :math:`l\, \mathrm{Im} \log \bar A_n` is rounded once, by 6e-8 of its size.

    Cost: of order N length operations a channel; of the powers only of order N sqrt(length) are ever in memory
    ("triton": none, "reference": all), and nothing but the arguments is kept for the backward pass.

    Raises:
        ArgumentError: a shape, dtype, device or the length is not allowed.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> vandermonde(torch.ones(1, 1, dtype=torch.complex64), torch.full((1, 1), -0.5 + 1j), 3).shape
        torch.Size([1, 3])
    """
    _check_system(log_A_bar)
    if not weights.is_complex():
        raise ArgumentError(f"weights: got {weights.dtype}, allowed are complex64 and complex128")
    if weights.dim() < 2 or 0 in weights.shape:
        raise ArgumentError(f"weights: got shape {tuple(weights.shape)}, expected (..., channels, N), each at least 1")
    check_shape("log_A_bar", log_A_bar, tuple(weights.shape[-2:]), "(channels, N) as weights")
    check_tensors(weights=weights, log_A_bar=log_A_bar)
    if length < 1:
        raise ArgumentError(f"length: got {length}, must be at least 1")
    wide = torch.promote_types(weights.dtype, log_A_bar.dtype)
    wide = torch.promote_types(wide, torch.complex64)
    rows = weights.reshape(-1, *weights.shape[-2:]).to(wide)
    kernel = library.vandermonde(rows, log_A_bar.to(wide), length, backends.requested(backend))
    return kernel.view(*weights.shape[:-1], length)


def vandermonde_transpose(values: Tensor, log_A_bar: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Sums of a signal over powers: the transpose of `vandermonde`.

    .. math:: S_n = \sum_l v_l \bar A_n^l

    With v the input in reverse, :math:`\bar B_n S_n` is the state that it leaves.

    Args:
        values: (..., channels, length) float32, bfloat16, float16 or float64.
        log_A_bar: (channels, N) complex.
        backend: as in `vandermonde`.

    Returns:
        (..., channels, N), complex64, or complex128 if an argument is of double precision. Carries gradients.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed.
        BackendError: the backend asked for cannot serve the call.
    """
    _check_system(log_A_bar)
    check_floating("values", values)
    if values.dim() < 2 or 0 in values.shape:
        raise ArgumentError(
            f"values: got shape {tuple(values.shape)}, expected (..., channels, length), each at least 1"
        )
    check_shape("log_A_bar", log_A_bar, (values.shape[-2], log_A_bar.shape[1]), "(channels, N), channels as values")
    check_tensors(values=values, log_A_bar=log_A_bar)
    wide = torch.promote_types(torch.promote_types(values.dtype, log_A_bar.dtype), torch.complex64)
    rows = values.reshape(-1, *values.shape[-2:]).to(REAL[wide])
    sums = library.vandermonde_transpose(rows, log_A_bar.to(wide), backends.requested(backend))
    return sums.view(*values.shape[:-1], log_A_bar.shape[1])


def _check_system(log_A_bar: Tensor) -> None:
    if not log_A_bar.is_complex():
        raise ArgumentError(f"log_A_bar: got {log_A_bar.dtype}, allowed are complex64 and complex128")
    if log_A_bar.dim() != 2 or 0 in log_A_bar.shape:
        raise ArgumentError(f"log_A_bar: got shape {tuple(log_A_bar.shape)}, expected (channels, N), each at least 1")
