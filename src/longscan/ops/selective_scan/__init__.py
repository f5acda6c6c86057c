"""The selective scan: Mamba's operator (S6), over whole sequences and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import (
    ACCUMULATION,
    activation_dtype,
    check_floating,
    check_number,
    check_shape,
    check_tensors,
    prepare_cu_seqlens,
)
from longscan.ops.selective_scan import library

__all__ = ["selective_scan", "selective_state_update"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scans a selective state space over time.

    With :math:`\Delta_t = \mathrm{softplus}(dt_t + dt\_bias)` (the softplus only with `dt_softplus`), per channel and
    state:

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t, \qquad
        y_t = \Big(\sum_n C_{t,n} h_{t,n} + D x_t\Big) \cdot \mathrm{silu}(z_t)

    A complex `A` stands for one of each conjugate pair: :math:`y_t = 2\,\mathrm{Re} \sum_n C_{t,n} h_{t,n}`.
    Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; zero-order hold for A and Euler for B, as in their released models.

    Args:
        x: (batch, length, channels), float32, bfloat16 or float16; float64 is served by the reference.
        dt: (batch, length, channels), the step size before bias and softplus (without softplus: the step size itself).
        A: (channels, state), float32 or complex64, real part at most 0.
        B: (batch, length, state), or (batch, length, groups, state) where channel c reads group
            c // (channels / groups), or (channels, state) for one that does not change in time. Complex if A is.
        C: like B, independently of B's form.
        D: (channels,), the skip.
        z: (batch, length, channels), the gate.
        dt_bias: (channels,).
        initial_state: (batch, channels, state); with `cu_seqlens` (num_sequences, channels, state). Zero when None.
        dt_softplus: apply softplus to dt + dt_bias (linear above 20).
        cu_seqlens: (num_sequences + 1,) integers, 0 first, `length` last, never decreasing: the sequences packed in
            the one row of a batch of 1. No state leaks over a border. A sequence of length 0 keeps its initial state.
        return_final_state: also return the state after the last step.
        backend: "auto" (None), "reference", "cpu", "cuda" or "triton"; a name never falls back to another.

    Returns:
        y (batch, length, channels) in x's dtype; with `return_final_state` also the state, shaped like
        `initial_state`, float32 (complex64 for complex A), whatever the inputs are. Both carry gradients.

    Precision: activations of unlike dtypes are promoted to a common one, under autocast to autocast's; parameters, the
    state and every sum are float32 (float64 for float64 activations).

    Cost: time O(batch length channels state); the backward pass recomputes the states, and O(batch length channels)
    bytes are kept for it whatever `state` is. Backward is deterministic.

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed (NaN in A, a positive real part of A, offsets that
            decrease). Values are looked at on the CPU; elsewhere with LONGSCAN_CHECK=1 only.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> x, dt = torch.randn(2, 5, 8), torch.rand(2, 5, 8)
        >>> B, C = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
        >>> selective_scan(x, dt, -torch.rand(8, 4), B, C).shape
        torch.Size([2, 5, 8])
    """
    if x.dim() != 3 or 0 in x.shape:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, length, channels), each at least 1")
    batch, length, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ArgumentError(f"A: got shape {tuple(A.shape)}, expected (channels, state) = ({channels}, at least 1)")
    state = A.shape[1]
    _check_numbers(A=A, B=B, C=C, initial_state=initial_state)
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (batch, length, channels), "(batch, length, channels)")
    B = _grouped("B", B, batch, length, channels, state)
    C = _grouped("C", C, batch, length, channels, state)
    _check_parameters(channels, D, dt_bias)
    check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    sequences = batch
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, batch, x.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        meaning = "(batch, channels, state)" if cu_seqlens is None else "(num_sequences, channels, state)"
        check_shape("initial_state", initial_state, (sequences, channels, state), meaning)

    y_dtype = x.dtype
    dtype = activation_dtype(x, dt, z, None if B.is_complex() else B, None if C.is_complex() else C)
    x, dt, A, B, C, D, z, dt_bias, initial_state = _promote(dtype, x, dt, A, B, C, D, z, dt_bias, initial_state)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, final, _ = library.selective_scan(*inputs, cu_seqlens, dt_softplus, save, backends.requested(backend))
    y = y.to(y_dtype)
    return (y, final) if return_final_state else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`: the recurrence that generation walks.

    Args:
        state: (batch, channels, state), float32 or complex64.
        x, dt, z: (batch, channels).
        A: (channels, state).
        B, C: (batch, state) or (batch, groups, state). A constant B of shape (channels, state) is passed as
            `B.expand(batch, channels, state)`: one group a channel.
        D, dt_bias: (channels,).
        dt_softplus: as in `selective_scan`.
        inplace: overwrite `state` instead of returning a fresh one; not while gradients are recorded.
        backend: as in `selective_scan`.

    Returns:
        (y, state): y (batch, channels) in x's dtype, and the new state (`state` itself with `inplace`). Without
        `inplace` both carry gradients.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or `inplace` where a gradient would be lost.
        BackendError: the backend asked for cannot serve the call.
    """
    if x.dim() != 2 or 0 in x.shape:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, channels), each at least 1")
    batch, channels = x.shape
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] < 1:
        raise ArgumentError(f"A: got shape {tuple(A.shape)}, expected (channels, state) = ({channels}, at least 1)")
    check_shape("state", state, (batch, channels, A.shape[1]), "(batch, channels, state)")
    _check_numbers(A=A, B=B, C=C, state=state)
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (batch, channels), "(batch, channels)")
    B = _grouped_step("B", B, batch, channels, A.shape[1])
    C = _grouped_step("C", C, batch, channels, A.shape[1])
    _check_parameters(channels, D, dt_bias)
    check_tensors(x=x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)

    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if inplace:
            raise ArgumentError(
                "inplace: a gradient is recorded through the state; use inplace=False or torch.no_grad()"
            )
        gate = None if z is None else z[:, None]
        out = selective_scan(
            x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state,
            dt_softplus=dt_softplus, return_final_state=True, backend=backend,
        )  # fmt: skip
        assert isinstance(out, tuple)
        return out[0][:, 0], out[1]

    y_dtype = x.dtype
    dtype = activation_dtype(x, dt, z, None if B.is_complex() else B, None if C.is_complex() else C)
    x, dt, A, B, C, D, z, dt_bias, promoted = _promote(dtype, x, dt, A, B, C, D, z, dt_bias, state)
    assert promoted is not None
    if inplace and promoted.dtype != state.dtype:
        raise ArgumentError(f"state: got {state.dtype}, expected {promoted.dtype} to be updated in place")
    if not inplace:
        promoted = promoted.clone(memory_format=torch.contiguous_format)
    y = library.selective_state_update_(
        promoted, x, dt, A, B, C, D, z, dt_bias, dt_softplus, backends.requested(backend)
    )
    return y.to(y_dtype), promoted


def _check_numbers(A: Tensor, **tensors: Tensor | None) -> None:
    """Checks the dtypes of A and of what may be complex only if it is."""
    check_number("A", A)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_number(name, tensor)
            if tensor.is_complex() and not A.is_complex():
                raise ArgumentError(f"{name}: is complex while A is real; allowed are a real {name} or a complex A")


def _check_parameters(channels: int, D: Tensor | None, dt_bias: Tensor | None) -> None:
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (channels,), "(channels,)")


def _grouped(name: str, tensor: Tensor, batch: int, length: int, channels: int, state: int) -> Tensor:
    """B or C with an explicit group axis; constants stay (channels, state)."""
    if tensor.dim() == 2:
        check_shape(name, tensor, (channels, state), "(channels, state)")
        return tensor
    if tensor.dim() == 3:
        check_shape(name, tensor, (batch, length, state), "(batch, length, state)")
        return tensor.unsqueeze(2)
    expected = "(batch, length, state), (batch, length, groups, state) or (channels, state)"
    if tensor.dim() != 4:
        raise ArgumentError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    groups = tensor.shape[2]
    check_shape(name, tensor, (batch, length, groups, state), "(batch, length, groups, state)")
    _check_groups(name, groups, channels)
    return tensor


def _grouped_step(name: str, tensor: Tensor, batch: int, channels: int, state: int) -> Tensor:
    if tensor.dim() == 2:
        check_shape(name, tensor, (batch, state), "(batch, state)")
        return tensor.unsqueeze(1)
    if tensor.dim() != 3:
        raise ArgumentError(
            f"{name}: got shape {tuple(tensor.shape)}, expected (batch, state) or (batch, groups, state)"
        )
    check_shape(name, tensor, (batch, tensor.shape[1], state), "(batch, groups, state)")
    _check_groups(name, tensor.shape[1], channels)
    return tensor


def _check_groups(name: str, groups: int, channels: int) -> None:
    if groups < 1 or channels % groups:
        raise ArgumentError(f"{name}: got {groups} groups, which must divide the {channels} channels")


def _promote(
    dtype: torch.dtype,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Activations in `dtype`, parameters and state in the precision of the sums."""
    real = ACCUMULATION[dtype]
    parameter = torch.promote_types(real, torch.complex64) if A.is_complex() else real
    varying = parameter if A.is_complex() else dtype
    return (
        x.to(dtype),
        dt.to(dtype),
        A.to(parameter),
        B.to(varying),
        C.to(varying),
        None if D is None else D.to(real),
        None if z is None else z.to(dtype),
        None if dt_bias is None else dt_bias.to(real),
        None if state is None else state.to(parameter),
    )
