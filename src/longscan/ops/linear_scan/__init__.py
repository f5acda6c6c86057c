"""The linear recurrence h[t] = a[t] h[t-1] + b[t], element by element: the scan under S5, RWKV and their kin."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import activation_dtype, check_floating, check_shape, check_tensors, prepare_cu_seqlens
from longscan.ops.linear_scan import library

__all__ = ["linear_scan"]


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Runs one first-order recurrence per channel, real or complex.

    .. math:: h_t = a_t\, h_{t-1} + b_t

    Blelloch 1990 ("Prefix sums and their applications", section 1.4.1) for the associative product behind its parallel
    forms, :math:`(a, b) \cdot (a', b') = (a' a, a' b + b')`. No quotient or logarithm of a is ever taken: a may be 0.

    Args:
        a: decays, of a shape that broadcasts to b's: (channels,) is constant over batch and time. float32, bfloat16,
            float16, float64, complex64 or complex128.
        b: (batch, length, channels), of one of these dtypes.
        initial_state: (batch, channels); with `cu_seqlens` (num_sequences, channels). Zero when None.
        cu_seqlens: (num_sequences + 1,) integers, 0 first, `length` last, never decreasing: the sequences packed in
            the one row of a batch of 1. No state leaks over a border. A sequence of length 0 keeps its initial state.
        return_final_state: also return the state after the last step.
        backend: "auto" (None), "reference", "chunked", "cpu" or "triton"; a name never falls back to another.

    Returns:
        h (batch, length, channels) in b's dtype, complex if a or b is; with `return_final_state` also the state, shaped
        like `initial_state`, float32 or complex64 whatever the inputs are (float64 and complex128 for double ones).
        Both carry gradients.

    Precision: under autocast b is brought to autocast's dtype unless it is complex; a keeps its own. The state and all
    sums are float32 (complex64), or float64 (complex128) if a or b is. What is kept for the backward pass is a and h:
    the gradient of a is taken from h as it was returned.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> linear_scan(torch.tensor(0.5), torch.ones(1, 3, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    if b.dim() != 3 or 0 in b.shape:
        raise ArgumentError(f"b: got shape {tuple(b.shape)}, expected (batch, length, channels), each at least 1")
    batch, _, channels = b.shape
    _check_number("a", a)
    _check_number("b", b)
    if a.dim() > 3 or any(
        size not in (1, whole) for size, whole in zip(reversed(a.shape), reversed(b.shape), strict=False)
    ):
        raise ArgumentError(
            f"a: got shape {tuple(a.shape)}, expected one that broadcasts to b's {tuple(b.shape)} = "
            "(batch, length, channels)"
        )
    check_tensors(b=b, a=a, initial_state=initial_state)
    sequences = batch
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, batch, b.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_number("initial_state", initial_state)
        meaning = "(batch, channels)" if cu_seqlens is None else "(num_sequences, channels)"
        check_shape("initial_state", initial_state, (sequences, channels), meaning)
        if initial_state.is_complex() and not (a.is_complex() or b.is_complex()):
            raise ArgumentError(f"initial_state: got {initial_state.dtype}, expected a real dtype like a's and b's")

    h_dtype, a_dtype, b_dtype = _dtypes(a, b)
    a = a.reshape((1,) * (3 - a.dim()) + tuple(a.shape)).to(a_dtype)
    b = b.to(b_dtype)
    if initial_state is not None:
        initial_state = initial_state.to(library.state_dtype(b))
    h, final = library.linear_scan(a, b, initial_state, cu_seqlens, backends.requested(backend))
    h = h.to(h_dtype)
    return (h, final) if return_final_state else h


def _check_number(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.complex64, torch.complex128):
        check_floating(name, tensor)


def _dtypes(a: Tensor, b: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dtypes of the result, and of a and b as the operator takes them: both complex or neither, both double or neither.

    A decay keeps its digits where the activations have fewer.
    """
    double = (torch.float64, torch.complex128)
    wide = a.dtype in double or b.dtype in double
    if a.is_complex() or b.is_complex():
        dtype = torch.complex128 if wide else torch.complex64
        return (torch.complex128 if b.dtype in double else torch.complex64), dtype, dtype
    if wide:
        return b.dtype, torch.float64, torch.float64
    return b.dtype, a.dtype, activation_dtype(b)
