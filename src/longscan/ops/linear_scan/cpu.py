"""The linear scan on a CPU: Numba kernels over explicit SIMD vectors of channels.

A task is a block of channels of one sequence; it walks time once, a row of vectors a step, so that the recurrences of
many vectors overlap and memory is read in long runs. A complex number is a pair of neighbouring lanes.
"""

# Kernels take what Numba infers: addresses and vectors have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange
from torch import Tensor

from longscan.ops.checks import row_offsets
from longscan.ops.jit import inline, kernel, parallel_kernel, run, threads
from longscan.ops.linear_scan.rows import accumulation, gradient_dtype
from longscan.ops.simd import FLOATS, HAS_FLOAT16, INTEGERS, VECTOR_BYTES, WIDTH, broadcast, fma, function, vector
from longscan.ops.simd_memory import FLOAT32, FORMATS, aligned, load, read, store, write

# Addresses (0: absent), strides in bytes per row and step, formats and bytes of an item, and sizes of a call.
A_, B_, H_, DA_, DB_, INITIAL, FINAL = range(7)
A_ROW, A_STEP, B_ROW, B_STEP, H_ROW, H_STEP, DA_ROW, DA_STEP, DB_ROW, DB_STEP = range(7, 17)
A_FORMAT, A_ITEM, FORMAT, ITEM, DA_FORMAT, DA_ITEM = range(17, 23)
NUMBERS, BLOCK_VECTORS, BLOCKS = range(23, 26)
ARGUMENTS = 26

# Vectors of a task, at most: 64 of 64 bytes read 4 KiB in a run.
_BLOCK = 64


def _lanes(*of_pair: int) -> Any:
    """A shuffle by pairs of lanes."""
    return ir.Constant(INTEGERS, [lane // 2 * 2 + of_pair[lane % 2] for lane in range(WIDTH)])


def _signed(builder: Any, x: Any) -> Any:
    minus_plus = ir.Constant(FLOATS, [-1.0, 1.0] * (WIDTH // 2))
    return builder.fmul(builder.shuffle_vector(x, x, _lanes(1, 1)), minus_plus)


_real = function(1, vector, lambda b, x: b.shuffle_vector(x, x, _lanes(0, 0)), "Real parts of pairs, twice each.")
_swapped = function(1, vector, lambda b, x: b.shuffle_vector(x, x, _lanes(1, 0)), "Pairs with their parts swapped.")
_imaginary = function(1, vector, _signed, "Imaginary parts of pairs: with a minus sign, then with a plus.")


@inline
def _multiply_add(a, x, b, pairs):
    """a x + b; `pairs` is None for real numbers, and a kernel is compiled for each."""
    if pairs is None:
        return fma(a, x, b)
    return fma(_imaginary(a), _swapped(x), fma(_real(a), x, b))


@inline
def _conjugate_multiply(a, x, pairs):
    """conj(a) x."""
    if pairs is None:
        return a * x
    return fma(_imaginary(-a), _swapped(x), _real(a) * x)


@inline
def _states(address, a, sequence, number):
    return address + (sequence * a[NUMBERS] + number) * 4


@inline
def _place(a, which, row_stride, row, step, number, item):
    return a[which] + row * a[row_stride] + step * a[row_stride + 1] + number * item


@kernel
def _forward(task, a, seqs, pairs):
    sequence, first = task // a[BLOCKS], task % a[BLOCKS] * a[BLOCK_VECTORS]
    row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
    vectors = min(a[BLOCK_VECTORS], (a[NUMBERS] + WIDTH - 1) // WIDTH - first)
    keep, state = aligned(vectors)
    for k in range(vectors):
        number = (first + k) * WIDTH
        h = broadcast(0.0)
        if a[INITIAL]:
            h = read(_states(a[INITIAL], a, sequence, number), FLOAT32, min(WIDTH, a[NUMBERS] - number))
        store(h, state + k * VECTOR_BYTES)
    for step in range(start, start + length):
        for k in range(vectors):
            number = (first + k) * WIDTH
            lanes = min(WIDTH, a[NUMBERS] - number)
            decay = read(_place(a, A_, A_ROW, row, step, number, a[A_ITEM]), a[A_FORMAT], lanes)
            add = read(_place(a, B_, B_ROW, row, step, number, a[ITEM]), a[FORMAT], lanes)
            h = _multiply_add(decay, load(state + k * VECTOR_BYTES), add, pairs)
            store(h, state + k * VECTOR_BYTES)
            write(h, _place(a, H_, H_ROW, row, step, number, a[ITEM]), a[FORMAT], lanes)
    for k in range(vectors):
        number = (first + k) * WIDTH
        lanes = min(WIDTH, a[NUMBERS] - number)
        write(load(state + k * VECTOR_BYTES), _states(a[FINAL], a, sequence, number), FLOAT32, lanes)
    # Addresses do not keep an array alive.
    keep[0] = 0.0


@kernel
def _backward(task, a, seqs, pairs):
    """B_ is the gradient of h; FINAL comes in as the gradient of the final state and leaves as the initial one's."""
    sequence, first = task // a[BLOCKS], task % a[BLOCKS] * a[BLOCK_VECTORS]
    row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
    vectors = min(a[BLOCK_VECTORS], (a[NUMBERS] + WIDTH - 1) // WIDTH - first)
    keep, carried = aligned(vectors)
    for k in range(vectors):
        number = (first + k) * WIDTH
        lanes = min(WIDTH, a[NUMBERS] - number)
        store(read(_states(a[FINAL], a, sequence, number), FLOAT32, lanes), carried + k * VECTOR_BYTES)
    for step in range(start + length - 1, start - 1, -1):
        for k in range(vectors):
            number = (first + k) * WIDTH
            lanes = min(WIDTH, a[NUMBERS] - number)
            g = read(_place(a, B_, B_ROW, row, step, number, a[ITEM]), a[FORMAT], lanes)
            g = g + load(carried + k * VECTOR_BYTES)
            write(g, _place(a, DB_, DB_ROW, row, step, number, a[ITEM]), a[FORMAT], lanes)
            decay = read(_place(a, A_, A_ROW, row, step, number, a[A_ITEM]), a[A_FORMAT], lanes)
            store(_conjugate_multiply(decay, g, pairs), carried + k * VECTOR_BYTES)
            before = broadcast(0.0)
            if step > start:
                before = read(_place(a, H_, H_ROW, row, step - 1, number, a[ITEM]), a[FORMAT], lanes)
            elif a[INITIAL]:
                before = read(_states(a[INITIAL], a, sequence, number), FLOAT32, lanes)
            da = _conjugate_multiply(before, g, pairs)
            write(da, _place(a, DA_, DA_ROW, row, step, number, a[DA_ITEM]), a[DA_FORMAT], lanes)
    for k in range(vectors):
        number = (first + k) * WIDTH
        lanes = min(WIDTH, a[NUMBERS] - number)
        write(load(carried + k * VECTOR_BYTES), _states(a[FINAL], a, sequence, number), FLOAT32, lanes)
    keep[0] = 0.0


@parallel_kernel
def _forward_driver(tasks, a, seqs, pairs):
    for task in prange(tasks):
        _forward(task, a, seqs, pairs)


@parallel_kernel
def _backward_driver(tasks, a, seqs, pairs):
    for task in prange(tasks):
        _backward(task, a, seqs, pairs)


def unsupported(a: Tensor, b: Tensor, *_: Any) -> str | None:
    """Serves float32, bfloat16, float16 and complex64."""
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in FORMATS and tensor.dtype != torch.complex64:
            return f"it computes in float32, {name} is {tensor.dtype}"
        if tensor.dtype == torch.float16 and not HAS_FLOAT16:
            return "this processor does not convert float16"
    return None


class _Call:
    """A call's arguments in the form the kernels take; keeps the tensors alive."""

    def __init__(self, like: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
        batch, length, channels = like.shape
        sequences = row_offsets(batch, length, cu_seqlens)
        self.rows = np.array([(row, start, end - start) for row, start, end in sequences], dtype=np.int64)
        self.pairs = 1 if like.is_complex() else None
        self.alive: list[Tensor] = []
        self.table = t = np.zeros(ARGUMENTS, dtype=np.int64)
        t[NUMBERS] = channels * (2 if like.is_complex() else 1)
        vectors = -(-int(t[NUMBERS]) // WIDTH)
        # Two tasks a thread even out their ends.
        t[BLOCK_VECTORS] = block = max(1, min(_BLOCK, vectors * len(sequences) // (2 * threads())))
        t[BLOCKS] = -(-vectors // block)
        t[FORMAT], t[ITEM] = self.format(like)
        t[INITIAL] = 0 if initial_state is None else self.keep(initial_state.contiguous())

    def keep(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def format(tensor: Tensor) -> tuple[int, int]:
        """Format and bytes of the numbers of a tensor."""
        return (FLOAT32, 4) if tensor.is_complex() else (FORMATS[tensor.dtype], tensor.element_size())

    def place(self, tensor: Tensor, address: int, row: int) -> None:
        """Enters a tensor's address and its strides in bytes; an axis of length 1 is the same at every place."""
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.table[address] = self.keep(tensor)
        for axis in range(2):
            self.table[row + axis] = tensor.stride(axis) * tensor.element_size() if tensor.shape[axis] > 1 else 0

    def place_decay(self, a: Tensor, channels: int) -> None:
        self.table[A_FORMAT], self.table[A_ITEM] = self.format(a)
        self.place(a.expand(-1, -1, channels), A_, A_ROW)

    def run(self, driver: Any, body: Any) -> None:
        run(driver, body, len(self.rows) * int(self.table[BLOCKS]), self.table, self.rows, self.pairs)


def forward(a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """h (batch, length, channels) in b's dtype, and final states (sequences, channels), float32 or complex64."""
    call = _Call(b, initial_state, cu_seqlens)
    h = torch.empty(b.shape, dtype=b.dtype)
    final = torch.empty((len(call.rows), b.shape[2]), dtype=accumulation(b))
    call.place_decay(a, b.shape[2])
    call.place(b, B_, B_ROW)
    call.place(h, H_, H_ROW)
    call.table[FINAL] = final.data_ptr()
    call.run(_forward_driver, _forward)
    return h, final


def backward(
    dh: Tensor, dfinal: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a at every step, (batch, length, channels), of b, and of the initial states."""
    call = _Call(h, initial_state, cu_seqlens)
    da, db = torch.empty(h.shape, dtype=gradient_dtype(a, h)), torch.empty(h.shape, dtype=h.dtype)
    dstate = dfinal.to(accumulation(h)).clone(memory_format=torch.contiguous_format)
    call.place_decay(a, h.shape[2])
    call.place(dh.to(h.dtype), B_, B_ROW)
    call.place(h, H_, H_ROW)
    call.place(db, DB_, DB_ROW)
    call.table[DA_FORMAT], call.table[DA_ITEM] = call.format(da)
    call.place(da, DA_, DA_ROW)
    call.table[FINAL] = dstate.data_ptr()
    call.run(_backward_driver, _backward)
    return da, db, dstate
