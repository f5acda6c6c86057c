"""What the compiled step can read of a model's weights, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.int8 import Int8Matrix

#: Numbers by which the compiled code knows the dtypes of weights and states.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MATRIX_KINDS = {**KINDS, torch.int8: 3}

#: A weight matrix as it lies in memory.
Matrix = Tensor | Int8Matrix


@dataclass(frozen=True)
class Sizes:
    """The sizes that the layers of one decoder share; all but the first are those of its Mamba layers."""

    d_model: int
    d_inner: int = 0
    d_state: int = 0
    dt_rank: int = 0
    d_conv: int = 1
    heads: int = 1

    @property
    def mixed(self) -> int:
        """dt of low rank, B and C of one head."""
        return self.dt_rank + 2 * self.d_state


def private_float32(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy of its own memory."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def address_of(matrix: Matrix) -> tuple[int, int, int]:
    """Address and kind of a matrix, and the address of its scales, 0 where it has none."""
    if isinstance(matrix, Int8Matrix):
        return matrix.values.data_ptr(), MATRIX_KINDS[matrix.dtype], matrix.scales.data_ptr()
    return matrix.data_ptr(), MATRIX_KINDS[matrix.dtype], 0


def check_readable(name: str, tensor: Tensor) -> None:
    """Raises `BackendError` unless the compiled step can read such a tensor, if need be through a copy."""
    if tensor.dtype not in KINDS and tensor.dtype != torch.float64:
        raise BackendError(f"{name}: got {tensor.dtype}, the compiled step takes real floating-point weights")


def check_matrix(name: str, matrix: Matrix) -> None:
    """Raises `BackendError` unless the compiled step can read such a matrix where it lies."""
    parts = (matrix.values, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix,)
    if isinstance(matrix, Tensor) and matrix.dtype not in KINDS:
        raise BackendError(
            f"{name}: got {matrix.dtype}, the compiled step takes float32, bfloat16, float16 and int8 with scales"
        )
    for tensor in parts:
        if not tensor.is_contiguous():
            raise BackendError(f"{name}: strides {tensor.stride()} are not contiguous; call .contiguous() first")


def check_together(first: str, device: torch.device, others: Mapping[str, Matrix | None]) -> None:
    """Raises `BackendError` unless all that is there is on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise BackendError(f"{name}: is on {tensor.device}, {first} on {device}; move the layer to one")


def check_eps(name: str, eps: float) -> None:
    """Raises `ArgumentError` unless the epsilon of a norm is a number of at least 0."""
    if not eps >= 0:
        raise ArgumentError(f"{name}: got {eps}, expected a number of at least 0")
