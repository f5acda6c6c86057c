"""The residual sum and RMSNorm on a CPU: Numba kernels over explicit SIMD vectors.

A task is a run of rows. The number of runs follows from the number of rows alone, so that the weight's gradient is
summed in the same order whatever the threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longscan.ops.jit import kernel, parallel_kernel, run
from longscan.ops.simd import HAS_FLOAT16, VECTOR_BYTES, WIDTH, broadcast, fma, total
from longscan.ops.simd_memory import FORMATS, aligned, load, load_scalar, read, store, store_scalar, write

# Addresses (0: absent), rows' strides in bytes, formats and sizes of a call.
X, RESIDUAL, WEIGHT, NORMED, STREAM, RSTD, DNORMED, DSTREAM, DX, DRESIDUAL, DWEIGHT = range(11)
X_ROW, RESIDUAL_ROW, DNORMED_ROW, DSTREAM_ROW, STREAM_ROW = range(11, 16)
X_FORMAT, X_ITEM, STREAM_FORMAT, STREAM_ITEM, ROWS, CHANNELS, RUNS = range(16, 23)
ARGUMENTS = 23

# Runs of rows at most.
_RUNS = 16


@kernel
def _forward(task, a, eps):  # type: ignore[no-untyped-def]
    channels = a[CHANNELS]
    vectors = (channels + WIDTH - 1) // WIDTH
    keep, sums = aligned(vectors)
    for row in range(task * a[ROWS] // a[RUNS], (task + 1) * a[ROWS] // a[RUNS]):
        squares = broadcast(0.0)
        for k in range(vectors):
            lanes = min(WIDTH, channels - k * WIDTH)
            value = read(a[X] + row * a[X_ROW] + k * WIDTH * a[X_ITEM], a[X_FORMAT], lanes)
            if a[RESIDUAL]:
                address = a[RESIDUAL] + row * a[RESIDUAL_ROW] + k * WIDTH * a[STREAM_ITEM]
                value = value + read(address, a[STREAM_FORMAT], lanes)
            address = a[STREAM] + row * a[STREAM_ROW] + k * WIDTH * a[STREAM_ITEM]
            write(value, address, a[STREAM_FORMAT], lanes)
            # What is normalised is the stream as it is kept.
            value = read(address, a[STREAM_FORMAT], lanes)
            store(value, sums + k * VECTOR_BYTES)
            squares = fma(value, value, squares)
        rstd = np.float32(1.0 / np.sqrt(total(squares) / np.float32(channels) + np.float32(eps)))
        store_scalar(rstd, a[RSTD] + 4 * row)
        for k in range(vectors):
            lanes = min(WIDTH, channels - k * WIDTH)
            normed = load(sums + k * VECTOR_BYTES) * rstd * load(a[WEIGHT] + k * VECTOR_BYTES)
            write(normed, a[NORMED] + (row * channels + k * WIDTH) * a[X_ITEM], a[X_FORMAT], lanes)
    # Addresses do not keep arrays alive.
    keep[0] = 0.0


@parallel_kernel
def _forward_driver(tasks, a, eps):  # type: ignore[no-untyped-def]
    for task in prange(tasks):
        _forward(task, a, eps)


@kernel
def _backward(task, a):  # type: ignore[no-untyped-def]
    channels = a[CHANNELS]
    vectors = (channels + WIDTH - 1) // WIDTH
    keep, scratch = aligned(3 * vectors)
    units, grads, dweights = scratch, scratch + vectors * VECTOR_BYTES, scratch + 2 * vectors * VECTOR_BYTES
    for k in range(vectors):
        store(broadcast(0.0), dweights + k * VECTOR_BYTES)
    for row in range(task * a[ROWS] // a[RUNS], (task + 1) * a[ROWS] // a[RUNS]):
        rstd = load_scalar(a[RSTD] + 4 * row)
        products = broadcast(0.0)
        for k in range(vectors):
            lanes, place = min(WIDTH, channels - k * WIDTH), k * VECTOR_BYTES
            address = a[STREAM] + row * a[STREAM_ROW] + k * WIDTH * a[STREAM_ITEM]
            unit = read(address, a[STREAM_FORMAT], lanes) * rstd
            g = read(a[DNORMED] + row * a[DNORMED_ROW] + k * WIDTH * a[X_ITEM], a[X_FORMAT], lanes)
            store(fma(g, unit, load(dweights + place)), dweights + place)
            g = g * load(a[WEIGHT] + place)
            products = fma(g, unit, products)
            store(unit, units + place)
            store(g, grads + place)
        mean = total(products) / np.float32(channels)
        for k in range(vectors):
            lanes, place = min(WIDTH, channels - k * WIDTH), k * VECTOR_BYTES
            dstream = read(a[DSTREAM] + row * a[DSTREAM_ROW] + k * WIDTH * a[STREAM_ITEM], a[STREAM_FORMAT], lanes)
            dstream = dstream + rstd * (load(grads + place) - load(units + place) * mean)
            write(dstream, a[DX] + (row * channels + k * WIDTH) * a[X_ITEM], a[X_FORMAT], lanes)
            if a[DRESIDUAL]:
                address = a[DRESIDUAL] + (row * channels + k * WIDTH) * a[STREAM_ITEM]
                write(dstream, address, a[STREAM_FORMAT], lanes)
    for k in range(vectors):
        store(load(dweights + k * VECTOR_BYTES), a[DWEIGHT] + (task * vectors + k) * VECTOR_BYTES)
    keep[0] = 0.0


@parallel_kernel
def _backward_driver(tasks, a):  # type: ignore[no-untyped-def]
    for task in prange(tasks):
        _backward(task, a)


def unsupported(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    """Serves float32, bfloat16 and float16."""
    for tensor in (x, residual):
        if tensor is not None and tensor.dtype not in FORMATS:
            return f"it computes in float32, a tensor is {tensor.dtype}"
        if tensor is not None and tensor.dtype == torch.float16 and not HAS_FLOAT16:
            return "this processor does not convert float16"
    return None


class _Call:
    """A call's arguments in the form the kernels take; keeps the tensors alive."""

    def __init__(
        self, rows: int, channels: int, x_dtype: torch.dtype, stream_dtype: torch.dtype, weight: Tensor
    ) -> None:
        self.alive: list[Tensor] = []
        self.table = a = np.zeros(ARGUMENTS, dtype=np.int64)
        a[ROWS], a[CHANNELS], a[RUNS] = rows, channels, min(rows, _RUNS)
        a[X_FORMAT], a[X_ITEM] = FORMATS[x_dtype], x_dtype.itemsize
        a[STREAM_FORMAT], a[STREAM_ITEM] = FORMATS[stream_dtype], stream_dtype.itemsize
        self.padded = -(-channels // WIDTH) * WIDTH
        if self.padded != channels or not weight.is_contiguous():
            whole = weight.new_zeros(self.padded)
            whole[:channels] = weight
            weight = whole
        self.alive.append(weight)
        a[WEIGHT] = weight.data_ptr()

    def place(self, tensor: Tensor, address: int, row: int | None = None) -> None:
        """Enters a tensor's address and the stride of its rows in bytes; channels must lie side by side."""
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        self.table[address] = tensor.data_ptr()
        if row is not None:
            self.table[row] = tensor.stride(0) * tensor.element_size()


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, *, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed (tokens, channels) in x's dtype, the new residual in `residual_dtype`, and rstd (tokens,)."""
    rows, channels = x.shape
    call = _Call(rows, channels, x.dtype, residual_dtype, weight)
    normed = torch.empty((rows, channels), dtype=x.dtype)
    stream = torch.empty((rows, channels), dtype=residual_dtype)
    rstd = torch.empty(rows)
    call.place(x, X, X_ROW)
    if residual is not None:
        call.place(residual, RESIDUAL, RESIDUAL_ROW)
    call.place(normed, NORMED)
    call.place(stream, STREAM, STREAM_ROW)
    call.place(rstd, RSTD)
    run(_forward_driver, _forward, int(call.table[RUNS]), call.table, eps)
    return normed, stream, rstd


def backward(
    dnormed: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and residual (None where there was none)."""
    rows, channels = residual_out.shape
    call = _Call(rows, channels, x_dtype, residual_out.dtype, weight)
    dx = torch.empty((rows, channels), dtype=x_dtype)
    dresidual = torch.empty((rows, channels), dtype=residual_out.dtype) if has_residual else None
    dweight = torch.empty(int(call.table[RUNS]), call.padded)
    call.place(dnormed.to(x_dtype), DNORMED, DNORMED_ROW)
    call.place(dresidual_out.to(residual_out.dtype), DSTREAM, DSTREAM_ROW)
    call.place(residual_out, STREAM, STREAM_ROW)
    call.place(rstd, RSTD)
    call.place(dx, DX)
    if dresidual is not None:
        call.place(dresidual, DRESIDUAL)
    call.place(dweight, DWEIGHT)
    run(_backward_driver, _backward, int(call.table[RUNS]), call.table)
    return dx, dweight.sum(0)[:channels], dresidual
