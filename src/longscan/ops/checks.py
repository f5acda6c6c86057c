"""Checks that operators share: shapes, dtypes and devices of their arguments, offsets of packed sequences; outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longscan.errors import ArgumentError, LongscanError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACCUMULATION = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}

#: The real dtype that goes with a complex one.
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises `ArgumentError` unless `tensor` has exactly `shape`; `meaning` names the axes."""
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape} = {meaning}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises `ArgumentError` unless `tensor` is of a real floating dtype that the operators take."""
    if tensor.dtype not in FLOATING:
        raise ArgumentError(f"{name}: got {tensor.dtype}, allowed are float32, bfloat16, float16 and float64")


def check_number(name: str, tensor: Tensor) -> None:
    """Raises `ArgumentError` unless `tensor` is of a floating dtype that the operators take, real or complex."""
    if tensor.dtype not in FLOATING and tensor.dtype not in REAL:
        allowed = "float32, bfloat16, float16, float64, complex64 and complex128"
        raise ArgumentError(f"{name}: got {tensor.dtype}, allowed are {allowed}")


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises `ArgumentError` naming the first tensor that is not on the device of the first one, or has a tangent."""
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ArgumentError(f"{name}: is on {tensor.device}, expected {device} like the first argument")
    refuse_tangents(**tensors)


def refuse_tangents(**tensors: Tensor | None) -> None:
    """Raises `ArgumentError` naming the first tensor that forward-mode differentiation is under way for.

    PyTorch's custom operators have none: they would drop the tangent, and give a wrong derivative without a word.
    """
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ArgumentError(
                f"{name}: has a tangent, and the operators have no forward-mode derivative (jvp, jacfwd); use "
                "torch.autograd.grad, or differentiate an operator's definition, reference.forward"
            )


def prepare_cu_seqlens(cu_seqlens: Tensor, batch: int, device: torch.device) -> Tensor:
    """Checks the form of `cu_seqlens` and returns it as int64 on `device`.

    Args:
        cu_seqlens: (num_sequences + 1,) integers: where each packed sequence starts, and the end of the last one.
        batch: the batch size of the packed row; must be 1.

    Raises:
        ArgumentError: no tensor, not one-dimensional, not integers, fewer than 2 entries, or a batch other than 1.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"cu_seqlens: got a {type(cu_seqlens).__name__}, expected a tensor of offsets")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ArgumentError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (num_sequences + 1,) with at least 2 entries"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"cu_seqlens: got {cu_seqlens.dtype}, allowed are int32 and int64")
    if batch != 1:
        raise ArgumentError(f"cu_seqlens: packed sequences share one row, so batch must be 1; got {batch}")
    return cu_seqlens.to(device=device, dtype=torch.int64)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether to look at a tensor's values: always on the CPU; elsewhere it would stall the device, so only on request.

    Set LONGSCAN_CHECK=1 to look everywhere.
    """
    return tensor.device.type == "cpu" or os.environ.get("LONGSCAN_CHECK", "0") == "1"


def check_offsets(cu_seqlens: Tensor, length: int) -> None:
    """Raises `ArgumentError` unless the offsets start at 0, never decrease and end at `length`."""
    if not values_are_checked(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length:
        raise ArgumentError(
            f"cu_seqlens: starts at {offsets[0]} and ends at {offsets[-1]}, expected 0 and the length {length}"
        )
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ArgumentError(f"cu_seqlens: decreases from {offsets[i - 1]} to {offsets[i]} at entry {i}")


def row_offsets(batch: int, length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """The sequences of a call as (row, start, end), whether they are rows of a batch or packed in one row."""
    if cu_seqlens is None:
        return [(row, 0, length) for row in range(batch)]
    offsets = cu_seqlens.tolist()
    return [(0, start, end) for start, end in pairwise(offsets)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` into memory of its own.

    PyTorch's gives a view; of an operator's outputs autograd would then forbid the caller to change them in place.
    """
    return torch.cat([tensor[None] for tensor in tensors])


def activation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype the activations of one call are brought to: autocast's where it is on, else their common promotion."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = given[0].dtype
    for tensor in given[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def once_differentiable(operator: str) -> None:
    """Makes differentiating a backward operator an error that says so, where PyTorch would only warn."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise LongscanError(
            f"{operator}: has no second derivative; drop create_graph=True, or differentiate its definition, "
            "reference.forward"
        )

    torch.library.register_autograd(f"longscan::{operator}_backward", refuse)
