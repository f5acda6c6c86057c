"""The functions of `causal_conv1d`, over our operator: any width, any device, packed and continued sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan import ops
from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.layouts import activation_name, channels_last, records_gradient, without_autocast
from longscan.integrations.mamba_ssm.segments import Segments


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with its own short causal filter.

    Args:
        x: (batch, channels, length).
        weight: (channels, width), any width.
        bias: (channels,).
        seq_idx: (batch, length) integers: a new number begins a new sequence, over whose border the filter does not
            reach. Negative numbers are padding: the output there is zero.
        initial_states: (batch, channels, width - 1), what came before; with `seq_idx` before each row's first sequence.
        return_final_states: also return the last width - 1 inputs; with `seq_idx` those of each row's last sequence.
        final_states_out: (batch, channels, width - 1), filled with them and returned.
        activation: None, "silu" or "swish" (the same).

    Returns:
        (batch, channels, length) in x's dtype, a channel-last view, and the final states if asked for. Both carry
        gradients.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed.
    """
    out, final = convolve(x, weight, bias, seq_idx, initial_states, activation_name(activation), None)
    if not return_final_states:
        return out
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` by our definition in plain PyTorch."""
    out, final = convolve(x, weight, bias, None, initial_states, activation_name(activation), "reference")
    if not return_final_states:
        return out
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Output and final states of `causal_conv1d_fn`; activation None or "silu"."""
    if x.dim() != 3:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, channels, length)")
    u = channels_last(x)
    initial = None if initial_states is None else channels_last(initial_states)
    segments = None
    if seq_idx is not None:
        segments = Segments(seq_idx, (x.shape[0], x.shape[2]))
        # One row after another in one packed row: a view, where x is channel-last.
        u = u.reshape(1, -1, x.shape[1])
        initial = None if initial is None else segments.spread(initial)
    with without_autocast(x):
        result = ops.causal_conv1d(
            u,
            weight,
            bias,
            initial,
            activation=activation,
            cu_seqlens=None if segments is None else segments.cu_seqlens,
            return_final_state=True,
            backend=backend,
        )
    assert isinstance(result, tuple)
    y, final = result
    if segments is not None:
        y = segments.blank(y.view(x.shape[0], x.shape[2], x.shape[1]))
        final = segments.last(final, None if initial_states is None else channels_last(initial_states))
    return channels_last(y), channels_last(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Continues the convolution by one token or several; the state is updated in place.

    Args:
        x: (batch, channels) or (batch, channels, length).
        conv_state: (batch, channels, state_len), state_len at least width - 1: the last inputs, oldest first.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (batch,) integers, how many inputs each sequence has had. With them the state is a ring: input i
            lies at i mod state_len.
        conv_state_indices: (batch,) integers: which entry of a larger `conv_state` belongs to which sequence. A
            negative one is padding: its output is zero, and no state is touched.

    Returns:
        Like x. Gradients flow if any are recorded, through the state too.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed.
    """
    return update(
        x, conv_state, weight, bias, activation_name(activation), cache_seqlens, conv_state_indices, None
    )  # fmt: skip


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` by our definition in plain PyTorch."""
    return update(x, conv_state, weight, bias, activation_name(activation), cache_seqlens, None, "reference")


def update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    indices: Tensor | None,
    backend: str | None,
) -> Tensor:
    """`causal_conv1d_update` with an activation of None or "silu"."""
    if x.dim() == 2:
        new = x.unsqueeze(-1)
        return update(new, conv_state, weight, bias, activation, cache_seqlens, indices, backend).squeeze(-1)
    if x.dim() != 3:
        raise ArgumentError(f"x: got shape {tuple(x.shape)}, expected (batch, channels) or (batch, channels, length)")
    batch, channels, length = x.shape
    before = weight.shape[-1] - 1
    _check_state(conv_state, batch, channels, before, indices)
    plain = indices is None and cache_seqlens is None and conv_state.dtype == x.dtype
    with without_autocast(x):
        if plain and length == 1 and before and not records_gradient(x, conv_state, weight, bias):
            return _shift(x, conv_state, weight, bias, activation, backend)
        own = conv_state if indices is None else conv_state.index_select(0, indices.clamp(min=0))
        recent = own[..., own.shape[2] - before :] if cache_seqlens is None else _from_ring(own, cache_seqlens, before)
        # A copy: what autograd keeps must not be what is overwritten below.
        initial = channels_last(recent.to(x.dtype, copy=True))
        y = ops.causal_conv1d(channels_last(x), weight, bias, initial, activation=activation, backend=backend)
    assert isinstance(y, Tensor)
    after = _extended(own, x) if cache_seqlens is None else _into_ring(own, x, cache_seqlens)
    if indices is None:
        conv_state.copy_(after)
        return channels_last(y)
    padding = indices < 0
    if bool(padding.any()):
        y = y.masked_fill(padding[:, None, None], 0)
        indices, after = indices[~padding], after[~padding]
    conv_state.index_copy_(0, indices.long(), after)
    return channels_last(y)


def _shift(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str | None
) -> Tensor:
    """One token, by the operator's step on the newest inputs; the older ones move up by one."""
    older = conv_state.shape[2] - (weight.shape[-1] - 1)
    if older:
        moved = conv_state[..., 1 : older + 1]
        conv_state[..., :older].copy_(moved if older == 1 else moved.clone())
    newest = channels_last(conv_state[..., older:])
    y, _ = ops.causal_conv1d_update(
        newest, x.squeeze(-1), weight, bias, activation=activation, inplace=True, backend=backend
    )
    return y.unsqueeze(-1)


def _check_state(conv_state: Tensor, batch: int, channels: int, before: int, indices: Tensor | None) -> None:
    fits = conv_state.dim() == 3 and conv_state.shape[1] == channels and conv_state.shape[2] >= max(before, 1)
    if indices is None:
        if not fits or conv_state.shape[0] != batch:
            raise ArgumentError(
                f"conv_state: got shape {tuple(conv_state.shape)}, expected (batch, channels, state_len) = "
                f"({batch}, {channels}, at least width - 1 = {before})"
            )
        return
    if not fits:
        raise ArgumentError(
            f"conv_state: got shape {tuple(conv_state.shape)}, expected (entries, channels, state_len) = "
            f"(any, {channels}, at least width - 1 = {before})"
        )
    if indices.shape != (batch,):
        raise ArgumentError(f"conv_state_indices: got shape {tuple(indices.shape)}, expected ({batch},)")


def _extended(own: Tensor, x: Tensor) -> Tensor:
    """The last state_len inputs."""
    state_len = own.shape[2]
    if x.shape[2] >= state_len:
        return x[..., x.shape[2] - state_len :].to(own.dtype)
    return torch.cat([own[..., x.shape[2] :], x.to(own.dtype)], dim=-1)


def _places(own: Tensor, first: Tensor, count: int) -> Tensor:
    """Where in the ring inputs first, first + 1, ... lie, (batch, channels, count)."""
    steps = torch.arange(count, device=own.device)
    places = torch.remainder(first.to(torch.int64)[:, None] + steps, own.shape[2])
    return places[:, None].expand(-1, own.shape[1], -1)


def _from_ring(own: Tensor, cache_seqlens: Tensor, before: int) -> Tensor:
    return own.gather(2, _places(own, cache_seqlens - before, before))


def _into_ring(own: Tensor, x: Tensor, cache_seqlens: Tensor) -> Tensor:
    # More inputs than places: the last ones stay.
    skipped = max(0, x.shape[2] - own.shape[2])
    kept = x[..., skipped:].to(own.dtype)
    return own.scatter(2, _places(own, cache_seqlens + skipped, kept.shape[2]), kept)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of packed sequences, as states to go on from.

    Args:
        x: (length, channels), sequences one after another.
        cu_seqlens: (sequences + 1,) integers: where each begins, and the end of the last one.
        state_len: how many inputs to keep of each.

    Returns:
        (sequences, channels, state_len), oldest first; zero where a sequence is shorter.
    """
    ends = cu_seqlens[1:, None].to(torch.int64)
    places = ends - state_len + torch.arange(state_len, device=cu_seqlens.device)
    inside = places >= cu_seqlens[:-1, None]
    states = x[places.clamp(min=0)].masked_fill(~inside[..., None], 0)
    return channels_last(states)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states` by slices, one sequence after another."""
    states = x.new_zeros(cu_seqlens.numel() - 1, state_len, x.shape[1])
    for state, begin, end in zip(states, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        kept = min(end - begin, state_len)
        state[state_len - kept :] = x[end - kept : end]
    return channels_last(states)
