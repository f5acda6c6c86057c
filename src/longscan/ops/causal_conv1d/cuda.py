"""The causal convolution in CUDA C++ (conv.cu), for NVIDIA GPUs of compute capability 8.0 and later."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longscan.ops import nvrtc
from longscan.ops.nvrtc import FORMATS, addresses, rows

_SOURCE = Path(__file__).parent / "conv.cu"
# Steps of a thread, and threads of a block.
_PIECE = 64
_THREADS = 128

# The longest filter that stays in registers.
_WIDEST = 8


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    if x.dtype not in FORMATS:
        return f"its kernels take float32, bfloat16 and float16, not {x.dtype}"
    if weight.shape[1] > _WIDEST:
        return f"it serves filters up to {_WIDEST} taps, not {weight.shape[1]}"
    return nvrtc.refuse_device(x.device.index or 0)


def _in_pairs(*tensors: Tensor | None) -> bool:
    """Whether two neighbouring channels of every row can be moved at once."""
    return all(
        tensor is None
        or not (
            tensor.shape[-1] % 2
            or tensor.data_ptr() % (2 * tensor.element_size())
            or any(stride % 2 for stride in tensor.stride()[:-1])
        )
        for tensor in tensors
    )


@cache
def _kernel(
    name: str, dtype: torch.dtype, packed: bool, width: int, silu: bool, pair: bool, device: int
) -> nvrtc.Kernel:
    options = {
        "FORMAT": FORMATS[dtype], "PACKED": packed, "WIDTH": width, "SILU": silu, "PIECE": _PIECE, "PAIR": pair,
    }  # fmt: skip
    return nvrtc.kernel(_SOURCE, name, nvrtc.macros(options), device)


def _grid(x: Tensor, packed: int | None, pair: bool) -> tuple[int, int]:
    """Pieces, at most, and blocks."""
    pieces = nvrtc.pieces(x.shape[0], x.shape[1], packed, _PIECE)
    threads = x.shape[2] // 2 if pair else x.shape[2]
    return pieces, pieces * -(-threads // _THREADS)


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
    with torch.cuda.device(x.device):
        batch, length, channels = x.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        x, weight, bias = rows(x), weight.float().contiguous(), None if bias is None else bias.float().contiguous()
        state = None if initial_state is None else rows(initial_state)
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        final = torch.empty((sequences, weight.shape[1] - 1, channels), dtype=x.dtype, device=x.device)
        pair = _in_pairs(x, state, y, final)
        _, blocks = _grid(x, None if offsets is None else sequences, pair)
        strides = (*x.stride()[:2], *((0, 0) if state is None else state.stride()[:2]))
        run = _kernel("conv_forward", x.dtype, offsets is not None, weight.shape[1], silu, pair, x.device.index or 0)
        tensors = addresses(x, weight, bias, state, y, final, offsets)
        run.launch(blocks, _THREADS, (*tensors, *strides, sequences, length, channels))
        return y, final


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
    with torch.cuda.device(x.device):
        batch, length, channels = x.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dy, x, dfinal = rows(dy.to(x.dtype)), rows(x), dfinal.to(x.dtype).contiguous()
        taps, shift = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
        state = None if initial_state is None else rows(initial_state)
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dstate = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
        pair = _in_pairs(dy, x, dfinal, state, dx, dstate)
        pieces, blocks = _grid(x, None if offsets is None else sequences, pair)
        width = weight.shape[1]
        dweight = torch.empty((pieces, width, channels), dtype=torch.float32, device=x.device)
        dbias = torch.empty((pieces, channels), dtype=torch.float32, device=x.device)
        own = (0, 0) if state is None else state.stride()[:2]
        strides = (*dy.stride()[:2], *x.stride()[:2], *own, *dx.stride()[:2])
        run = _kernel("conv_backward", x.dtype, offsets is not None, width, silu, pair, x.device.index or 0)
        tensors = addresses(dy, dfinal, x, taps, shift, state, dx, dstate, dweight, dbias, offsets)
        run.launch(blocks, _THREADS, (*tensors, *strides, sequences, length, channels))
        return (
            dx,
            dweight.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format),
            None if bias is None else dbias.sum(0).to(bias.dtype),
            dstate,
        )


def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """One step in place: Triton's kernel."""
    from longscan.ops.causal_conv1d import triton

    return triton.update(state, x, weight, bias, silu=silu)
