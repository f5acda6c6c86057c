"""Matrices times a few vectors, for what stands between compiled steps: several products of one input are one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.checks import check_shape
from longscan.ops.mamba_step.matrices import check_matrix
from longscan.ops.mamba_step.pages import use_large_pages


class VectorProducts:
    """The products of a few vectors with each of some matrices, on the CPU.

    Args:
        matrices: (rows, columns) each, of the same columns, float32, bfloat16 or float16, contiguous; used where they
            lie, and kept alive.

    Raises:
        ArgumentError: no matrices, or of different columns.
        BackendError: a device, dtype or layout that it cannot read, or no Numba.
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        if not matrices or len({matrix.shape[-1] for matrix in matrices}) > 1:
            shapes = [tuple(matrix.shape) for matrix in matrices]
            raise ArgumentError(f"matrices: got shapes {shapes}, expected at least one, all of the same columns")
        for i, matrix in enumerate(matrices):
            check_matrix(f"matrices[{i}]", matrix)
            if matrix.device.type != "cpu":
                raise BackendError(f"matrices[{i}]: is on {matrix.device}, these products are the CPU's")
        try:
            from longscan.ops.mamba_step import vectors_cpu
        except ImportError as error:
            raise BackendError(f"these products need Numba, which cannot be imported here ({error})") from error
        self.matrices = tuple(matrices)
        use_large_pages(self.matrices)
        self._columns = matrices[0].shape[1]
        self._table = vectors_cpu.table(self.matrices)
        self._run = vectors_cpu.run_products

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x (batch, columns) to one (batch, rows) for each matrix, in float32."""
        check_shape("x", x, (x.shape[0], self._columns), "(batch, columns)")
        x = x.detach().float().contiguous()
        products = [torch.empty(x.shape[0], matrix.shape[0]) for matrix in self.matrices]
        outputs = np.array([product.data_ptr() for product in products], dtype=np.int64)
        self._run(self._table, outputs, x.data_ptr(), self._columns, x.shape[0])
        return products
