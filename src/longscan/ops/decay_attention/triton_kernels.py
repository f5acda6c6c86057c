"""Triton kernels of the decay attention: states at chunk borders, outputs, gradients, one step.

In the notation of `chunked.py`. Time is cut into pieces of CHUNK steps, numbered as `longscan.ops.triton_utils` says:

    outer_kernel     what every chunk adds to the state, (e * K)^T V, side by side; or to its gradient, (p * Q)^T dY
    pass_kernel      the states that enter every chunk, one chunk after the other; or backwards, the gradients
    output_kernel    Y = (Q K^T * D) V + (p * Q) S, side by side
    gradient_kernel  dQ, dK, dV and the log-decay's gradient, side by side

No kernel adds to what another program wrote, so that the same inputs give the same bits. Heads h with the same
h // shared have their queries and keys in common.

Dots are of COMPUTE numbers, summed in float32. Sums of log-decays over (j, i] are differences of running sums, in which
small terms would be lost behind large ones: whole parts and fractions are summed apart. Sums of whole parts are exact,
and those of fractions stay below half a chunk.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.triton_utils import sequence_bounds, sequence_of_piece


@triton.jit
def place(program, offsets, sequences, length, heads, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Head, sequence, first step of the chunk inside its row, and steps left from there (none: an empty piece)."""
    piece = program // heads
    sequence = sequence_of_piece(piece, offsets, sequences, length, CHUNK, PACKED)
    begin, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    start = (piece - (begin // CHUNK + sequence)) * CHUNK
    return program % heads, sequence, first + start, count - start


@triton.jit
def running_sums(log_decay, step, left, CHUNK: tl.constexpr):
    """Sums of the log-decays of a chunk up to each step, as whole parts and fractions, and both of the whole chunk.

    What is below -100000 is as good as -inf: its exponential is zero, and so is that of any sum with it.
    """
    i = tl.arange(0, CHUNK)
    g = tl.load(log_decay + i * step, mask=i < left, other=0.0)
    g = tl.maximum(g, -100000.0, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(g + 0.5)
    part = g - whole
    return tl.cumsum(whole, 0), tl.cumsum(part, 0), tl.sum(whole, 0), tl.sum(part, 0)


@triton.jit
def between(whole, part, CHUNK: tl.constexpr):
    """D: what is left at step i of what came at step j, zero above the diagonal."""
    i = tl.arange(0, CHUNK)
    sums = (whole[:, None] - whole[None, :]) + (part[:, None] - part[None, :])
    return tl.exp(tl.where(i[:, None] >= i[None, :], sums, float("-inf")))


@triton.jit
def tile(
    pointer, step, left, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):
    """Rows of a chunk, or of a state, and COLUMNS of their WIDTH columns from `column` on."""
    i = tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    mask = (i < left)[:, None] & (c < WIDTH)[None, :]
    return tl.load(pointer + i[:, None] * step + c[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def put(pointer, step, left, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `tile`."""
    i = tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    mask = (i < left)[:, None] & (c < WIDTH)[None, :]
    tl.store(pointer + i[:, None] * step + c[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    x, w, log_decay, drives, totals, offsets,
    x_row, x_step, x_head, w_row, w_step, w_head, g_row, g_step, g_head,
    sequences, length, heads, shared,
    D_K: tl.constexpr, D_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, FROM_START: tl.constexpr, PACKED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head, one block of the state: sum of x w^T, with each step's decay to the end or from the start."""
    program = tl.program_id(0)
    head, sequence, first, left = place(program, offsets, sequences, length, heads, CHUNK, PACKED)
    if left <= 0:
        return
    row = sequence.to(tl.int64)
    k = tl.program_id(1) // tl.cdiv(D_V, BLOCK_V) * BLOCK_K
    v = tl.program_id(1) % tl.cdiv(D_V, BLOCK_V) * BLOCK_V
    keys = tile(
        x + row * x_row + first * x_step + (head // shared) * x_head, x_step, left, k, CHUNK, BLOCK_K, D_K, COMPUTE
    )
    values = tile(w + row * w_row + first * w_step + head * w_head, w_step, left, v, CHUNK, BLOCK_V, D_V, COMPUTE)
    if DECAY:
        whole, part, all_whole, all_part = running_sums(
            log_decay + row * g_row + first * g_step + head * g_head, g_step, left, CHUNK
        )
        sums = whole + part if FROM_START else (all_whole - whole) + (all_part - part)
        keys = (keys * tl.exp(sums)[:, None]).to(COMPUTE)
        tl.store(totals + program, tl.exp(all_whole + all_part), mask=tl.program_id(1) == 0)
    drive = tl.dot(tl.trans(keys), values, input_precision=PRECISION)
    put(drives + program.to(tl.int64) * D_K * D_V + k * D_V, D_V, D_K - k, v, drive, BLOCK_K, BLOCK_V, D_V)


@triton.jit
def pass_kernel(
    drives, totals, start, borders, end, offsets, length, heads,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    DECAY: tl.constexpr, HAS_START: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One sequence and head, some entries of the state: what it is before each chunk (REVERSE: behind), and at last."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin, _, count = sequence_bounds(offsets, sequence, length, PACKED)
    chunks = (count + CHUNK - 1) // CHUNK
    piece = begin // CHUNK + sequence
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < SIZE
    own = tl.program_id(0).to(tl.int64) * SIZE + entry
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_START:
        state = tl.load(start + own, mask=mask, other=0.0)
    for n in range(chunks):
        number = (piece + (chunks - 1 - n if REVERSE else n)) * heads + head
        where = number * SIZE + entry
        tl.store(borders + where, state.to(borders.dtype.element_ty), mask=mask)
        if DECAY:
            state *= tl.load(totals + number)
        state += tl.load(drives + where, mask=mask, other=0.0)
    tl.store(end + own, state, mask=mask)


@triton.jit
def output_kernel(
    q, k, v, log_decay, states, y, offsets,
    q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head, g_row, g_step, g_head, y_row, y_step, y_head,
    sequences, length, heads, shared,
    D_K: tl.constexpr, D_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head: its outputs, from its own steps and from the state that enters."""
    program = tl.program_id(0)
    head, sequence, first, left = place(program, offsets, sequences, length, heads, CHUNK, PACKED)
    if left <= 0:
        return
    row = sequence.to(tl.int64)
    q += row * q_row + first * q_step + (head // shared) * q_head
    k += row * k_row + first * k_step + (head // shared) * k_head
    v += row * v_row + first * v_step + head * v_head
    y += row * y_row + first * y_step + head * y_head
    states += program.to(tl.int64) * D_K * D_V

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for b in range(0, D_K, BLOCK_K):
        queries = tile(q, q_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        keys = tile(k, k_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    if DECAY:
        whole, part, _, _ = running_sums(log_decay + row * g_row + first * g_step + head * g_head, g_step, left, CHUNK)
        scores *= between(whole, part, CHUNK)
    else:
        i = tl.arange(0, CHUNK)
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    weights = scores.to(COMPUTE)

    for c in range(0, D_V, BLOCK_V):
        out = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for b in range(0, D_K, BLOCK_K):
            queries = tile(q, q_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
            state = tile(states + b * D_V, D_V, D_K - b, c, BLOCK_K, BLOCK_V, D_V, COMPUTE)
            out = tl.dot(queries, state, out, input_precision=PRECISION)
        if DECAY:
            out *= tl.exp(whole + part)[:, None]
        values = tile(v, v_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
        out = tl.dot(weights, values, out, input_precision=PRECISION)
        put(y, y_step, left, c, out, CHUNK, BLOCK_V, D_V)


@triton.jit
def gradient_kernel(
    dy, q, k, v, log_decay, states, later, dq, dk, dv, dg, offsets,
    dy_row, dy_step, dy_head, q_row, q_step, q_head, k_row, k_step, k_head, v_row, v_step, v_head,
    g_row, g_step, g_head, dk_row, dk_step, dk_head, dv_row, dv_step, dv_head, dg_row, dg_step, dg_head,
    sequences, length, heads, shared,
    D_K: tl.constexpr, D_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and head: gradients of its q, k, v and log-decays (`later`: gradients of the states that leave)."""
    program = tl.program_id(0)
    head, sequence, first, left = place(program, offsets, sequences, length, heads, CHUNK, PACKED)
    if left <= 0:
        return
    row = sequence.to(tl.int64)
    dy += row * dy_row + first * dy_step + head * dy_head
    q += row * q_row + first * q_step + (head // shared) * q_head
    k += row * k_row + first * k_step + (head // shared) * k_head
    v += row * v_row + first * v_step + head * v_head
    dq += row * dk_row + first * dk_step + head * dk_head
    dk += row * dk_row + first * dk_step + head * dk_head
    dv += row * dv_row + first * dv_step + head * dv_head
    states += program.to(tl.int64) * D_K * D_V
    later += program.to(tl.int64) * D_K * D_V

    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for b in range(0, D_K, BLOCK_K):
        queries = tile(q, q_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        keys = tile(k, k_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for c in range(0, D_V, BLOCK_V):
        out = tile(dy, dy_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
        values = tile(v, v_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
        dscores = tl.dot(out, tl.trans(values), dscores, input_precision=PRECISION)
    if DECAY:
        whole, part, all_whole, all_part = running_sums(
            log_decay + row * g_row + first * g_step + head * g_head, g_step, left, CHUNK
        )
        decays = between(whole, part, CHUNK)
        from_start = tl.exp(whole + part)
        to_end = tl.exp((all_whole - whole) + (all_part - part))
        dscores *= decays
        within = scores * dscores
        scores *= decays
        # A step m decays what passes from before it to itself or on: sums over i >= m > j of a chunk's pairs, of these
        # terms themselves (row sums less column sums would lose them behind the diagonal), and what enters, leaves, or
        # passes through.
        i = tl.arange(0, CHUNK)
        pairs = tl.sum(tl.where(i[:, None] > i[None, :], tl.cumsum(within, 0, reverse=True), 0.0), 1)
        onward = tl.zeros((CHUNK,), tl.float32)
        leaving = tl.zeros((CHUNK,), tl.float32)
        through = 0.0
    else:
        i = tl.arange(0, CHUNK)
        below = i[:, None] >= i[None, :]
        dscores = tl.where(below, dscores, 0.0)
        scores = tl.where(below, scores, 0.0)
    weights = scores.to(COMPUTE)
    dweights = dscores.to(COMPUTE)

    for b in range(0, D_K, BLOCK_K):
        dqueries = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        dkeys = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for c in range(0, D_V, BLOCK_V):
            state = tile(states + b * D_V, D_V, D_K - b, c, BLOCK_K, BLOCK_V, D_V, COMPUTE)
            dstate = tile(later + b * D_V, D_V, D_K - b, c, BLOCK_K, BLOCK_V, D_V, COMPUTE)
            out = tile(dy, dy_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
            values = tile(v, v_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
            dqueries = tl.dot(out, tl.trans(state), dqueries, input_precision=PRECISION)
            dkeys = tl.dot(values, tl.trans(dstate), dkeys, input_precision=PRECISION)
            if DECAY:
                through += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        queries = tile(q, q_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        keys = tile(k, k_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
        if DECAY:
            dqueries *= from_start[:, None]
            dkeys *= to_end[:, None]
            onward += tl.sum(queries * dqueries, 1)
            leaving += tl.sum(keys * dkeys, 1)
        dqueries = tl.dot(dweights, keys, dqueries, input_precision=PRECISION)
        dkeys = tl.dot(tl.trans(dweights), queries, dkeys, input_precision=PRECISION)
        put(dq, dk_step, left, b, dqueries, CHUNK, BLOCK_K, D_K)
        put(dk, dk_step, left, b, dkeys, CHUNK, BLOCK_K, D_K)

    for c in range(0, D_V, BLOCK_V):
        dvalues = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for b in range(0, D_K, BLOCK_K):
            keys = tile(k, k_step, left, b, CHUNK, BLOCK_K, D_K, COMPUTE)
            dstate = tile(later + b * D_V, D_V, D_K - b, c, BLOCK_K, BLOCK_V, D_V, COMPUTE)
            dvalues = tl.dot(keys, dstate, dvalues, input_precision=PRECISION)
        if DECAY:
            dvalues *= to_end[:, None]
        out = tile(dy, dy_step, left, c, CHUNK, BLOCK_V, D_V, COMPUTE)
        dvalues = tl.dot(tl.trans(weights), out, dvalues, input_precision=PRECISION)
        put(dv, dv_step, left, c, dvalues, CHUNK, BLOCK_V, D_V)

    if DECAY:
        i = tl.arange(0, CHUNK)
        total = pairs + tl.cumsum(onward, 0, reverse=True) + (tl.cumsum(leaving, 0) - leaving)
        total += through * tl.exp(all_whole + all_part)
        tl.store(dg + row * dg_row + (first + i) * dg_step + head * dg_head, total, mask=i < left)


@triton.jit
def step_kernel(
    state, q, k, v, log_decay, y,
    s_row, s_head, s_k, s_v, q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, heads, shared,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One row and head, BLOCK_V columns of its state, which are overwritten."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    values = tl.load(v + row * v_row + head * v_head + c, mask=c < D_V, other=0.0).to(tl.float32)
    decay = 1.0
    if DECAY:
        decay = tl.exp(tl.load(log_decay + row * g_row + head * g_head))
    out = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, D_K, BLOCK_K):
        b = start + tl.arange(0, BLOCK_K)
        queries = tl.load(q + row * q_row + (head // shared) * q_head + b, mask=b < D_K, other=0.0).to(tl.float32)
        keys = tl.load(k + row * k_row + (head // shared) * k_head + b, mask=b < D_K, other=0.0).to(tl.float32)
        where = state + row * s_row + head * s_head + b[:, None] * s_k + c[None, :] * s_v
        mask = (b < D_K)[:, None] & (c < D_V)[None, :]
        block = tl.load(where, mask=mask, other=0.0) * decay + keys[:, None] * values[None, :]
        tl.store(where, block, mask=mask)
        out += tl.sum(block * queries[:, None], 0)
    tl.store(y + tl.program_id(0).to(tl.int64) * D_V + c, out, mask=c < D_V)
