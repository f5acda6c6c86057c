"""What the phases of a compiled step share: a task's part of the work, and the norm before a layer."""

from __future__ import annotations

import numpy as np
from numba import carray

from longscan.ops.jit import inline, kernel
from longscan.ops.mamba_step.layout import ASIDE, BATCH, D_MODEL, HIDDEN, OWN_HEADER, STREAMS
from longscan.ops.mamba_step.products import INT8
from longscan.ops.mamba_step.tasks import int64_pointer
from longscan.ops.simd import WIDTH, broadcast, fma, total
from longscan.ops.simd_memory import FLOAT32, read, write


@inline
def item(form):  # type: ignore[no-untyped-def]
    """Bytes of a number."""
    return 4 if form == FLOAT32 else 1 if form == INT8 else 2


@inline
def block(task, tasks, size, unit):  # type: ignore[no-untyped-def]
    """A task's share [first, last) of `size` rows or channels, in whole units."""
    units = (size + unit - 1) // unit
    return min(size, task * units // tasks * unit), min(size, (task + 1) * units // tasks * unit)


@inline
def scale(x, size, eps, weight, y):  # type: ignore[no-untyped-def]
    """The RMS norm of `size` numbers at x to y, which may be x."""
    squares = broadcast(0.0)
    for c in range(0, size, WIDTH):
        value = read(x + 4 * c, FLOAT32, min(WIDTH, size - c))
        squares = fma(value, value, squares)
    rstd = np.float32(1.0) / np.sqrt(total(squares) / np.float32(size) + eps)
    for c in range(0, size, WIDTH):
        lanes = min(WIDTH, size - c)
        value = read(x + 4 * c, FLOAT32, lanes) * rstd * read(weight + 4 * c, FLOAT32, lanes)
        write(value, y + 4 * c, FLOAT32, lanes)


@kernel
def normalise(a, eps, weight, layer, keep, own):  # type: ignore[no-untyped-def]
    """The norm of stream + hidden in a thread's own memory, where it may be already; with `keep`, the sum becomes the
    next stream.

    There are two streams, read and written in turn, because every thread takes the norm for itself. What stands aside
    is added to the first layer's norm only.
    """
    normed, prepared = own + OWN_HEADER, carray(int64_pointer(own), 1)
    if prepared[0] == layer:
        return normed
    prepared[0] = layer
    d_model, batch = a[D_MODEL], a[BATCH]
    span = 4 * d_model
    before = a[STREAMS] + layer % 2 * batch * span
    after = a[STREAMS] + (layer + 1) % 2 * batch * span
    for b in range(batch):
        for c in range(0, d_model, WIDTH):
            lanes, at = min(WIDTH, d_model - c), b * span + 4 * c
            value = read(before + at, FLOAT32, lanes) + read(a[HIDDEN] + at, FLOAT32, lanes)
            if keep:
                write(value, after + at, FLOAT32, lanes)
            if layer == 0 and a[ASIDE] != 0:
                value = value + read(a[ASIDE] + at, FLOAT32, lanes)
            write(value, normed + at, FLOAT32, lanes)
        scale(normed + b * span, d_model, eps, weight, normed + b * span)
    return normed
