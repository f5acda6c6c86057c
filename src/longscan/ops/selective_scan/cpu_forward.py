"""The forward pass of the selective scan with real A on a CPU.

A task is one sequence and a block of vectors of channels. It walks the time in tiles: what belongs to a step and
channel alone (softplus, skip) is done for the whole tile, row by row as it lies in memory; then every state passes
through the tile in a register, and the tile's outputs, in registers too, gather over the states; then comes the gate.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from numba import prange

from longscan.ops.jit import kernel, parallel_kernel
from longscan.ops.selective_scan.cpu_table import (
    A_,
    B_,
    BIAS,
    BLOCK_VECTORS,
    BLOCKS,
    C_,
    CHANNELS,
    CHUNK,
    D_,
    DT,
    DT_ROW,
    DT_STEP,
    FINAL,
    FORMAT,
    GROUPS,
    INITIAL,
    ITEM,
    OUT,
    OUT_ROW,
    OUT_STEP,
    PADDED,
    PER_GROUP,
    SAVE,
    SAVED,
    SOFTPLUS,
    STATES,
    STEPS,
    VECTORS,
    X_ROW,
    X_STEP,
    Z_ROW,
    Z_STEP,
    X,
    Z,
    coefficient,
    fill,
    from_vectors,
    place,
    raw_step,
    stride,
    to_vectors,
)  # fmt: skip
from longscan.ops.simd import VECTOR_BYTES, WIDTH, broadcast, fma, tile
from longscan.ops.simd_math import exp2_product, silu, softplus
from longscan.ops.simd_memory import aligned, load, prefetch, read, store, write

#: Vectors of channels of a task at most: a row of memory that many vectors wide is read in one go.
MOST_VECTORS = 16

_TILE_BYTES = STEPS * VECTOR_BYTES


@kernel
def forward_task(task, a, seqs, b_fixed, c_fixed):
    """One sequence and block of channels: y, the final state and the states at chunk borders."""
    sequence, block = task // a[BLOCKS], task % a[BLOCKS]
    per_group = a[BLOCKS] // a[GROUPS]
    group, first = block // per_group, block % per_group * a[BLOCK_VECTORS]
    vectors = min(a[BLOCK_VECTORS], a[VECTORS] - first)
    width = a[PER_GROUP] - first * WIDTH
    vector = group * a[VECTORS] + first
    row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
    slot, padded = seqs[sequence, 3], seqs[sequence, 4]
    size, states, item, number_format = a[PADDED], a[STATES], a[ITEM], a[FORMAT]
    channel = group * a[PER_GROUP] + first * WIDTH
    x_at = a[X] + row * a[X_ROW] + start * a[X_STEP] + channel * item
    dt_at = a[DT] + row * a[DT_ROW] + start * a[DT_STEP] + channel * item
    z_at = a[Z] + row * a[Z_ROW] + start * a[Z_STEP] + channel * item
    out_at = a[OUT] + row * a[OUT_ROW] + start * a[OUT_STEP] + channel * item
    x_step, dt_step, z_step, out_step = a[X_STEP], a[DT_STEP], a[Z_STEP], a[OUT_STEP]
    gated, rectified, chunk = a[Z] != 0, a[SOFTPLUS] != 0, a[CHUNK]
    state_row = a[CHANNELS] * states * 4
    channel_states = channel * states * 4

    # Per vector: its states, and a tile of each of delta, delta x, y.
    keep, h_at = aligned(vectors * (size + 3 * STEPS))
    tiles = h_at + vectors * size * VECTOR_BYTES
    ys = tile(STEPS)

    for k in range(vectors):
        if a[INITIAL] != 0:
            initial = a[INITIAL] + sequence * state_row + channel_states + k * WIDTH * states * 4
            to_vectors(initial, h_at + k * size * VECTOR_BYTES, min(WIDTH, width - k * WIDTH), a)
        else:
            fill(h_at + k * size * VECTOR_BYTES, size)

    for t0 in range(0, length, STEPS):
        now = min(STEPS, length - t0)
        if a[SAVE] != 0 and t0 % chunk == 0:
            for k in range(vectors):
                saved = a[SAVED] + (slot + t0 // chunk) * state_row + channel_states + k * WIDTH * states * 4
                from_vectors(h_at + k * size * VECTOR_BYTES, saved, min(WIDTH, width - k * WIDTH), a)

        for t in range(now):
            for k in range(vectors):
                lanes = min(WIDTH, width - k * WIDTH)
                offset = k * WIDTH * item
                here = tiles + (3 * STEPS * k + t) * VECTOR_BYTES
                x_now = x_at + (t0 + t) * x_step + offset
                dt_now = dt_at + (t0 + t) * dt_step + offset
                # x and dt are wanted a tile later, z and the output when this one's states are done.
                prefetch(x_now + STEPS * x_step)
                prefetch(dt_now + STEPS * dt_step)
                prefetch(out_at + (t0 + t) * out_step + offset)
                if gated:
                    prefetch(z_at + (t0 + t) * z_step + offset)
                x = read(x_now, number_format, lanes)
                bias = 0
                if a[BIAS] != 0:
                    bias = a[BIAS] + (vector + k) * VECTOR_BYTES
                delta = raw_step(dt_now, bias, number_format, lanes)
                if rectified:
                    delta = softplus(delta)
                store(delta, here)
                store(delta * x, here + _TILE_BYTES)
                if a[D_] != 0:
                    store(load(a[D_] + (vector + k) * VECTOR_BYTES) * x, here + 2 * _TILE_BYTES)
                else:
                    store(broadcast(0.0), here + 2 * _TILE_BYTES)

        for k in range(vectors):
            here = tiles + 3 * k * _TILE_BYTES
            for t in range(now, STEPS):
                # Steps behind the end leave the states as they are.
                store(broadcast(0.0), here + t * VECTOR_BYTES)
                store(broadcast(0.0), here + _TILE_BYTES + t * VECTOR_BYTES)
            A = a[A_] + (vector + k) * size * VECTOR_BYTES
            B = place(a, B_, b_fixed, vector + k, group, padded + t0)
            C = place(a, C_, c_fixed, vector + k, group, padded + t0)
            state = h_at + k * size * VECTOR_BYTES
            for t in range(STEPS):
                ys[t] = load(here + 2 * _TILE_BYTES + t * VECTOR_BYTES)
            for _ in range(states):
                exponent, h = load(A), load(state)
                for t in range(STEPS):
                    decay = exp2_product(exponent, load(here + t * VECTOR_BYTES))
                    drive = load(here + _TILE_BYTES + t * VECTOR_BYTES)
                    h = fma(decay, h, drive * coefficient(B, t, b_fixed))
                    ys[t] = fma(h, coefficient(C, t, c_fixed), ys[t])
                store(h, state)
                A += VECTOR_BYTES
                state += VECTOR_BYTES
                B += stride(b_fixed)
                C += stride(c_fixed)
            for t in range(STEPS):
                store(ys[t], here + 2 * _TILE_BYTES + t * VECTOR_BYTES)

        for t in range(now):
            for k in range(vectors):
                lanes = min(WIDTH, width - k * WIDTH)
                offset = k * WIDTH * item
                y = load(tiles + (3 * STEPS * k + 2 * STEPS + t) * VECTOR_BYTES)
                if gated:
                    y = y * silu(read(z_at + (t0 + t) * z_step + offset, number_format, lanes))
                write(y, out_at + (t0 + t) * out_step + offset, number_format, lanes)

    for k in range(vectors):
        final = a[FINAL] + sequence * state_row + channel_states + k * WIDTH * states * 4
        from_vectors(h_at + k * size * VECTOR_BYTES, final, min(WIDTH, width - k * WIDTH), a)
    # Addresses do not keep an array alive.
    keep[0] = 0.0


@parallel_kernel
def forward_driver(tasks, a, seqs, b_fixed, c_fixed):
    for task in prange(tasks):
        forward_task(task, a, seqs, b_fixed, c_fixed)
