"""The causal convolution in Triton: any GPU that Triton serves, and the CPU through its interpreter (for tests)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from longscan.ops.causal_conv1d.triton_kernels import (
    backward_kernel,
    final_state_kernel,
    forward_kernel,
    state_gradient_kernel,
    step_kernel,
)
from longscan.ops.triton_utils import channels_together, on_its_device, pieces, refuse_dtype, row_strides

# Steps and channels of a program, and steps it takes at once.
_PIECE = 64
_TILE = 16
_BLOCK = 128


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    return refuse_dtype(x)


def _options(weight: Tensor, bias: Tensor | None, packed: bool) -> dict[str, Any]:
    return {
        "PACKED": packed,
        "WIDTH": weight.shape[1],
        "HAS_BIAS": bias is not None,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(weight.shape[0])),
        "num_warps": 4,
    }


def _state_strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if state is None else state.stride()


@on_its_device
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, channels) and final states (sequences, width - 1, channels), both in x's dtype."""
    batch, length, channels = x.shape
    x = channels_together(x)
    packed = cu_seqlens is not None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty((sequences, weight.shape[1] - 1, channels), dtype=x.dtype, device=x.device)
    options = {**_options(weight, bias, packed), "HAS_STATE": initial_state is not None}
    blocks = triton.cdiv(channels, options["BLOCK"])
    states = _state_strides(initial_state)
    forward_kernel[(pieces(batch * length, sequences, _PIECE) * blocks,)](
        x, weight, bias, initial_state, y, cu_seqlens,
        *row_strides(x, packed), *states, *weight.stride(), *row_strides(y, packed), sequences, length, channels,
        SILU=silu, PIECE=_PIECE, TILE=_TILE, **options,
    )  # fmt: skip
    if final.numel():
        final_state_kernel[(sequences * blocks,)](
            x, initial_state, final, cu_seqlens, *row_strides(x, packed), *states, length, channels,
            **{name: value for name, value in options.items() if name != "HAS_BIAS"},
        )  # fmt: skip
    return y, final


@on_its_device
def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state (None where the argument is None)."""
    batch, length, channels = x.shape
    dy, x = channels_together(dy), channels_together(x)
    packed = cu_seqlens is not None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = weight.shape[1]
    bias = None if bias is None else bias.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = pieces(batch * length, sequences, _PIECE)
    # Pieces that no sequence fills are never visited: their partial sums stay zero.
    dweight = torch.zeros((count, width, channels), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.zeros((count, channels), dtype=torch.float32, device=x.device)
    dstate = None
    if initial_state is not None:
        dstate = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    options = {**_options(weight, bias, packed), "SILU": silu}
    blocks = triton.cdiv(channels, options["BLOCK"])
    arguments = (
        dy, dfinal, x, weight, bias, initial_state, dx, dstate, dweight, dbias, cu_seqlens,
        *row_strides(dy, packed), *dfinal.stride(), *row_strides(x, packed), *_state_strides(initial_state),
        *weight.stride(), *row_strides(dx, packed), sequences, length, channels,
    )  # fmt: skip
    backward_kernel[(count * blocks,)](
        *arguments, HAS_STATE=initial_state is not None, TAPS=triton.next_power_of_2(width), PIECE=_PIECE, TILE=_TILE,
        **options,
    )  # fmt: skip
    if dstate is not None and dstate.numel():
        state_gradient_kernel[(sequences * blocks,)](*arguments, **options)
    return (
        dx,
        dweight.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format),
        None if bias is None or dbias is None else dbias.sum(0).to(bias.dtype),
        dstate,
    )


@on_its_device
def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """One step from `state` (batch, width - 1, channels), which is overwritten; x (batch, channels)."""
    batch, channels = x.shape
    x = channels_together(x)
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(channels))
    step_kernel[(batch * triton.cdiv(channels, block),)](
        state, x, weight, None if bias is None else bias.contiguous(), y,
        *state.stride(), x.stride(0), *weight.stride(), channels,
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y
