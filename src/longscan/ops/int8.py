"""Matrices in int8, a byte a weight: each row in groups of columns, each group with a scale of its own.

A weight is `scale * value`, value in -127 .. 127, the scale that of its row and its group of `GROUP` columns (the last
group of a row may be shorter), the group's largest magnitude over 127: symmetric round-to-nearest quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops.checks import check_floating, check_shape, check_tensors

#: Columns that share a scale: a scale is 3% of the bytes it scales.
GROUP = 128

_LARGEST = 127


@dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A quantised matrix.

    Args:
        values: (rows, columns) int8.
        scales: (rows, ceil(columns / GROUP)) float32.

    Raises:
        ArgumentError: other shapes, dtypes, or two devices.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        if values.dtype != torch.int8 or values.dim() != 2:
            raise ArgumentError(
                f"values: got {values.dtype} of shape {tuple(values.shape)}, expected int8 (rows, columns)"
            )
        if scales.dtype != torch.float32:
            raise ArgumentError(f"scales: got {scales.dtype}, expected float32")
        check_shape("scales", scales, (values.shape[0], groups(values.shape[1])), f"(rows, ceil(columns / {GROUP}))")
        check_tensors(values=values, scales=scales)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dim(self) -> int:
        return 2

    def rows(self, index: Tensor) -> Tensor:
        """Rows by their numbers, any shape of integers, to (..., columns) float32."""
        return dequantize(self.values[index], self.scales[index])

    def dense(self) -> Tensor:
        """The whole matrix in float32."""
        return dequantize(self.values, self.scales)


def groups(columns: int) -> int:
    """Scales of a row."""
    return -(-columns // GROUP)


def quantize(matrix: Tensor) -> Int8Matrix:
    """A matrix (rows, columns) of real floating-point numbers, each rounded to the nearest multiple of its scale.

    Raises:
        ArgumentError: no such matrix, or numbers in it that are not finite.
    """
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ArgumentError(f"matrix: got shape {tuple(matrix.shape)}, expected two axes, each at least 1")
    check_floating("matrix", matrix)
    rows, columns = matrix.shape
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    padded = torch.nn.functional.pad(wide, (0, groups(columns) * GROUP - columns)).view(rows, -1, GROUP)
    largest = padded.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ArgumentError("matrix: holds numbers that are not finite, which int8 cannot say")
    scales = (largest / _LARGEST).float()
    # A group so small that its scale is 0 is all zeros.
    values = padded / torch.where(scales > 0, scales, torch.inf).unsqueeze(-1)
    values = values.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return Int8Matrix(values.view(rows, -1)[:, :columns].contiguous(), scales)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """(..., columns) int8 and (..., groups) scales to (..., columns) in the scales' dtype."""
    columns = values.shape[-1]
    return values * scales.repeat_interleave(GROUP, dim=-1)[..., :columns]
