"""Int8 matrices: what rounding costs at most, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.ops.int8 import GROUP, Int8Matrix, groups, quantize


@pytest.mark.parametrize("columns", [1, 5, GROUP, GROUP + 1, 3 * GROUP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounds_to_the_nearest_multiple_of_a_groups_scale(columns: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(7, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix[3] *= 1000
    packed = quantize(matrix)
    assert packed.values.shape == packed.shape == (7, columns)
    assert packed.scales.shape == (7, groups(columns))
    steps = packed.scales.double().repeat_interleave(GROUP, 1)[:, :columns]
    error = (packed.dense().double() - matrix.double()).abs()
    assert bool((error <= (0.5 + 1e-4) * steps).all())
    for start in range(0, columns, GROUP):
        largest = matrix[:, start : start + GROUP].double().abs().amax(1)
        torch.testing.assert_close(127 * packed.scales[:, start // GROUP].double(), largest)
        assert bool((packed.values[:, start : start + GROUP].abs().amax(1) == 127).all())


def test_rows_are_rows_of_the_whole() -> None:
    packed = quantize(torch.randn(9, 200))
    index = torch.tensor([[1, 8], [3, 1]])
    assert torch.equal(packed.rows(index), packed.dense()[index])


def test_zeros_and_numbers_too_small_for_a_scale_are_zeros() -> None:
    matrix = torch.zeros(2, 4, dtype=torch.float64)
    matrix[1] = 1e-60
    assert torch.equal(quantize(matrix).dense(), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"matrix: got shape \(3,\)"),
        (torch.zeros(0, 3), r"matrix: got shape \(0, 3\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "matrix: got torch.int64"),
        (torch.tensor([[1.0, float("nan")]]), "matrix: holds numbers that are not finite"),
        (torch.tensor([[1.0, -float("inf")]]), "matrix: holds numbers that are not finite"),
    ],
)
def test_quantize_refuses(matrix: torch.Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quantize(matrix)


def test_a_matrix_refuses_parts_that_do_not_fit() -> None:
    values, scales = torch.zeros(2, 200, dtype=torch.int8), torch.zeros(2, 2)
    Int8Matrix(values, scales)
    with pytest.raises(ArgumentError, match=r"values: got torch.float32 of shape \(2, 200\), expected int8"):
        Int8Matrix(values.float(), scales)
    with pytest.raises(ArgumentError, match=r"scales: got torch\.bfloat16, expected float32"):
        Int8Matrix(values, scales.bfloat16())
    with pytest.raises(ArgumentError, match=r"scales: got shape \(2, 1\), expected \(2, 2\)"):
        Int8Matrix(values, scales[:, :1])
    with pytest.raises(ArgumentError, match="scales: is on meta"):
        Int8Matrix(values, scales.to("meta"))
