"""The backward pass of the selective scan with real A on a CPU.

A task is a run of sequences and a block of channels. A sequence is walked from its last chunk to its first: the states
of a chunk are computed again from the one saved at its border, a few states at a time, and kept with their decays; then
their gradients come back through it,

    G = carry + C dy,    carry = decay G.

Gradients of parameters have one owner per task; sums over channels go to a part of their own for every block of
channels, and the parts are added in order: the same bits whatever the number of threads.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from numba import prange

from longscan.ops.jit import inline, kernel, parallel_kernel
from longscan.ops.selective_scan.cpu_lanes import lane_sums
from longscan.ops.selective_scan.cpu_table import (
    A_,
    B_,
    BIAS,
    BLOCK,
    BLOCK_VECTORS,
    BLOCKS,
    C_,
    CHANNELS,
    CHUNK,
    CREWS,
    D_,
    DA_,
    DB_,
    DBIAS,
    DC_,
    DD_,
    DDT,
    DFINAL,
    DINITIAL,
    DOUT,
    DOUT_ROW,
    DOUT_STEP,
    DT,
    DT_ROW,
    DT_STEP,
    DX,
    DZ,
    FORMAT,
    GROUPS,
    ITEM,
    OUT_ROW,
    OUT_STEP,
    PADDED,
    PADDED_STEPS,
    PER_GROUP,
    PRODUCTS,
    SAVED,
    SEQUENCES,
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
    tile_stride,
    to_vectors,
)  # fmt: skip
from longscan.ops.simd import VECTOR_BYTES, WIDTH, broadcast, fma, tile
from longscan.ops.simd_math import LN_2, exp2_product, sigmoid, silu, softplus
from longscan.ops.simd_memory import FLOAT32, aligned, load, prefetch, read, store, store_part, write

# What is kept of a step and a vector of channels during a chunk: delta, delta x, the gradient of y, and three sums over
# the states: G B, A G decay h[t-1] and C h.
_FIELDS = 6
_STEP_BYTES = _FIELDS * VECTOR_BYTES

#: Vectors of channels that walk a chunk of 64 steps together, so that rows of memory are used while they are near.
TOGETHER = 4

# Kept for every step and state of a chunk: decay h[t-1] and the decay. The former is not had as h[t] - delta x B, which
# leaves nothing but rounding where the decay is small.
_RECORD_BYTES = 2 * VECTOR_BYTES


@inline
def _record(steps, records, A, B, b_stride, h_at, whole, b_fixed):
    """Runs a block of states through a chunk from those at `h_at`."""
    for n in range(BLOCK):
        exponent, h = load(A + n * VECTOR_BYTES), load(h_at + n * VECTOR_BYTES)
        at, b_at, out = steps, B + n * stride(b_fixed), records + n * _RECORD_BYTES
        for _ in range(0, whole, STEPS):
            for t in range(STEPS):
                decay = exp2_product(exponent, load(at + t * _STEP_BYTES))
                decayed = decay * h
                h = fma(load(at + t * _STEP_BYTES + VECTOR_BYTES), coefficient(b_at, t, b_fixed), decayed)
                store(decayed, out + t * BLOCK * _RECORD_BYTES)
                store(decay, out + t * BLOCK * _RECORD_BYTES + VECTOR_BYTES)
            at += STEPS * _STEP_BYTES
            out += STEPS * BLOCK * _RECORD_BYTES
            b_at += b_stride


@inline
def _add(value, address):
    store(load(address) + value, address)


@inline
def _retreat(steps, records, A, B, C, carry, dA, dB, dC, for_b, for_c, b_fixed, c_fixed):
    """BLOCK steps backward for BLOCK states, the last step first.

    Adds to the steps' sums over states, to dA and, where B or C is constant, to dB or dC; elsewhere leaves the products
    that are to be summed over channels in `for_b` and `for_c`, step by step.
    """
    for back in range(BLOCK):
        t = BLOCK - 1 - back
        at = steps + t * _STEP_BYTES
        delta, drive, dy = load(at), load(at + VECTOR_BYTES), load(at + 2 * VECTOR_BYTES)
        p, r, y = load(at + 3 * VECTOR_BYTES), load(at + 4 * VECTOR_BYTES), load(at + 5 * VECTOR_BYTES)
        for n in range(BLOCK):
            record = records + (t * BLOCK + n) * _RECORD_BYTES
            decayed, decay = load(record), load(record + VECTOR_BYTES)
            b = coefficient(B + n * stride(b_fixed), t, b_fixed)
            c = coefficient(C + n * stride(c_fixed), t, c_fixed)
            h = fma(drive, b, decayed)
            G = fma(dy, c, carry[n])
            y = fma(h, c, y)
            p = fma(G, b, p)
            into_decay = G * decayed
            r = fma(into_decay, load(A + n * VECTOR_BYTES), r)
            dA[n] = fma(into_decay, delta, dA[n])
            carry[n] = decay * G
            if b_fixed is None:
                for_b[t * BLOCK + n] = G * drive
            else:
                dB[n] = fma(G, drive, dB[n])
            if c_fixed is None:
                for_c[t * BLOCK + n] = dy * h
            else:
                dC[n] = fma(dy, h, dC[n])
        store(p, at + 3 * VECTOR_BYTES)
        store(r, at + 4 * VECTOR_BYTES)
        store(y, at + 5 * VECTOR_BYTES)


@inline
def _sum_lanes(products, address):
    """Adds the sums over channels of BLOCK^2 products to memory."""
    _add(lane_sums(products, 0), address)
    if WIDTH <= 8:
        _add(lane_sums(products, 8), address + 8 * 4)
    if WIDTH == 4:
        _add(lane_sums(products, 4), address + 4 * 4)
        _add(lane_sums(products, 12), address + 12 * 4)


@kernel
def _chunks(a, seqs, sequence, block, group, first, vectors, kept, b_fixed, c_fixed):
    """One sequence and a few vectors of channels, from the last chunk to the first; adds to the sums at `kept`."""
    row, start, length = seqs[sequence, 0], seqs[sequence, 1], seqs[sequence, 2]
    slot, padded = seqs[sequence, 3], seqs[sequence, 4]
    chunk, size, states, item, number_format = a[CHUNK], a[PADDED], a[STATES], a[ITEM], a[FORMAT]
    width = a[PER_GROUP] - first * WIDTH
    vector = group * a[VECTORS] + first
    channel = group * a[PER_GROUP] + first * WIDTH
    x_at = a[X] + row * a[X_ROW] + start * a[X_STEP] + channel * item
    dt_at = a[DT] + row * a[DT_ROW] + start * a[DT_STEP] + channel * item
    z_at = a[Z] + row * a[Z_ROW] + start * a[Z_STEP] + channel * item
    dout_at = a[DOUT] + row * a[DOUT_ROW] + start * a[DOUT_STEP] + channel * item
    out = row * a[OUT_ROW] + start * a[OUT_STEP] + channel * item
    x_step, dt_step, z_step, dout_step, out_step = a[X_STEP], a[DT_STEP], a[Z_STEP], a[DOUT_STEP], a[OUT_STEP]
    gated, rectified = a[Z] != 0, a[SOFTPLUS] != 0
    state_row = a[CHANNELS] * states * 4
    channel_states = channel * states * 4
    third = vectors * size * VECTOR_BYTES
    b_tile, c_tile = tile_stride(a, b_fixed), tile_stride(a, c_fixed)

    room = (chunk + STEPS - 1) // STEPS * STEPS
    keep, steps = aligned(_FIELDS * room * vectors + 2 * BLOCK * room + 2 * size * vectors)
    records = steps + _FIELDS * room * vectors * VECTOR_BYTES
    h_at = records + 2 * BLOCK * room * VECTOR_BYTES
    carry_at = h_at + size * vectors * VECTOR_BYTES
    carry, dA, dB, dC = tile(BLOCK), tile(BLOCK), tile(BLOCK), tile(BLOCK)
    for_b, for_c = tile(PRODUCTS), tile(PRODUCTS)

    for k in range(vectors):
        final = a[DFINAL] + sequence * state_row + channel_states + k * WIDTH * states * 4
        to_vectors(final, carry_at + k * size * VECTOR_BYTES, min(WIDTH, width - k * WIDTH), a)

    for c in range((length + chunk - 1) // chunk - 1, -1, -1):
        t0 = c * chunk
        now = min(chunk, length - t0)
        whole = (now + STEPS - 1) // STEPS * STEPS
        for t in range(now):
            for k in range(vectors):
                lanes = min(WIDTH, width - k * WIDTH)
                offset = k * WIDTH * item
                here = steps + (room * k + t) * _STEP_BYTES
                x_now, dt_now = x_at + (t0 + t) * x_step + offset, dt_at + (t0 + t) * dt_step + offset
                dout_now, z_now = dout_at + (t0 + t) * dout_step + offset, z_at + (t0 + t) * z_step + offset
                prefetch(x_now + STEPS * x_step)
                prefetch(dt_now + STEPS * dt_step)
                prefetch(dout_now + STEPS * dout_step)
                bias = 0
                if a[BIAS] != 0:
                    bias = a[BIAS] + (vector + k) * VECTOR_BYTES
                delta = raw_step(dt_now, bias, number_format, lanes)
                if rectified:
                    delta = softplus(delta)
                dy = read(dout_now, number_format, lanes)
                if gated:
                    prefetch(z_now + STEPS * z_step)
                    dy = dy * silu(read(z_now, number_format, lanes))
                store(delta, here)
                store(delta * read(x_now, number_format, lanes), here + VECTOR_BYTES)
                store(dy, here + 2 * VECTOR_BYTES)
                fill(here + 3 * VECTOR_BYTES, 3)
        for k in range(vectors):
            # Steps behind the end change nothing.
            fill(steps + (room * k + now) * _STEP_BYTES, (whole - now) * _FIELDS)

        for k in range(vectors):
            lanes = min(WIDTH, width - k * WIDTH)
            before = h_at + k * size * VECTOR_BYTES
            saved = a[SAVED] + (slot + c) * state_row + channel_states + k * WIDTH * states * 4
            to_vectors(saved, before, lanes, a)
            here = steps + room * k * _STEP_BYTES
            for n in range(0, size, BLOCK):
                A = a[A_] + ((vector + k) * size + n) * VECTOR_BYTES
                B = place(a, B_, b_fixed, vector + k, group, padded + t0) + n * stride(b_fixed)
                C = place(a, C_, c_fixed, vector + k, group, padded + t0) + n * stride(c_fixed)
                _record(here, records, A, B, b_tile, before + n * VECTOR_BYTES, whole, b_fixed)
                sums = ((block * (size // BLOCK) + n // BLOCK) * a[PADDED_STEPS] + padded + t0) * BLOCK * 4
                grown = kept + (k * size + n) * VECTOR_BYTES
                for i in range(BLOCK):
                    carry[i] = load(carry_at + (k * size + n + i) * VECTOR_BYTES)
                    dA[i] = load(grown + i * VECTOR_BYTES)
                    dB[i] = load(grown + third + i * VECTOR_BYTES)
                    dC[i] = load(grown + 2 * third + i * VECTOR_BYTES)
                for t in range(whole - BLOCK, -1, -BLOCK):
                    inside = t % STEPS * 4
                    b_now, c_now = B + t // STEPS * b_tile, C + t // STEPS * c_tile
                    if b_fixed is None:
                        b_now += inside
                    if c_fixed is None:
                        c_now += inside
                    _retreat(
                        here + t * _STEP_BYTES, records + t * BLOCK * _RECORD_BYTES, A, b_now, c_now,
                        carry, dA, dB, dC, for_b, for_c, b_fixed, c_fixed,
                    )  # fmt: skip
                    if b_fixed is None:
                        _sum_lanes(for_b, a[DB_] + sums + t * BLOCK * 4)
                    if c_fixed is None:
                        _sum_lanes(for_c, a[DC_] + sums + t * BLOCK * 4)
                for i in range(BLOCK):
                    store(carry[i], carry_at + (k * size + n + i) * VECTOR_BYTES)
                    store(dA[i], grown + i * VECTOR_BYTES)
                    store(dB[i], grown + third + i * VECTOR_BYTES)
                    store(dC[i], grown + 2 * third + i * VECTOR_BYTES)

        for t in range(now):
            for k in range(vectors):
                lanes = min(WIDTH, width - k * WIDTH)
                offset = k * WIDTH * item
                here = steps + (room * k + t) * _STEP_BYTES
                delta, dy = load(here), load(here + 2 * VECTOR_BYTES)
                p, r = load(here + 3 * VECTOR_BYTES), load(here + 4 * VECTOR_BYTES)
                x = read(x_at + (t0 + t) * x_step + offset, number_format, lanes)
                skip = broadcast(0.0)
                if a[D_] != 0:
                    skip = load(a[D_] + (vector + k) * VECTOR_BYTES)
                ddt = fma(r, LN_2, x * p)
                if rectified:
                    bias = 0
                    if a[BIAS] != 0:
                        bias = a[BIAS] + (vector + k) * VECTOR_BYTES
                    ddt = ddt * sigmoid(raw_step(dt_at + (t0 + t) * dt_step + offset, bias, number_format, lanes))
                sums = kept + 3 * third + 2 * k * VECTOR_BYTES
                _add(dy * x, sums)
                _add(ddt, sums + VECTOR_BYTES)
                to = out + (t0 + t) * out_step + offset
                write(fma(delta, p, skip * dy), a[DX] + to, number_format, lanes)
                write(ddt, a[DDT] + to, number_format, lanes)
                if gated:
                    z = read(z_at + (t0 + t) * z_step + offset, number_format, lanes)
                    dout = read(dout_at + (t0 + t) * dout_step + offset, number_format, lanes)
                    gate = sigmoid(z)
                    y = fma(skip, x, load(here + 5 * VECTOR_BYTES))
                    write(dout * y * (gate * fma(z, 1.0 - gate, 1.0)), a[DZ] + to, number_format, lanes)

    if a[DINITIAL] != 0:
        for k in range(vectors):
            initial = a[DINITIAL] + sequence * state_row + channel_states + k * WIDTH * states * 4
            from_vectors(carry_at + k * size * VECTOR_BYTES, initial, min(WIDTH, width - k * WIDTH), a)
    # Addresses do not keep an array alive.
    keep[0] = 0.0


@kernel
def backward_task(task, a, seqs, b_fixed, c_fixed):
    """A run of sequences and a block of channels: all gradients."""
    crew, block = task // a[BLOCKS], task % a[BLOCKS]
    per_group = a[BLOCKS] // a[GROUPS]
    group, first = block // per_group, block % per_group * a[BLOCK_VECTORS]
    last = min(first + a[BLOCK_VECTORS], a[VECTORS])
    size, states = a[PADDED], a[STATES]
    # As many vectors at a time as leave their chunk of steps in the near caches.
    together = max(1, TOGETHER * 64 // a[CHUNK])
    keep, kept = aligned((3 * size + 2) * together)
    for v in range(first, last, together):
        vectors = min(together, last - v)
        fill(kept, (3 * size + 2) * vectors)
        for sequence in range(crew * a[SEQUENCES] // a[CREWS], (crew + 1) * a[SEQUENCES] // a[CREWS]):
            _chunks(a, seqs, sequence, block, group, v, vectors, kept, b_fixed, c_fixed)
        third = vectors * size * VECTOR_BYTES
        for k in range(vectors):
            channel = crew * a[CHANNELS] + group * a[PER_GROUP] + (v + k) * WIDTH
            lanes = min(WIDTH, a[PER_GROUP] - (v + k) * WIDTH)
            here = kept + k * size * VECTOR_BYTES
            from_vectors(here, a[DA_] + channel * states * 4, lanes, a)
            if b_fixed is not None:
                from_vectors(here + third, a[DB_] + channel * states * 4, lanes, a)
            if c_fixed is not None:
                from_vectors(here + 2 * third, a[DC_] + channel * states * 4, lanes, a)
            sums = kept + 3 * third + 2 * k * VECTOR_BYTES
            store_part(load(sums), a[DD_] + channel * 4, FLOAT32, lanes)
            store_part(load(sums + VECTOR_BYTES), a[DBIAS] + channel * 4, FLOAT32, lanes)
    keep[0] = 0.0


@parallel_kernel
def backward_driver(tasks, a, seqs, b_fixed, c_fixed):
    for task in prange(tasks):
        backward_task(task, a, seqs, b_fixed, c_fixed)
