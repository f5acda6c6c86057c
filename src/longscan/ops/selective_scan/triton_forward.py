"""Forward kernels of the Triton selective scan.

A program owns a block of channels, one to a thread, and walks time in tiles of `TILE` steps. Within a tile it takes
the states one after the other: the decays exp(delta A_n) of the whole tile, the recurrence over its steps (inside a
thread, as all steps of a channel lie in one), and the product with C_n. So registers do not grow with the number of
states, and any number will do. The states wait in memory (`carry`, in cache) for the next tile.

Where rows and channels alone fill the GPU, a program walks its whole sequence. Else time is cut into chunks: one pass
finds each chunk's state from zero and its sum of delta, a second kernel chains the chunks, and the full pass then
starts every chunk from its true state. The states at chunk borders are also what the backward pass starts from.

A is passed transposed, (planes, state, channels), its real part times log2(e), as are states: (pieces, planes, state,
channels). A plane is the real or the imaginary part.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.triton_utils import sequence_bounds, sequence_of_piece, silu, softplus


@triton.jit
def channel_block(block, blocks, groups, channels, BLOCK: tl.constexpr):
    """Channels of a block, whether each exists, and the group they share; a block never spans two groups."""
    group = block // blocks
    within = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    return group * (channels // groups) + within, within < channels // groups, group


@triton.jit
def step_sizes(pointers, mask, bias, SOFTPLUS: tl.constexpr):
    """delta of a tile, 0 outside the sequence, where the state then stays as it is; and what softplus was given."""
    raw = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    delta = softplus(raw) if SOFTPLUS else raw
    return tl.where(mask, delta, 0.0), raw


@triton.jit
def load_states(pointer, plane_stride, mask, COMPLEX: tl.constexpr):
    """One state of each channel: real and imaginary part."""
    re = tl.load(pointer, mask=mask, other=0.0)
    im = tl.load(pointer + plane_stride, mask=mask, other=0.0) if COMPLEX else re
    return re, im


@triton.jit
def row_of(tile, row, index: tl.constexpr):
    """Row `index` of a tile, to the bit. All rows lie in one thread, so that the compiler folds this to a register."""
    bits = tl.where(row == index, tile.to(tl.int32, bitcast=True), -(2**31))
    return tl.max(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def store_states(pointer, plane_stride, re, im, mask, COMPLEX: tl.constexpr):
    """Stores one state of each channel."""
    tl.store(pointer, re, mask=mask)
    if COMPLEX:
        tl.store(pointer + plane_stride, im, mask=mask)


@triton.jit
def load_coefficients(
    pointer, n, state, width, columns, channels, d, mask, plane_stride, STEP: tl.constexpr, COMPLEX: tl.constexpr
):
    """B_n or C_n of a tile: (TILE, 1) when given per step (`pointer` at its group), (1, BLOCK) when constant."""
    if STEP:
        at = pointer + n * width + columns
        re = tl.load(at)[:, None]
        im = tl.load(at + plane_stride)[:, None] if COMPLEX else re
    else:
        at = pointer + n * channels + d
        re = tl.load(at, mask=mask, other=0.0)[None, :]
        im = tl.load(at + plane_stride, mask=mask, other=0.0)[None, :] if COMPLEX else re
    return re, im


@triton.jit
def decays(delta, re, im, COMPLEX: tl.constexpr):
    """exp(delta A) from A's parts, the real one times log2(e)."""
    size = tl.exp2(delta * re[None, :])
    if COMPLEX:
        angle = delta * im[None, :]
        ar = size * tl.cos(angle)
        ai = size * tl.sin(angle)
    else:
        ar = size
        ai = size
    return ar, ai


@triton.jit
def walk(ar, ai, br, bi, hr, hi, row, COMPLEX: tl.constexpr, TILE: tl.constexpr):
    """States of a tile from its decays, its drives and the state before it; and the state after its last step.

    Written out step by step: each thread holds all steps of its channels, and no number has to leave it.
    """
    states_r = br
    states_i = bi
    for index in tl.static_range(TILE):
        a = row_of(ar, row, index)
        if COMPLEX:
            b = row_of(ai, row, index)
            before = hr
            hr = a * before - b * hi + row_of(br, row, index)
            hi = a * hi + b * before + row_of(bi, row, index)
            states_i = tl.where(row == index, hi[None, :], states_i)
        else:
            hr = a * hr + row_of(br, row, index)
        states_r = tl.where(row == index, hr[None, :], states_r)
    return states_r, states_i, hr, hi


_RUNTIME = [
    "x_row", "x_time", "dt_row", "dt_time", "z_row", "z_time",
    "y_row", "y_time", "sequences", "length", "channels", "state", "groups", "blocks", "b_share", "c_share",
    "chunk",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def scan_kernel(
    x, dt, z, A, B, C, D, dt_bias, y, carry, borders, delta_sums, offsets,
    x_row, x_time, dt_row, dt_time, z_row, z_time, y_row, y_time,
    sequences, length, channels, state, groups, blocks, b_share, c_share, chunk, width,
    PACKED: tl.constexpr, CHUNKED: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, COMPLEX: tl.constexpr,
    B_STEP: tl.constexpr, C_STEP: tl.constexpr, HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scans one block of channels over one sequence, or one chunk of it with CHUNKED.

    carry (spans, planes, state, channels): the state before the span's first step on entry (unless CHUNKED: then it is
    read from `borders`, or is zero without OUTPUT), the one after its last step on return.
    borders (pieces of `chunk` steps, planes, state, channels): written with SAVE.
    delta_sums (spans, channels): written without OUTPUT, in which case y, and C, D and z, are left alone.
    """
    # 64-bit throughout: loop indices take their type from these.
    state = state.to(tl.int64)
    channels = channels.to(tl.int64)
    width = width.to(tl.int64)
    pid = tl.program_id(0).to(tl.int64)
    span = pid // (groups * blocks)
    d, live, group = channel_block(pid % (groups * blocks), blocks, groups, channels, BLOCK)
    sequence = sequence_of_piece(span, offsets, sequences, length, chunk, PACKED) if CHUNKED else span
    begin, first_step, count = sequence_bounds(offsets, sequence, length, PACKED)
    first_piece = begin // chunk + sequence
    start = begin * 0
    if CHUNKED:
        start = (span - first_piece) * chunk
        count = tl.minimum(count - start, chunk)
    first_tile = begin // TILE + sequence + start // TILE

    planes: tl.constexpr = 2 if COMPLEX else 1
    plane = state * channels
    steps = tl.arange(0, TILE)
    row = steps[:, None]
    x += sequence * x_row + (first_step + start) * x_time + d[None, :]
    dt += sequence * dt_row + (first_step + start) * dt_time + d[None, :]
    if OUTPUT:
        y += sequence * y_row + (first_step + start) * y_time + d[None, :]
        if HAS_Z:
            z += sequence * z_row + (first_step + start) * z_time + d[None, :]
    if B_STEP:
        B += (group // b_share) * state * width
    if C_STEP:
        C += (group // c_share) * state * width
    b_plane = (groups // b_share) * state * width if B_STEP else plane
    c_plane = (groups // c_share) * state * width if C_STEP else plane
    carry += span * planes * plane + d
    borders += d
    source = carry
    if CHUNKED and OUTPUT:
        source = borders + span * planes * plane
    bias = tl.load(dt_bias + d, mask=live, other=0.0)
    skip = tl.load(D + d, mask=live, other=0.0)
    delta_sum = tl.zeros((BLOCK,), tl.float32)

    for tile in range((count + TILE - 1) // TILE):
        step = tile * TILE + steps
        inside = (step < count)[:, None] & live[None, :]
        delta, _ = step_sizes(dt + step[:, None] * dt_time, inside, bias, SOFTPLUS)
        values = tl.load(x + step[:, None] * x_time, mask=inside, other=0.0).to(tl.float32)
        drive = delta * values
        total = values * skip[None, :]
        columns = (first_tile + tile) * TILE + steps
        known = live & ((tile > 0) | OUTPUT)
        saves = live & ((tile * TILE) % chunk == 0)
        border = borders + (first_piece + (tile * TILE) // chunk) * planes * plane
        for n in range(state):
            Ar, Ai = load_states(A + n * channels + d, plane, live, COMPLEX)
            hr, hi = load_states(source + n * channels, plane, known, COMPLEX)
            Br, Bi = load_coefficients(B, n, state, width, columns, channels, d, live, b_plane, B_STEP, COMPLEX)
            if SAVE:
                store_states(border + n * channels, plane, hr, hi, saves, COMPLEX)
            ar, ai = decays(delta, Ar, Ai, COMPLEX)
            states_r, states_i, hr, hi = walk(ar, ai, drive * Br, drive * Bi, hr, hi, row, COMPLEX, TILE)
            if OUTPUT:
                Cr, Ci = load_coefficients(C, n, state, width, columns, channels, d, live, c_plane, C_STEP, COMPLEX)
                if COMPLEX:
                    total += 2.0 * (states_r * Cr - states_i * Ci)
                else:
                    total += states_r * Cr
            store_states(carry + n * channels, plane, hr, hi, live, COMPLEX)
        if OUTPUT:
            if HAS_Z:
                total *= silu(tl.load(z + step[:, None] * z_time, mask=inside, other=0.0).to(tl.float32))
            tl.store(y + step[:, None] * y_time, total.to(y.dtype.element_ty), mask=inside)
        else:
            delta_sum += tl.sum(delta, 0)
        source = carry
        # The next tile's threads need not be the ones that wrote the states they read.
        tl.debug_barrier()
    if not OUTPUT:
        tl.store(delta_sums + span * channels + d, delta_sum, mask=live)


@triton.jit(do_not_specialize=["sequences", "length", "channels", "state", "chunk"])
def chain_kernel(
    local, delta_sums, A, borders, edge, offsets, sequences, length, channels, state, chunk,
    PACKED: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chains the chunks of each sequence: borders[c + 1] = exp(A delta_sums[c]) borders[c] + local[c].

    The first border is `edge` (sequences, planes, state, channels), where the value past the last chunk is left. With
    REVERSE the chain runs from the last chunk to the first, with the conjugate decay: that is how gradients flow.
    """
    state = state.to(tl.int64)
    channels = channels.to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    d = (pid % channel_blocks) * BLOCK + tl.arange(0, BLOCK)
    live = d < channels
    n = (pid // channel_blocks) % state
    sequence = pid // (channel_blocks * state)
    begin, _, count = sequence_bounds(offsets, sequence, length, PACKED)
    chunks = (count + chunk - 1) // chunk
    first_piece = begin // chunk + sequence

    planes: tl.constexpr = 2 if COMPLEX else 1
    plane = state * channels
    rows = tl.arange(0, TILE)
    first = (rows == 0)[:, None]
    Ar, Ai = load_states(A + n * channels + d, plane, live, COMPLEX)
    if REVERSE:
        Ai = -Ai
    edge += sequence * planes * plane + n * channels + d
    hr, hi = load_states(edge, plane, live, COMPLEX)
    for tile in range((chunks + TILE - 1) // TILE):
        order = tile * TILE + rows
        inside = (order < chunks)[:, None] & live[None, :]
        follows = (order + 1 < chunks)[:, None] & live[None, :]
        onward = 1
        piece = first_piece + order
        if REVERSE:
            onward = -1
            piece = first_piece + chunks - 1 - order
        at = piece[:, None] * planes * plane + n * channels + d[None, :]
        delta = tl.load(delta_sums + piece[:, None] * channels + d[None, :], mask=inside, other=0.0)
        br = tl.load(local + at, mask=inside, other=0.0)
        bi = tl.load(local + at + plane, mask=inside, other=0.0) if COMPLEX else br
        begins = first & inside & (tile == 0)
        zero = tl.zeros_like(br)
        store_states(borders + at, plane, hr[None, :] + zero, hi[None, :] + zero, begins, COMPLEX)
        ar, ai = decays(delta, Ar, Ai, COMPLEX)
        br, bi, hr, hi = walk(ar, ai, br, bi, hr, hi, rows[:, None], COMPLEX, TILE)
        store_states(borders + at + onward * planes * plane, plane, br, bi, follows, COMPLEX)
    store_states(edge, plane, hr, hi, live, COMPLEX)
