"""The operators in plain ATen, for graphs that leave PyTorch: one step, written over the whole batch.

A runtime that is not PyTorch knows nothing of ours. :func:`one_step` takes the operators of an exported program apart,
for sequences of length 1: a graph has no loop over time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import ArgumentError
from longscan.ops.add_rms_norm import reference as add_rms_norm
from longscan.ops.checks import ACCUMULATION


def one_step() -> dict[Any, Callable[..., Any]]:
    """Operator to function, for :meth:`torch.export.ExportedProgram.run_decompositions`."""
    ops = torch.ops.longscan
    return {
        ops.selective_scan.default: _selective_scan,
        ops.causal_conv1d.default: _causal_conv1d,
        ops.add_rms_norm.default: _add_rms_norm,
    }


def _check_length(operator: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None or x.shape[1] != 1:
        raise ArgumentError(
            f"{operator}: plain ATen serves one step, a length of 1 without cu_seqlens; got shape {tuple(x.shape)}"
        )


def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_length("selective_scan", x, cu_seqlens)
    real = ACCUMULATION[x.dtype]
    u, delta = x[:, 0].to(real), dt[:, 0].to(real)
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    state = torch.exp(delta.unsqueeze(-1) * A)
    drive = (delta * u).unsqueeze(-1) * _per_channel(B, x.shape[2])
    state = drive.to(state.dtype) if initial_state is None else state * initial_state + drive
    y = (_per_channel(C, x.shape[2]) * state).sum(-1)
    if y.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z[:, 0].to(real))
    return y.unsqueeze(1).to(x.dtype), state, x.new_empty((0,), dtype=state.dtype)


def _per_channel(tensor: Tensor, channels: int) -> Tensor:
    """B or C of one step for every channel: (channels, state) as it is, groups (batch, 1, groups, state) repeated."""
    if tensor.dim() == 2:
        return tensor
    groups = tensor.shape[2]
    tensor = tensor[:, 0].to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor if groups == 1 else tensor.repeat_interleave(channels // groups, dim=1)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_length("causal_conv1d", x, cu_seqlens)
    before = x.new_zeros((x.shape[0], weight.shape[1] - 1, x.shape[2])) if initial_state is None else initial_state
    window = torch.cat([before, x], dim=1)
    y = (window.to(weight.dtype) * weight.T).sum(1, keepdim=True)
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    return y.to(x.dtype), window[:, 1:].clone()


def _add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return add_rms_norm.forward(x, weight, residual, eps=eps, residual_dtype=residual_dtype)
