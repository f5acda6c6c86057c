"""`mamba_ssm.ops.triton.selective_state_update`: one step of the scan, over our operator."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan import ops
from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.layouts import records_gradient, without_autocast


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
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step per sequence; the state is updated in place.

    Args:
        state: (batch, channels, state) or (batch, heads, channels, state), of any floating dtype, or complex where A
            is. The step itself is computed in float32.
        x, dt, z: (batch, channels) or (batch, heads, channels).
        A: (channels, state) or (heads, channels, state).
        B, C: (batch, state) or (batch, groups, state); a head reads group head // (heads / groups).
        D, dt_bias: (channels,) or (heads, channels).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,) integers: which entry of a larger `state` belongs to which sequence. A negative
            one is padding: its output is zero, and no state is touched.

    Returns:
        (batch, channels) or (batch, heads, channels), in x's dtype. Gradients flow if any are recorded, through the
        state too.

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, None)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` by our definition in plain PyTorch."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "reference")


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
    backend: str | None,
) -> Tensor:
    if state.dim() not in (3, 4) or x.dim() != state.dim() - 1:
        raise ArgumentError(
            f"state, x: got shapes {tuple(state.shape)} and {tuple(x.shape)}, expected (batch, channels, state) and "
            "(batch, channels), or both with heads before the channels"
        )
    if state.dim() == 4:
        _check_heads(state.shape[1], B, C)
        # Heads are groups of channels.
        x, dt, A = x.flatten(1, 2), dt.flatten(1, 2), A.flatten(0, 1)
        z = None if z is None else z.flatten(1, 2)
        D, dt_bias = (None if tensor is None else tensor.flatten() for tensor in (D, dt_bias))
    shape = x.shape
    own, padding = state, None
    if indices is not None:
        if indices.shape != shape[:1]:
            raise ArgumentError(f"state_batch_indices: got shape {tuple(indices.shape)}, expected (batch,)")
        padding = indices < 0
        own = state.index_select(0, indices.clamp(min=0))
    own = own.flatten(1, 2) if state.dim() == 4 else own
    recorded = records_gradient(own, x, dt, A, B, C, D, z, dt_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    # Heads side by side in memory: flattening them above was a view.
    one_piece = state.dim() == 3 or state.shape[1] == 1 or state.stride(1) == state.shape[2] * state.stride(2)
    inplace = one_piece and not recorded and indices is None
    inplace = inplace and own.dtype == (wide.to_complex() if A.is_complex() else wide)
    with without_autocast(x):
        y, new = ops.selective_state_update(
            # What autograd keeps must not be what is overwritten below.
            own.clone() if recorded else own,
            x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, inplace=inplace, backend=backend,
        )  # fmt: skip
    if indices is not None:
        assert padding is not None
        new = new.view(-1, *state.shape[1:]).to(state.dtype)
        if bool(padding.any()):
            y = y.masked_fill(padding[:, None], 0)
            indices, new = indices[~padding], new[~padding]
        state.index_copy_(0, indices.long(), new)
    elif not inplace:
        state.copy_(new.view(state.shape))
    return y.unflatten(1, state.shape[1:3]) if state.dim() == 4 else y


def _check_heads(heads: int, *tensors: Tensor) -> None:
    for name, tensor in zip("BC", tensors, strict=True):
        if tensor.dim() == 3 and heads % tensor.shape[1]:
            raise ArgumentError(f"{name}: got {tensor.shape[1]} groups, which must divide the {heads} heads")
