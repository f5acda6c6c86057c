"""From these packages' layout, (batch, channels, length), to ours, (batch, length, channels), by views alone."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from longscan.errors import ArgumentError


def channels_last(x: Tensor) -> Tensor:
    """(batch, channels, length) as (batch, length, channels) and the other way round; a view.

    What comes from a linear layer and was transposed lies channel-last in memory already, so that nothing is copied on
    its way to the kernels.
    """
    return x.transpose(1, 2)


def varying(name: str, tensor: Tensor, length: int, is_complex: bool) -> Tensor:
    """B or C as `longscan.ops.selective_scan` takes it.

    Args:
        name: "B" or "C", for messages.
        tensor: (channels, state), which stays as it is; (batch, state, length) or (batch, groups, state, length). For
            a complex A the last axis of the two latter is 2 length: real, imaginary, real, ... along the time.
        length: of the sequence.
        is_complex: whether A is.

    Returns:
        (channels, state), (batch, length, state) or (batch, length, groups, state).

    Raises:
        ArgumentError: another number of axes, or a last axis of another length.
    """
    if tensor.dim() == 2:
        return tensor
    along = "2 length" if is_complex else "length"
    if tensor.dim() not in (3, 4):
        raise ArgumentError(
            f"{name}: got shape {tuple(tensor.shape)}, expected (channels, state), (batch, state, {along}) or "
            f"(batch, groups, state, {along})"
        )
    expected = 2 * length if is_complex else length
    if tensor.shape[-1] != expected:
        raise ArgumentError(f"{name}: got a last axis of {tensor.shape[-1]}, expected {expected} = {along}")
    if is_complex:
        tensor = as_complex(tensor.unflatten(-1, (length, 2)))
    return tensor.movedim(-1, 1)


def as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) real and imaginary parts to (...) complex64, or complex128 from float64."""
    wide = torch.promote_types(pairs.dtype, torch.float32)
    return torch.complex(*pairs.to(wide).unbind(-1))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which operators keep their arguments' dtypes, as these packages' functions do under autocast too."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd watches any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def activation_name(activation: str | None) -> str | None:
    """None or "silu" from what the packages take: None, "silu" or "swish"."""
    if activation not in (None, "silu", "swish"):
        raise ArgumentError(f"activation: got {activation!r}, allowed are None, 'silu' and 'swish'")
    return None if activation is None else "silu"
