"""One token of the selective scan with real A on a CPU, for decoding.

A channel's states lie side by side in memory and are read and written once: here a vector is a run of states of one
channel, and the sums over states of `WIDTH` channels are taken together.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from numba import prange

from longscan.ops.jit import inline, kernel, parallel_kernel
from longscan.ops.selective_scan.cpu_lanes import lane_sums
from longscan.ops.simd import VECTOR_BYTES, WIDTH, broadcast, fma, tile
from longscan.ops.simd_math import LOG2_E, exp2_product, silu, softplus
from longscan.ops.simd_memory import FLOAT32, aligned, load, load_scalar, read, store, write

# The call's arguments: addresses (0: absent), strides in bytes (B and C: per row, then per group), sizes and flags.
STATE, A_, D_, BIAS, X, X_ROW, DT, DT_ROW, Z, Z_ROW, OUT = range(11)
B_, B_ROW, B_GROUP, B_CHANNELS, C_, C_ROW, C_GROUP, C_CHANNELS = range(11, 19)
FORMAT, ITEM, SOFTPLUS, BATCH, CHANNELS, STATES, TASKS = range(19, 26)


@inline
def _widened(source, target, states, number_format, item):
    """Copies a group's B or C to scratch as float32, zeros behind it."""
    for n in range(0, states, WIDTH):
        store(read(source + n * item, number_format, min(WIDTH, states - n)), target + n * 4)


@kernel
def step_task(task, a):
    """A share of the pairs of a row of the batch and a vector of channels."""
    number_format, item, states, channels = a[FORMAT], a[ITEM], a[STATES], a[CHANNELS]
    vectors = (channels + WIDTH - 1) // WIDTH
    runs = (states + WIDTH - 1) // WIDTH
    keep, steps = aligned(2 + 2 * runs)
    drives = steps + VECTOR_BYTES
    b_at, c_at = steps + 2 * VECTOR_BYTES, steps + (2 + runs) * VECTOR_BYTES
    sums = tile(WIDTH)
    # The channel at which the group changes whose B or C is at hand.
    b_end, c_end = 0, 0
    pairs = a[BATCH] * vectors
    for pair in range(pairs * task // a[TASKS], pairs * (task + 1) // a[TASKS]):
        row, channel = pair // vectors, pair % vectors * WIDTH
        if channel == 0:
            b_end, c_end = 0, 0
        width = min(WIDTH, channels - channel)
        x = read(a[X] + row * a[X_ROW] + channel * item, number_format, width)
        delta = read(a[DT] + row * a[DT_ROW] + channel * item, number_format, width)
        if a[BIAS] != 0:
            delta = delta + read(a[BIAS] + channel * 4, FLOAT32, width)
        if a[SOFTPLUS] != 0:
            delta = softplus(delta)
        store(delta * LOG2_E, steps)
        store(delta * x, drives)
        for lane in range(width):
            if channel + lane >= b_end:
                group = (channel + lane) // a[B_CHANNELS]
                b_end = (group + 1) * a[B_CHANNELS]
                _widened(a[B_] + row * a[B_ROW] + group * a[B_GROUP], b_at, states, number_format, item)
            if channel + lane >= c_end:
                group = (channel + lane) // a[C_CHANNELS]
                c_end = (group + 1) * a[C_CHANNELS]
                _widened(a[C_] + row * a[C_ROW] + group * a[C_GROUP], c_at, states, number_format, item)
            step, drive = load_scalar(steps + 4 * lane), load_scalar(drives + 4 * lane)
            total = broadcast(0.0)
            for n in range(0, states, WIDTH):
                lanes = min(WIDTH, states - n)
                here = ((channel + lane) * states + n) * 4
                state = a[STATE] + row * channels * states * 4 + here
                decay = exp2_product(read(a[A_] + here, FLOAT32, lanes), step)
                h = fma(decay, read(state, FLOAT32, lanes), drive * load(b_at + n * 4))
                write(h, state, FLOAT32, lanes)
                total = fma(h, load(c_at + n * 4), total)
            sums[lane] = total
        for lane in range(width, WIDTH):
            sums[lane] = broadcast(0.0)
        y = lane_sums(sums, 0)
        if a[D_] != 0:
            y = fma(read(a[D_] + channel * 4, FLOAT32, width), x, y)
        if a[Z] != 0:
            y = y * silu(read(a[Z] + row * a[Z_ROW] + channel * item, number_format, width))
        write(y, a[OUT] + (row * channels + channel) * item, number_format, width)
    # Addresses do not keep an array alive.
    keep[0] = 0.0


@parallel_kernel
def step_driver(tasks, a):
    for task in prange(tasks):
        step_task(task, a)
