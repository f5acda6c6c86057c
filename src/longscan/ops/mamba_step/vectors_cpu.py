"""The kernels of `vectors`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from longscan.ops.jit import kernel, parallel_kernel, prange, run, threads
from longscan.ops.mamba_step.layout import ROW_UNIT
from longscan.ops.mamba_step.matrices import address_of
from longscan.ops.mamba_step.phases import block, item
from longscan.ops.mamba_step.products import product


@kernel
def _part(task, tasks, table, outputs, x, columns, batch):  # type: ignore[no-untyped-def]
    """A task's share of the rows of each matrix."""
    for i in range(len(outputs)):
        matrix, kind, rows = table[i, 0], table[i, 1], table[i, 2]
        first, last = block(task, tasks, rows, ROW_UNIT)
        product(
            kind, matrix, columns * item(kind), 0, first, last, columns, 0,
            x, 4 * columns, batch, outputs[i] + 4 * first, 4 * rows,
        )  # fmt: skip


@parallel_kernel
def _every_part(parts, tasks, table, outputs, x, columns, batch):  # type: ignore[no-untyped-def]
    for task in prange(parts):
        _part(task, tasks, table, outputs, x, columns, batch)


def table(matrices: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    """(matrices, 3) int64: address, kind and rows of each."""
    return np.array([(*address_of(matrix)[:2], matrix.shape[0]) for matrix in matrices], dtype=np.int64)


def run_products(rows: np.ndarray[Any, Any], outputs: np.ndarray[Any, Any], x: int, columns: int, batch: int) -> None:
    """The products of the vectors at x, as `table` and the addresses of outputs (batch, rows) say."""
    run(_every_part, _part, threads(), threads(), rows, outputs, x, columns, batch)
