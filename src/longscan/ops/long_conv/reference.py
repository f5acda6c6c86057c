"""The long convolution as it is defined: plain PyTorch, a direct sum over lags, forward and backward.

This file is the specification that every other backend is tested against. Per channel, with x the inputs of the past
and the present in a row, P of the past:

    y[t] = sum_l k[l] x[P + t - l]
    dx[s] = sum_l k[l] dy[s + l - P],    dk[l] = sum_t dy[t] x[P + t - l]

x is zero before its first entry, dy outside of the output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def _sequences(
    u: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[slice, slice, Tensor, Tensor | None]]:
    """Where each stretch of rows lies in u (rows, times), its inputs, and its past: packed ones are a row each."""
    if cu_seqlens is None:
        return [(slice(None), slice(None), u, past)]
    borders = pairwise(cu_seqlens.tolist())
    return [
        (slice(None), slice(start, end), u[:, start:end], None if past is None else past[i : i + 1])
        for i, (start, end) in enumerate(borders)
    ]


def _joined(u: Tensor, past: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (u if past is None else torch.cat((past, u), dim=1)).to(dtype)


def _per_channel(kernel: Tensor, channels: int) -> Tensor:
    return kernel.repeat_interleave(channels // kernel.shape[0], dim=0)


def forward(u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Output (batch, length, channels) in u's dtype. Differentiable by autograd as it stands."""
    taps = _per_channel(kernel, u.shape[2])
    out = []
    for _, _, now, before in _sequences(u, past, cu_seqlens):
        x = _joined(now, before, ACCUMULATION[u.dtype])
        y = torch.zeros_like(x)
        for lag in range(min(taps.shape[1], x.shape[1])):
            y = y + torch.nn.functional.pad(taps[:, lag] * x[:, : x.shape[1] - lag], (0, 0, lag, 0))
        out.append(y[:, x.shape[1] - now.shape[1] :])
    return torch.cat(out, dim=1).to(u.dtype)


def backward(
    dy: Tensor, u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, kernel and past (None where there is none)."""
    real = ACCUMULATION[u.dtype]
    taps = _per_channel(kernel, u.shape[2])
    du, dtaps = torch.zeros_like(u), torch.zeros_like(taps)
    dpast = []
    for rows, times, now, before in _sequences(u, past, cu_seqlens):
        x = _joined(now, before, real)
        size, first = x.shape[1], x.shape[1] - now.shape[1]
        dout = torch.nn.functional.pad(dy[rows, times].to(real), (0, 0, first, 0))
        dx = torch.zeros_like(x)
        for lag in range(min(taps.shape[1], size)):
            dx[:, : size - lag] += taps[:, lag] * dout[:, lag:]
            dtaps[:, lag] += (dout[:, lag:] * x[:, : size - lag]).sum((0, 1))
        du[rows, times] = dx[:, first:].to(u.dtype)
        dpast.append(dx[:, :first])
    dkernel = dtaps.unflatten(0, (kernel.shape[0], -1)).sum(1)
    return du, dkernel, None if past is None else torch.cat(dpast).to(past.dtype)
