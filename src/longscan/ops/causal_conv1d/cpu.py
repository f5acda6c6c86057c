"""The causal convolution on a CPU: Numba kernels over explicit SIMD vectors.

A task is a block of channels over all sequences, so the filter's gradients have one owner and need no sum over threads.
It walks a sequence in tiles of steps that lie in scratch memory as float32, with the width - 1 steps before them.
"""

# Kernels take what Numba infers: addresses and vectors have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longscan.ops.checks import row_offsets
from longscan.ops.jit import inline, kernel, parallel_kernel, run
from longscan.ops.simd import HAS_FLOAT16, VECTOR_BYTES, WIDTH, broadcast, fma
from longscan.ops.simd_math import sigmoid
from longscan.ops.simd_memory import FORMATS, aligned, load, read, store, write

# Addresses (0: absent), strides in bytes, sizes and flags of a call.
X, OUT, DOUT, DX, WEIGHT, BIAS, INITIAL, FINAL, DFINAL, DINITIAL, DWEIGHT, DBIAS = range(12)
X_ROW, X_STEP, DOUT_ROW, DOUT_STEP, OUT_ROW, OUT_STEP = range(12, 18)
FORMAT, ITEM, CHANNELS, TAPS, SILU, BLOCK_VECTORS = range(18, 24)
ARGUMENTS = 24

_TILE = 32


@inline
def _window(filters, rows, vectors, k, taps):
    """The filter at one step: its inputs start at `rows`, a row of `vectors` each."""
    pre = load(filters + taps * VECTOR_BYTES)
    for tap in range(taps):
        pre = fma(load(filters + tap * VECTOR_BYTES), load(rows + (tap * vectors + k) * VECTOR_BYTES), pre)
    return pre


@inline
def _read_state(a, address, sequence, row, first, k, lanes):
    """One row of a sequence's state, (sequence, width - 1, channel) in memory."""
    step = (sequence * (a[TAPS] - 1) + row) * a[CHANNELS] + (first + k) * WIDTH
    return read(address + step * a[ITEM], a[FORMAT], lanes)


@inline
def _write_state(value, a, address, sequence, row, first, k, lanes):
    step = (sequence * (a[TAPS] - 1) + row) * a[CHANNELS] + (first + k) * WIDTH
    write(value, address + step * a[ITEM], a[FORMAT], lanes)


@inline
def _load_filters(a, filters, first, vectors):
    """Taps and bias of each vector of channels; the weight comes as (width, padded channel)."""
    taps = a[TAPS]
    padded = (a[CHANNELS] + WIDTH - 1) // WIDTH * WIDTH * 4
    for k in range(vectors):
        here = filters + k * (taps + 1) * VECTOR_BYTES
        for tap in range(taps):
            store(load(a[WEIGHT] + tap * padded + (first + k) * VECTOR_BYTES), here + tap * VECTOR_BYTES)
        store(load(a[BIAS] + (first + k) * VECTOR_BYTES), here + taps * VECTOR_BYTES)


@inline
def _load_before(a, tile, sequence, first, vectors):
    """The width - 1 steps before a sequence."""
    for i in range(a[TAPS] - 1):
        for k in range(vectors):
            value = broadcast(0.0)
            if a[INITIAL]:
                lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
                value = _read_state(a, a[INITIAL], sequence, i, first, k, lanes)
            store(value, tile + (i * vectors + k) * VECTOR_BYTES)


@inline
def _load_tile(a, tile, row, step, now, first, vectors):
    for t in range(now):
        for k in range(vectors):
            lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
            address = a[X] + row * a[X_ROW] + (step + t) * a[X_STEP] + (first + k) * WIDTH * a[ITEM]
            store(read(address, a[FORMAT], lanes), tile + ((a[TAPS] - 1 + t) * vectors + k) * VECTOR_BYTES)


@inline
def _move(tile, count, by):
    """Moves `count` vectors to the front from `by` vectors behind it."""
    for i in range(count):
        store(load(tile + (by + i) * VECTOR_BYTES), tile + i * VECTOR_BYTES)


@kernel
def _forward(task, a, seqs):
    taps = a[TAPS]
    first = task * a[BLOCK_VECTORS]
    vectors = min(a[BLOCK_VECTORS], (a[CHANNELS] + WIDTH - 1) // WIDTH - first)
    keep_tile, tile = aligned((_TILE + taps) * vectors)
    keep_filters, filters = aligned((taps + 1) * vectors)
    _load_filters(a, filters, first, vectors)
    for sequence in range(seqs.shape[0]):
        row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
        _load_before(a, tile, sequence, first, vectors)
        for t0 in range(0, length, _TILE):
            now = min(_TILE, length - t0)
            _load_tile(a, tile, row, start + t0, now, first, vectors)
            for t in range(now):
                for k in range(vectors):
                    lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
                    y = _window(
                        filters + k * (taps + 1) * VECTOR_BYTES, tile + t * vectors * VECTOR_BYTES, vectors, k, taps
                    )
                    if a[SILU]:
                        y = y * sigmoid(y)
                    step = start + t0 + t
                    address = a[OUT] + row * a[OUT_ROW] + step * a[OUT_STEP] + (first + k) * WIDTH * a[ITEM]
                    write(y, address, a[FORMAT], lanes)
            _move(tile, (taps - 1) * vectors, now * vectors)
        for i in range(taps - 1):
            for k in range(vectors):
                lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
                value = load(tile + (i * vectors + k) * VECTOR_BYTES)
                _write_state(value, a, a[FINAL], sequence, i, first, k, lanes)
    # Addresses do not keep arrays alive.
    keep_tile[0] = keep_filters[0]


@parallel_kernel
def _forward_driver(tasks, a, seqs):
    for task in prange(tasks):
        _forward(task, a, seqs)


@inline
def _flush(a, sequence, row, start, place, value, first, k):
    """Writes the gradient of one step, counted from width - 1 steps before the sequence."""
    lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
    before = a[TAPS] - 1
    if place >= before:
        address = a[DX] + row * a[OUT_ROW] + (start + place - before) * a[OUT_STEP] + (first + k) * WIDTH * a[ITEM]
        write(value, address, a[FORMAT], lanes)
    elif a[DINITIAL]:
        _write_state(value, a, a[DINITIAL], sequence, place, first, k, lanes)


@kernel
def _backward(task, a, seqs):
    taps = a[TAPS]
    before = taps - 1
    first = task * a[BLOCK_VECTORS]
    vectors = min(a[BLOCK_VECTORS], (a[CHANNELS] + WIDTH - 1) // WIDTH - first)
    keep_tile, tile = aligned((_TILE + taps) * vectors)
    keep_grads, grads = aligned((_TILE + taps) * vectors)
    keep_filters, filters = aligned((taps + 1) * vectors)
    keep_sums, sums = aligned((taps + 1) * vectors)
    _load_filters(a, filters, first, vectors)
    for i in range((taps + 1) * vectors):
        store(broadcast(0.0), sums + i * VECTOR_BYTES)
    for sequence in range(seqs.shape[0]):
        row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
        _load_before(a, tile, sequence, first, vectors)
        for i in range(before * vectors):
            store(broadcast(0.0), grads + i * VECTOR_BYTES)
        for t0 in range(0, length, _TILE):
            now = min(_TILE, length - t0)
            _load_tile(a, tile, row, start + t0, now, first, vectors)
            for i in range(now * vectors):
                store(broadcast(0.0), grads + (before * vectors + i) * VECTOR_BYTES)
            for t in range(now):
                rows, out = tile + t * vectors * VECTOR_BYTES, grads + t * vectors * VECTOR_BYTES
                for k in range(vectors):
                    lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
                    own, mine = filters + k * (taps + 1) * VECTOR_BYTES, sums + k * (taps + 1) * VECTOR_BYTES
                    step = start + t0 + t
                    address = a[DOUT] + row * a[DOUT_ROW] + step * a[DOUT_STEP] + (first + k) * WIDTH * a[ITEM]
                    g = read(address, a[FORMAT], lanes)
                    if a[SILU]:
                        pre = _window(own, rows, vectors, k, taps)
                        gate = sigmoid(pre)
                        g = g * gate * (1.0 + pre * (1.0 - gate))
                    for tap in range(taps):
                        place = (tap * vectors + k) * VECTOR_BYTES
                        store(fma(load(own + tap * VECTOR_BYTES), g, load(out + place)), out + place)
                        total = mine + tap * VECTOR_BYTES
                        store(fma(g, load(rows + place), load(total)), total)
                    store(load(mine + taps * VECTOR_BYTES) + g, mine + taps * VECTOR_BYTES)
            for t in range(now):
                for k in range(vectors):
                    value = load(grads + (t * vectors + k) * VECTOR_BYTES)
                    _flush(a, sequence, row, start, t0 + t, value, first, k)
            _move(tile, before * vectors, now * vectors)
            _move(grads, before * vectors, now * vectors)
        for i in range(before):
            for k in range(vectors):
                lanes = min(WIDTH, a[CHANNELS] - (first + k) * WIDTH)
                value = load(grads + (i * vectors + k) * VECTOR_BYTES)
                value = value + _read_state(a, a[DFINAL], sequence, i, first, k, lanes)
                _flush(a, sequence, row, start, length + i, value, first, k)
    padded = (a[CHANNELS] + WIDTH - 1) // WIDTH * VECTOR_BYTES
    for k in range(vectors):
        for tap in range(taps):
            total = load(sums + (k * (taps + 1) + tap) * VECTOR_BYTES)
            store(total, a[DWEIGHT] + tap * padded + (first + k) * VECTOR_BYTES)
        store(load(sums + (k * (taps + 1) + taps) * VECTOR_BYTES), a[DBIAS] + (first + k) * VECTOR_BYTES)
    keep_tile[0] = keep_filters[0] + keep_grads[0] + keep_sums[0]


@parallel_kernel
def _backward_driver(tasks, a, seqs):
    for task in prange(tasks):
        _backward(task, a, seqs)


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Serves float32, bfloat16 and float16."""
    if x.dtype not in FORMATS:
        return f"it computes in float32, the activations are {x.dtype}"
    if x.dtype == torch.float16 and not HAS_FLOAT16:
        return "this processor does not convert float16"
    return None


class _Call:
    """A call's arguments in the form the kernels take; keeps the tensors alive."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
    ) -> None:
        batch, length, channels = x.shape
        sequences = row_offsets(batch, length, cu_seqlens)
        self.rows = np.array([(row, start, end - start) for row, start, end in sequences], dtype=np.int64)
        self.alive: list[Tensor] = []
        self.table = a = np.zeros(ARGUMENTS, dtype=np.int64)
        vectors = -(-channels // WIDTH)
        block = max(1, min(8, vectors // 8))
        self.tasks = -(-vectors // block)
        a[FORMAT], a[ITEM] = FORMATS[x.dtype], x.element_size()
        a[CHANNELS], a[TAPS], a[SILU], a[BLOCK_VECTORS] = channels, weight.shape[1], silu, block
        self.place(x, X, X_ROW)
        taps = x.new_zeros((weight.shape[1] + 1, vectors * WIDTH), dtype=torch.float32)
        taps[:-1, :channels] = weight.t()
        if bias is not None:
            taps[-1, :channels] = bias
        a[WEIGHT], a[BIAS] = self.keep(taps), taps[-1].data_ptr()
        a[INITIAL] = 0 if initial_state is None else self.keep(initial_state.contiguous())

    def keep(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return tensor.data_ptr()

    def place(self, tensor: Tensor, address: int, row: int) -> None:
        """Enters an activation's address and its strides in bytes; channels must lie side by side."""
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            tensor = tensor.contiguous()
        self.table[address] = self.keep(tensor)
        self.table[row] = tensor.stride(0) * tensor.element_size()
        self.table[row + 1] = tensor.stride(1) * tensor.element_size()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, channels) and final states (sequences, width - 1, channels), both in x's dtype."""
    call = _Call(x, weight, bias, initial_state, cu_seqlens, silu)
    y = torch.empty(x.shape, dtype=x.dtype)
    final = torch.empty((len(call.rows), weight.shape[1] - 1, x.shape[2]), dtype=x.dtype)
    call.place(y, OUT, OUT_ROW)
    call.table[FINAL] = final.data_ptr()
    run(_forward_driver, _forward, call.tasks, call.table, call.rows)
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state (None where the argument is None)."""
    call = _Call(x, weight, bias, initial_state, cu_seqlens, silu)
    a, channels, taps = call.table, x.shape[2], weight.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=x.dtype)
    sums = torch.empty(taps + 1, -(-channels // WIDTH) * WIDTH)
    call.place(dy, DOUT, DOUT_ROW)
    a[OUT_ROW], a[OUT_STEP] = dx.stride(0) * dx.element_size(), dx.stride(1) * dx.element_size()
    a[DX], a[DFINAL] = dx.data_ptr(), call.keep(dfinal.to(x.dtype).contiguous())
    a[DINITIAL] = 0 if dinitial is None else dinitial.data_ptr()
    a[DWEIGHT], a[DBIAS] = sums.data_ptr(), sums[-1].data_ptr()
    run(_backward_driver, _backward, call.tasks, a, call.rows)
    dweight = sums[:-1, :channels].t().to(weight.dtype)
    return dx, dweight, None if bias is None else sums[-1, :channels].to(bias.dtype), dinitial


def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
    """One step from `state` (batch, width - 1, channels), which is overwritten; x (batch, channels)."""
    y, final = forward(x[:, None], weight, bias, state, None, silu=silu)
    state.copy_(final)
    return y[:, 0]
