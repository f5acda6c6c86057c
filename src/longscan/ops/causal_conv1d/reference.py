"""The causal depthwise convolution as it is defined: plain PyTorch, forward and backward.

    pre[t] = bias + sum_k weight[k] x[t - (width - 1) + k],    y = pre or silu(pre)

where x before a sequence's start is its initial state: the width - 1 inputs that came before, oldest first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.ops.checks import ACCUMULATION, row_offsets, stacked


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def _padded(x: Tensor, initial_state: Tensor | None, i: int, where: tuple[int, int, int], width: int) -> Tensor:
    """One sequence with what came before it, (width - 1 + length, channels), in the accumulation dtype."""
    row, start, end = where
    before = x.new_zeros(width - 1, x.shape[2]) if initial_state is None else initial_state[i]
    real = ACCUMULATION[x.dtype]
    return torch.cat([before.to(real), x[row, start:end].to(real)])


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    length = padded.shape[0] - weight.shape[1] + 1
    pre = torch.zeros_like(padded[:length]) if bias is None else bias.expand(length, -1)
    for k in range(weight.shape[1]):
        pre = pre + weight[:, k] * padded[k : k + length]
    return pre


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
    batch, length, _ = x.shape
    width = weight.shape[1]
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    final = []
    for i, where in enumerate(row_offsets(batch, length, cu_seqlens)):
        padded = _padded(x, initial_state, i, where, width)
        pre = _convolve(padded, weight, bias)
        rows[where[0]].append(F.silu(pre) if silu else pre)
        final.append(padded[padded.shape[0] - (width - 1) :])
    return stacked([torch.cat(row) for row in rows]).to(x.dtype), stacked(final).to(x.dtype)


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
    width = weight.shape[1]
    real = ACCUMULATION[x.dtype]
    sequences = row_offsets(batch, length, cu_seqlens)
    dx = torch.zeros_like(x, dtype=real)
    dweight = torch.zeros_like(weight, dtype=real)
    dbias = torch.zeros(channels, dtype=real, device=x.device)
    dinitial = torch.zeros((len(sequences), width - 1, channels), dtype=real, device=x.device)
    for i, where in enumerate(sequences):
        row, start, end = where
        padded = _padded(x, initial_state, i, where, width)
        dpre = dy[row, start:end].to(real)
        if silu:
            pre = _convolve(padded, weight, bias)
            sigmoid = torch.sigmoid(pre)
            dpre = dpre * sigmoid * (1 + pre * (1 - sigmoid))
        dpadded = torch.zeros_like(padded)
        dpadded[padded.shape[0] - (width - 1) :] += dfinal[i].to(real)
        for k in range(width):
            dpadded[k : k + end - start] += weight[:, k] * dpre
            dweight[:, k] += (dpre * padded[k : k + end - start]).sum(0)
        dbias += dpre.sum(0)
        dx[row, start:end] = dpadded[width - 1 :]
        dinitial[i] = dpadded[: width - 1]
    return (
        dx.to(x.dtype),
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if initial_state is None else dinitial.to(initial_state.dtype),
    )


def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """One step from `state` (batch, width - 1, channels), which is overwritten; x (batch, channels)."""
    y, final = forward(x[:, None], weight, bias, state, None, silu=silu)
    state.copy_(final)
    return y[:, 0]
