"""What stands in for the ``forward`` of Transformers' Mamba-1 mixers, on their own weights and caches.

One road for training, prompts, chunks and single tokens. It differs from theirs in what theirs gets wrong: a warm cache
is continued whatever the number of tokens, padding leaves no trace wherever it stands, and an adapter around
``dt_proj`` acts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.integrations.transformers.caches import cache_among
from longscan.integrations.transformers.padding import Packing, packing_of
from longscan.nn.linear import product_and_bias
from longscan.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

#: dt before its bias and softplus (..., channels), B and C (..., state) or (..., groups, state), and that bias.
Selection = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Where a family of mixers differs from the others: how it splits its first projection, and how it selects."""

    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    select: Callable[[Any, Tensor], Selection]


def make_forward(shape: Shape, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The ``forward`` of a mixer class whose own is ``original``."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.activation not in ("silu", "swish"):
            return original(self, hidden_states, *args, **kwargs)
        cache = args[0] if args else cache_among(kwargs)
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        packing = packing_of(mask, hidden_states.shape[1])
        if packing is None:
            return _mix(shape, self, hidden_states, cache, None)
        if packing.empty:
            # Zeros that depend on the weights: in training a gradient that is zero is not one that is missing.
            return packing.hold(_mix(shape, self, hidden_states, None, None))
        return packing.unpack(_mix(shape, self, packing.pack(hidden_states), cache, packing))

    return forward


def _mix(shape: Shape, mixer: Any, x: Tensor, cache: Any, packing: Packing | None) -> Tensor:
    """x (batch, length, d_model), or packed (1, tokens, d_model), to the same shape; the cache is moved on."""
    before = None if cache is None else _Memory.of(cache, mixer)
    u, z = shape.split(mixer.in_proj(x))
    grad = torch.is_grad_enabled()
    if before is not None and u.shape[1] == 1 and packing is None and not grad:
        return mixer.out_proj(_step(shape, mixer, u[:, 0], z[:, 0], cache, before).to(x.dtype)[:, None])
    weight, bias = _filter(mixer)
    raw = u
    u, _ = causal_conv1d(
        u,
        weight,
        bias,
        None if before is None else before.window(mixer, grad).to(u.dtype),
        activation="silu",
        cu_seqlens=None if packing is None else packing.cu_seqlens,
        return_final_state=True,
    )
    dt, B, C, dt_bias = shape.select(mixer, u)
    A, D = _decay(mixer, u.dtype), mixer.D.flatten()
    y, state = selective_scan(
        u,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        None if before is None else before.state(grad),
        dt_softplus=True,
        cu_seqlens=None if packing is None else packing.cu_seqlens,
        return_final_state=True,
    )
    if cache is not None:
        _remember(mixer, cache, raw, state, before, packing)
    return mixer.out_proj(y.to(x.dtype))


def _step(shape: Shape, mixer: Any, u: Tensor, z: Tensor, cache: Any, before: _Memory) -> Tensor:
    """One token: u, z (batch, channels) to y, and the cache's memory overwritten."""
    raw = u
    u, _ = causal_conv1d_update(before.window(mixer, False).to(u.dtype), u, *_filter(mixer), activation="silu")
    dt, B, C, dt_bias = shape.select(mixer, u)
    state = before.state(False)
    inplace = state.dtype == torch.float32 and u.dtype != torch.float64 and before.ssm.is_contiguous()
    y, after = selective_state_update(
        state, u, dt, _decay(mixer, u.dtype), B, C, mixer.D.flatten(), z, dt_bias, dt_softplus=True, inplace=inplace
    )
    cache.update_conv_state(raw[..., None], mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    if not inplace:
        cache.update_recurrent_state(after.view_as(before.ssm), mixer.layer_idx)
    return y


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What a cache holds for a mixer: the last inputs of its convolution, (batch, channels, at least width), and its
    state, (batch, channels, state) or (batch, heads, channels / heads, state)."""

    conv: Tensor
    ssm: Tensor

    @staticmethod
    def of(cache: Any, mixer: Any) -> _Memory | None:
        """None for a fresh cache."""
        if not cache.has_previous_state(mixer.layer_idx):
            return None
        layer = cache.layers[mixer.layer_idx]
        return _Memory(layer.conv_states[0], layer.recurrent_states[0])

    def window(self, mixer: Any, grad: bool) -> Tensor:
        """(batch, width - 1, channels). A copy where gradients are recorded: the cache is overwritten in place."""
        window = self.conv[:, :, self.conv.shape[-1] - mixer.conv_kernel_size + 1 :].transpose(1, 2)
        return window.clone() if grad else window

    def inputs(self, mixer: Any) -> Tensor:
        """(batch, width, channels), the cache's own share: one more than the convolution needs."""
        return self.conv[:, :, self.conv.shape[-1] - mixer.conv_kernel_size :].transpose(1, 2)

    def state(self, grad: bool) -> Tensor:
        """(batch, channels, state), likewise."""
        state = self.ssm.flatten(1, -2)
        return state.clone() if grad else state


def _remember(
    mixer: Any, cache: Any, u: Tensor, state: Tensor, before: _Memory | None, packing: Packing | None
) -> None:
    if packing is not None:
        # What a row of this cache has seen is its own tokens; those of the padding never were.
        inputs = None if before is None else before.inputs(mixer)
        u = packing.last(u, None if inputs is None else inputs.to(u.dtype), mixer.conv_kernel_size)
    cache.update_conv_state(u.transpose(1, 2), mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    cache.update_recurrent_state(state.unflatten(1, mixer.A_log.shape[:-1]), mixer.layer_idx)


def _filter(mixer: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(mixer.conv1d, nn.Conv1d):
        raise ArgumentError(
            f"conv1d is a {type(mixer.conv1d).__name__}, expected nn.Conv1d: only its weights are read, what is put "
            "around it would be left out; adapters can go around in_proj, x_proj, dt_proj and out_proj"
        )
    return mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias


def _decay(mixer: Any, dtype: torch.dtype) -> Tensor:
    """A, (channels, state)."""
    return -torch.exp(mixer.A_log.to(torch.promote_types(dtype, torch.float32)).flatten(0, -2))


def _split_halves(projected: Tensor) -> tuple[Tensor, Tensor]:
    u, z = projected.chunk(2, dim=-1)
    return u, z


def _split_pairs(projected: Tensor) -> tuple[Tensor, Tensor]:
    """Zamba's channels come in pairs of input and gate."""
    u, z = projected.unflatten(-1, (-1, 2)).unbind(-1)
    return u.contiguous(), z.contiguous()


def _select(mixer: Any, u: Tensor) -> Selection:
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = mixer.x_proj(u).split(sizes, dim=-1)
    dt, bias = product_and_bias(mixer.dt_proj, dt)
    return dt, B, C, bias


def _select_normed(mixer: Any, u: Tensor) -> Selection:
    """Falcon Mamba and Jamba put RMS norms on the three parts."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt, B, C = mixer.x_proj(u).split(sizes, dim=-1)
    dt, bias = product_and_bias(mixer.dt_proj, mixer.dt_layernorm(dt))
    return dt, mixer.b_layernorm(B), mixer.c_layernorm(C), bias


def _select_by_head(mixer: Any, u: Tensor) -> Selection:
    """Zamba has several heads, each with projections and a selection of its own: groups, to the scan."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    heads = u.unflatten(-1, (mixer.n_mamba_heads, -1))
    parts = torch.einsum("...hc,hrc->...hr", heads, mixer.x_proj_weight)
    dt, B, C = parts.split(sizes, dim=-1)
    dt = torch.einsum("...hr,hcr->...hc", dt, mixer.dt_proj_weight).flatten(-2)
    return dt, B.contiguous(), C.contiguous(), mixer.dt_proj_bias.flatten()


MAMBA = Shape(_split_halves, _select)
NORMED = Shape(_split_halves, _select_normed)
ZAMBA = Shape(_split_pairs, _select_by_head)
