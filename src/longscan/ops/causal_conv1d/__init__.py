"""The short causal depthwise convolution that stands before Mamba's scan, over sequences and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.causal_conv1d import library
from longscan.ops.checks import (
    ACCUMULATION,
    activation_dtype,
    check_floating,
    check_shape,
    check_tensors,
    prepare_cu_seqlens,
)

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolves each channel with its own short causal filter.

    .. math:: y_t = \mathrm{act}\Big(b + \sum_{k=0}^{W-1} w_k\, x_{t-(W-1)+k}\Big)

    Args:
        x: (batch, length, channels), float32, bfloat16 or float16; float64 is served by the reference.
        weight: (channels, width), width at least 1; the last tap meets the present input.
        bias: (channels,).
        initial_state: (batch, width - 1, channels), the inputs that came before, oldest first; with `cu_seqlens`
            (num_sequences, width - 1, channels). Zero when None.
        activation: None or "silu".
        cu_seqlens: (num_sequences + 1,) integers, 0 first, `length` last: sequences packed in the one row of a batch
            of 1; the filter does not reach over a border.
        return_final_state: also return the last width - 1 inputs.
        backend: "auto" (None), "reference", "cpu", "cuda" or "triton"; a name never falls back to another.

    Returns:
        y (batch, length, channels) in x's dtype; with `return_final_state` also the state, shaped like `initial_state`,
        in x's dtype. Both carry gradients. Sums are float32 (float64 for float64).

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or the offsets decrease.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> causal_conv1d(torch.randn(2, 5, 8), torch.randn(8, 4), activation="silu").shape
        torch.Size([2, 5, 8])
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, length, channels), each at least 1")
    batch, _, channels = x.shape
    check_floating("x", x)
    silu = _check_filter(channels, weight, bias, activation)
    check_tensors(x=x, weight=weight, bias=bias, initial_state=initial_state)
    sequences = batch
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, batch, x.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        meaning = "(batch, width - 1, channels)" if cu_seqlens is None else "(num_sequences, width - 1, channels)"
        check_floating("initial_state", initial_state)
        check_shape("initial_state", initial_state, (sequences, weight.shape[1] - 1, channels), meaning)

    y_dtype = x.dtype
    dtype = activation_dtype(x)
    real = ACCUMULATION[dtype]
    y, final = library.causal_conv1d(
        x.to(dtype),
        weight.to(real),
        None if bias is None else bias.to(real),
        None if initial_state is None else initial_state.to(dtype),
        cu_seqlens,
        silu,
        backends.requested(backend),
    )
    y = y.to(y_dtype)
    return (y, final.to(y_dtype)) if return_final_state else y


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`.

    Args:
        state: (batch, width - 1, channels), the inputs that came before, oldest first.
        x: (batch, channels).
        weight, bias, activation, backend: as in `causal_conv1d`.
        inplace: overwrite `state` instead of returning a fresh one; not while gradients are recorded.

    Returns:
        (y, state): y (batch, channels) in x's dtype, and the new state (`state` itself with `inplace`).

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or `inplace` where a gradient would be lost.
        BackendError: the backend asked for cannot serve the call.
    """
    if x.dim() != 2 or 0 in x.shape:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, channels), each at least 1")
    batch, channels = x.shape
    check_floating("x", x)
    silu = _check_filter(channels, weight, bias, activation)
    check_floating("state", state)
    check_shape("state", state, (batch, weight.shape[1] - 1, channels), "(batch, width - 1, channels)")
    check_tensors(x=x, state=state, weight=weight, bias=bias)
    tensors = (state, x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if inplace:
            raise ArgumentError(
                "inplace: a gradient is recorded through the state; use inplace=False or torch.no_grad()"
            )
        out = causal_conv1d(
            x[:, None], weight, bias, state, activation=activation, return_final_state=True, backend=backend
        )
        assert isinstance(out, tuple)
        return out[0][:, 0], out[1]
    y_dtype = x.dtype
    dtype = activation_dtype(x)
    real = ACCUMULATION[dtype]
    if inplace and state.dtype != dtype:
        raise ArgumentError(f"state: got {state.dtype}, expected {dtype} like x to be updated in place")
    new = state if inplace else state.to(dtype).clone(memory_format=torch.contiguous_format)
    y = library.causal_conv1d_update_(
        new,
        x.to(dtype),
        weight.to(real),
        None if bias is None else bias.to(real),
        silu,
        backends.requested(backend),
    )
    return y.to(y_dtype), new


def _check_filter(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Checks the filter's arguments and returns whether the activation is SiLU."""
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ArgumentError(
            f"weight: got shape {tuple(weight.shape)}, expected (channels, width) = ({channels}, at least 1)"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (channels,), "(channels,)")
    if activation not in (None, "silu"):
        raise ArgumentError(f"activation: got {activation!r}, allowed are None and 'silu'")
    return activation == "silu"
