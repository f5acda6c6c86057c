"""Backward kernels of the Triton selective scan.

With G[t] the gradient of h[t] and w[t] = conj(a[t]) G[t] what flows to the step before, the recurrence from the end is

    G[t] = conj(C[t]) dy[t] + w[t+1],    w[t] = conj(a[t]) G[t]        (dy twice for complex A)

One pass finds each chunk's w from zero, `chain_kernel` of the forward pass chains the chunks backward, and the full
pass treats every chunk on its own: forward over its tiles for the states between them, then backward over the tiles.
Programs loop over chunks, so that the states between tiles need memory per program, not per chunk.

Gradients that are sums over channels or chunks leave as partial sums, added in a fixed order afterwards: no atomics.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.selective_scan.triton_forward import (
    channel_block,
    decays,
    load_coefficients,
    load_states,
    row_of,
    step_sizes,
    store_states,
    walk,
)
from longscan.ops.triton_utils import sequence_bounds, sequence_of_piece, sigmoid, silu, silu_slope

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def walk_back(ar, ai, cr, ci, wr, wi, row, COMPLEX: tl.constexpr, TILE: tl.constexpr):
    """G of a tile, and w of its first step, from decays, what outputs add to G, and w from after the tile."""
    gr = cr
    gi = ci
    for index in tl.static_range(TILE - 1, -1, -1):
        step_r = row_of(cr, row, index) + wr
        gr = tl.where(row == index, step_r[None, :], gr)
        a = row_of(ar, row, index)
        if COMPLEX:
            step_i = row_of(ci, row, index) + wi
            gi = tl.where(row == index, step_i[None, :], gi)
            b = row_of(ai, row, index)
            wr = a * step_r + b * step_i
            wi = a * step_i - b * step_r
        else:
            wr = a * step_r
    return gr, gi, wr, wi


_STRIDES = [
    "dy_row", "dy_time", "dt_row", "dt_time", "z_row", "z_time",
    "sequences", "length", "channels", "state", "groups", "blocks", "b_share", "c_share", "chunk",
]  # fmt: skip


@triton.jit(do_not_specialize=_STRIDES)
def flow_kernel(
    dy, dt, z, A, C, dt_bias, local, delta_sums, offsets,
    dy_row, dy_time, dt_row, dt_time, z_row, z_time,
    sequences, length, channels, state, groups, blocks, b_share, c_share, chunk, width,
    PACKED: tl.constexpr, COMPLEX: tl.constexpr, C_STEP: tl.constexpr, HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What flows out of each chunk at its start when nothing flows in at its end, and the sum of its deltas."""
    state = state.to(tl.int64)
    channels = channels.to(tl.int64)
    width = width.to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    piece = pid // (groups * blocks)
    d, live, group = channel_block(pid % (groups * blocks), blocks, groups, channels, BLOCK)
    sequence = sequence_of_piece(piece, offsets, sequences, length, chunk, PACKED)
    begin, first_step, count = sequence_bounds(offsets, sequence, length, PACKED)
    start = (piece - begin // chunk - sequence) * chunk
    count = tl.minimum(count - start, chunk)
    first_tile = begin // TILE + sequence + start // TILE

    planes: tl.constexpr = 2 if COMPLEX else 1
    plane = state * channels
    scale: tl.constexpr = 2.0 if COMPLEX else 1.0
    steps = tl.arange(0, TILE)
    row = steps[:, None]
    dy += sequence * dy_row + (first_step + start) * dy_time + d[None, :]
    dt += sequence * dt_row + (first_step + start) * dt_time + d[None, :]
    if HAS_Z:
        z += sequence * z_row + (first_step + start) * z_time + d[None, :]
    if C_STEP:
        C += (group // c_share) * state * width
    c_plane = (groups // c_share) * state * width if C_STEP else plane
    local += piece * planes * plane + d
    bias = tl.load(dt_bias + d, mask=live, other=0.0)
    delta_sum = tl.zeros((BLOCK,), tl.float32)

    tiles = (count + TILE - 1) // TILE
    for done in range(tiles):
        tile = tiles - 1 - done
        step = tile * TILE + steps
        inside = (step < count)[:, None] & live[None, :]
        delta, _ = step_sizes(dt + step[:, None] * dt_time, inside, bias, SOFTPLUS)
        weight = tl.load(dy + step[:, None] * dy_time, mask=inside, other=0.0).to(tl.float32)
        if HAS_Z:
            weight *= silu(tl.load(z + step[:, None] * z_time, mask=inside, other=0.0).to(tl.float32))
        delta_sum += tl.sum(delta, 0)
        columns = (first_tile + tile) * TILE + steps
        for n in range(state):
            Ar, Ai = load_states(A + n * channels + d, plane, live, COMPLEX)
            Cr, Ci = load_coefficients(C, n, state, width, columns, channels, d, live, c_plane, C_STEP, COMPLEX)
            wr, wi = load_states(local + n * channels, plane, live & (done > 0), COMPLEX)
            ar, ai = decays(delta, Ar, Ai, COMPLEX)
            heavy = scale * weight
            _gr, _gi, wr, wi = walk_back(ar, ai, heavy * Cr, -heavy * Ci, wr, wi, row, COMPLEX, TILE)
            store_states(local + n * channels, plane, wr, wi, live, COMPLEX)
        tl.debug_barrier()
    tl.store(delta_sums + piece * channels + d, delta_sum, mask=live)


@triton.jit
def add_over_time(pointer, values, live, fresh):
    """Adds the sum over a tile's steps to a partial sum in memory that this program owns; `fresh`: it starts there."""
    before = tl.load(pointer, mask=live & (fresh == 0), other=0.0)
    tl.store(pointer, before + tl.sum(values, 0), mask=live)


@triton.jit(do_not_specialize=["x_row", "x_time", "g_row", "g_time", "items", "room", *_STRIDES])
def gradient_kernel(
    dy, x, dt, z, A, B, C, D, dt_bias, borders, flows, scratch,
    dx, ddt, dz, dA, dB, dC, dD, ddt_bias, offsets,
    dy_row, dy_time, x_row, x_time, dt_row, dt_time, z_row, z_time,
    g_row, g_time,
    items, room, sequences, length, channels, state, groups, blocks, b_share, c_share, chunk, width,
    PACKED: tl.constexpr, COMPLEX: tl.constexpr, B_STEP: tl.constexpr, C_STEP: tl.constexpr,
    HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every gradient of one chunk and block of channels after the other.

    borders, flows (pieces, planes, state, channels): the state before each chunk, and w from after it (overwritten).
    scratch (programs, chunk / TILE, planes, state, room): states between tiles; room is BLOCK, unknown to the compiler,
    which else would lay these few loads out for speed and shuffle the rest through shared memory.
    dx, ddt, dz: strides g_*. dA, and dB and dC when constant: partial sums (pieces, planes, state, channels); else
    (blocks of a group's channels, planes, groups, state, columns). dD, ddt_bias: (pieces, channels). ALIGN: what a
    sequence's first column is a multiple of, a multiple of TILE itself.
    """
    state = state.to(tl.int64)
    channels = channels.to(tl.int64)
    width = width.to(tl.int64)
    planes: tl.constexpr = 2 if COMPLEX else 1
    scale: tl.constexpr = 2.0 if COMPLEX else 1.0
    plane = state * channels
    steps = tl.arange(0, TILE)
    lanes = tl.arange(0, BLOCK)
    row = steps[:, None]
    b_groups = groups // b_share
    c_groups = groups // c_share
    b_plane = b_groups * state * width if B_STEP else plane
    c_plane = c_groups * state * width if C_STEP else plane
    room = room.to(tl.int64)
    scratch_tile = planes * state * room
    scratch += tl.program_id(0).to(tl.int64) * (chunk // TILE) * scratch_tile

    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        piece = item // (groups * blocks)
        block = item % (groups * blocks)
        d, live, group = channel_block(block, blocks, groups, channels, BLOCK)
        sequence = sequence_of_piece(piece, offsets, sequences, length, chunk, PACKED)
        begin, first_step, count = sequence_bounds(offsets, sequence, length, PACKED)
        start = (piece - begin // chunk - sequence) * chunk
        count = tl.minimum(count - start, chunk)
        first_tile = (begin // ALIGN + sequence) * (ALIGN // TILE) + start // TILE
        tiles = (count + TILE - 1) // TILE

        here = first_step + start
        dy_at = dy + sequence * dy_row + here * dy_time + d[None, :]
        x_at = x + sequence * x_row + here * x_time + d[None, :]
        dt_at = dt + sequence * dt_row + here * dt_time + d[None, :]
        z_at = dy_at
        if HAS_Z:
            z_at = z + sequence * z_row + here * z_time + d[None, :]
        g_at = sequence * g_row + here * g_time + d[None, :]
        B_at = B
        if B_STEP:
            B_at = B + (group // b_share) * state * width
        C_at = C
        if C_STEP:
            C_at = C + (group // c_share) * state * width
        own = piece * planes * plane + d
        bias = tl.load(dt_bias + d, mask=live, other=0.0)
        skip = tl.load(D + d, mask=live, other=0.0)

        # Forward: the state before each tile but the first.
        source = borders + own
        source_row = channels
        source_plane = plane
        for tile in range(tiles - 1):
            step = tile * TILE + steps
            inside = (step < count)[:, None] & live[None, :]
            delta, _ = step_sizes(dt_at + step[:, None] * dt_time, inside, bias, SOFTPLUS)
            drive = delta * tl.load(x_at + step[:, None] * x_time, mask=inside, other=0.0).to(tl.float32)
            columns = (first_tile + tile) * TILE + steps
            target = scratch + (tile + 1) * scratch_tile + lanes
            for n in range(state):
                Ar, Ai = load_states(A + n * channels + d, plane, live, COMPLEX)
                hr, hi = load_states(source + n * source_row, source_plane, live, COMPLEX)
                Br, Bi = load_coefficients(B_at, n, state, width, columns, channels, d, live, b_plane, B_STEP, COMPLEX)
                ar, ai = decays(delta, Ar, Ai, COMPLEX)
                _states_r, _states_i, hr, hi = walk(ar, ai, drive * Br, drive * Bi, hr, hi, row, COMPLEX, TILE)
                store_states(target + n * room, state * room, hr, hi, live, COMPLEX)
            source = target
            source_row = room
            source_plane = state * room
            tl.debug_barrier()

        # Backward over the tiles.
        dD_sum = tl.zeros((BLOCK,), tl.float32)
        bias_sum = tl.zeros((BLOCK,), tl.float32)
        for done in range(tiles):
            tile = tiles - 1 - done
            step = tile * TILE + steps
            inside = (step < count)[:, None] & live[None, :]
            delta, _ = step_sizes(dt_at + step[:, None] * dt_time, inside, bias, SOFTPLUS)
            drive = delta * tl.load(x_at + step[:, None] * x_time, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(dy_at + step[:, None] * dy_time, mask=inside, other=0.0).to(tl.float32)
            if HAS_Z:
                weight *= silu(tl.load(z_at + step[:, None] * z_time, mask=inside, other=0.0).to(tl.float32))
            columns = (first_tile + tile) * TILE + steps
            into_drive = tl.zeros((TILE, BLOCK), tl.float32)
            into_delta = tl.zeros((TILE, BLOCK), tl.float32)
            read = tl.zeros((TILE, BLOCK), tl.float32)
            if tile == 0:
                source = borders + own
                source_row = channels
                source_plane = plane
            else:
                source = scratch + tile * scratch_tile + lanes
                source_row = room
                source_plane = state * room
            for n in range(state):
                Ar, Ai = load_states(A + n * channels + d, plane, live, COMPLEX)
                hr, hi = load_states(source + n * source_row, source_plane, live, COMPLEX)
                wr, wi = load_states(flows + own + n * channels, plane, live, COMPLEX)
                Br, Bi = load_coefficients(B_at, n, state, width, columns, channels, d, live, b_plane, B_STEP, COMPLEX)
                Cr, Ci = load_coefficients(C_at, n, state, width, columns, channels, d, live, c_plane, C_STEP, COMPLEX)
                ar, ai = decays(delta, Ar, Ai, COMPLEX)
                br = drive * Br
                bi = drive * Bi
                hr, hi, _end_r, _end_i = walk(ar, ai, br, bi, hr, hi, row, COMPLEX, TILE)
                heavy = scale * weight
                gr, gi, wr, wi = walk_back(ar, ai, heavy * Cr, -heavy * Ci, wr, wi, row, COMPLEX, TILE)
                # The decayed state before the step is what its drive did not add.
                er = hr - br
                if COMPLEX:
                    ei = hi - bi
                    if HAS_Z:
                        read += 2.0 * (hr * Cr - hi * Ci)
                    into_drive += gr * Br + gi * Bi
                    qr = gr * er + gi * ei
                    qi = gi * er - gr * ei
                    into_delta += qr * (Ar * _LN2)[None, :] + qi * Ai[None, :]
                else:
                    if HAS_Z:
                        read += hr * Cr
                    into_drive += gr * Br
                    qr = gr * er
                    qi = qr
                    into_delta += qr * (Ar * _LN2)[None, :]
                at = own + n * channels
                add_over_time(dA + at, delta * qr, live, done == 0)
                if COMPLEX:
                    add_over_time(dA + at + plane, delta * qi, live, done == 0)
                if B_STEP:
                    part = block % (b_share * blocks)
                    to = dB + (part * planes * b_groups + group // b_share) * state * width + n * width + columns
                    tl.store(to, tl.sum(drive * gr, 1))
                    if COMPLEX:
                        tl.store(to + b_plane, tl.sum(drive * gi, 1))
                else:
                    add_over_time(dB + at, drive * gr, live, done == 0)
                    if COMPLEX:
                        add_over_time(dB + at + plane, drive * gi, live, done == 0)
                if C_STEP:
                    part = block % (c_share * blocks)
                    to = dC + (part * planes * c_groups + group // c_share) * state * width + n * width + columns
                    tl.store(to, tl.sum(heavy * hr, 1))
                    if COMPLEX:
                        tl.store(to + c_plane, tl.sum(-heavy * hi, 1))
                else:
                    add_over_time(dC + at, heavy * hr, live, done == 0)
                    if COMPLEX:
                        add_over_time(dC + at + plane, -heavy * hi, live, done == 0)
                store_states(flows + at, plane, wr, wi, live, COMPLEX)

            # Read again rather than held in registers all along.
            values = tl.load(x_at + step[:, None] * x_time, mask=inside, other=0.0).to(tl.float32)
            g_step = g_at + step[:, None] * g_time
            tl.store(dx + g_step, (weight * skip[None, :] + delta * into_drive).to(dx.dtype.element_ty), mask=inside)
            ddelta = values * into_drive + into_delta
            if SOFTPLUS:
                raw = tl.load(dt_at + step[:, None] * dt_time, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
                ddelta *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
            tl.store(ddt + g_step, ddelta.to(ddt.dtype.element_ty), mask=inside)
            if HAS_Z:
                gate = tl.load(z_at + step[:, None] * z_time, mask=inside, other=0.0).to(tl.float32)
                into_y = tl.load(dy_at + step[:, None] * dy_time, mask=inside, other=0.0).to(tl.float32)
                dgate = into_y * (read + values * skip[None, :]) * silu_slope(gate)
                tl.store(dz + g_step, dgate.to(dz.dtype.element_ty), mask=inside)
            dD_sum += tl.sum(weight * values, 0)
            bias_sum += tl.sum(tl.where(inside, ddelta, 0.0), 0)
            tl.debug_barrier()
        tl.store(dD + piece * channels + d, dD_sum, mask=live)
        tl.store(ddt_bias + piece * channels + d, bias_sum, mask=live)
