"""`causal_conv1d.cpp_functions`: the convolution without autograd, for those who write their own backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.integrations.mamba_ssm.conv import convolve, update
from longscan.integrations.mamba_ssm.layouts import channels_last


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The output of `causal_conv1d_fn`, (batch, channels, length); `final_states_out` is filled if given."""
    out, final = convolve(x, weight, bias, seq_idx, initial_states, "silu" if silu_activation else None, None)
    if final_states_out is not None:
        final_states_out.copy_(final)
    return out


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `causal_conv1d_fn`.

    Args:
        x, weight, bias, seq_idx, initial_states: as in the forward pass.
        dout: (batch, channels, length), the gradient of its output.
        dfinal_states: (batch, channels, width - 1), that of its final states, or None.
        dx: filled with the gradient of x if given.
        return_dinitial_states: whether to return the gradient of `initial_states`.
        silu_activation: as in the forward pass.

    Returns:
        The gradients of x, weight, bias (None without one) and initial_states (None unless asked for).
    """
    if initial_states is None and return_dinitial_states:
        initial_states = channels_last(x.new_zeros((x.shape[0], weight.shape[1] - 1, x.shape[1])))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial_states)]
    with torch.enable_grad():
        u, taps, shift, initial = leaves
        assert u is not None
        assert taps is not None
        out, final = convolve(u, taps, shift, seq_idx, initial, "silu" if silu_activation else None, None)
        outputs, grads = [out], [dout]
        if dfinal_states is not None:
            outputs.append(final)
            grads.append(dfinal_states)
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(outputs, wanted, grads))
    found_x, found_weight, found_bias, found_initial = (None if leaf is None else next(found) for leaf in leaves)
    assert found_x is not None
    assert found_weight is not None
    if dx is not None:
        found_x = dx.copy_(found_x)
    return found_x, found_weight, found_bias, found_initial if return_dinitial_states else None


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` with its activation as a flag."""
    activation = "silu" if silu_activation else None
    return update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, None)
