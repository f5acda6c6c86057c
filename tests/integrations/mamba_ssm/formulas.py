"""The definitions of these packages' functions, written out in float64 and in their layout, and what tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length) and the last state, one time step after another."""
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def at(tensor: Tensor, t: int) -> Tensor:
        """(batch or 1, channels, state)."""
        if tensor.dim() == 2:
            return tensor[None]
        if tensor.dim() == 3:
            tensor = tensor[:, None]
        here = torch.complex(tensor[..., 2 * t], tensor[..., 2 * t + 1]) if A.is_complex() else tensor[..., t]
        return here.repeat_interleave(channels // here.shape[1], dim=1)

    h = torch.zeros(batch, *A.shape, dtype=A.dtype)
    steps = []
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * at(B, t)
        y = (h * at(C, t)).sum(-1)
        steps.append(2 * y.real if A.is_complex() else y)
    out = torch.stack(steps, dim=2)
    if D is not None:
        out = out + D[:, None] * u
    return out if z is None else out * F.silu(z), h


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y (batch, channels, length), and the last width - 1 inputs."""
    before = weight.shape[1] - 1
    padded = F.pad(x, (before, 0)) if initial is None else torch.cat([initial, x], dim=-1)
    y = F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])
    return F.silu(y) if silu else y, padded[..., padded.shape[2] - before :]


def leaves(tensors: Sequence[Any], double: bool = False) -> list[Any]:
    """Copies to differentiate by; with `double` in float64 or complex128."""

    def leaf(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if double:
            tensor = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
        # Strides stay: they are part of what is tested.
        return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    return [leaf(tensor) for tensor in tensors]


def agree(
    function: Callable[..., Any], formula: Callable[..., Any], tensors: Sequence[Any], tolerance: float = 2e-4
) -> None:
    """Outputs, and the gradients of all tensors for a random weighting of the outputs, against float64."""
    ours, exact = leaves(tensors), leaves(tensors, double=True)
    pairs = list(zip(_tuple(function(*ours)), _tuple(formula(*exact)), strict=True))
    generator = torch.Generator().manual_seed(1)
    found, wanted = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for got, expected in pairs:
        assert got.shape == expected.shape
        close(got, expected, tolerance)
        weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        found = found + (got.real * weights.to(got.real.dtype)).sum()
        wanted = wanted + (expected.real * weights).sum()
    found.backward()
    wanted.backward()
    for index, (got, expected) in enumerate(zip(ours, exact, strict=True)):
        if isinstance(got, Tensor):
            assert (got.grad is None) == (expected.grad is None), f"gradient of argument {index}"
            if got.grad is not None:
                close(got.grad, expected.grad, tolerance)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Within a tolerance relative to the largest number."""
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=tolerance, atol=tolerance * scale)


def _tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)
