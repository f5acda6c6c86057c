"""Kernels of the Triton causal convolution.

A program owns a block of channels over one piece of a sequence, and walks it in tiles. `position` counts from the start
of the sequence; the inputs at positions -(WIDTH - 1) to -1 are the initial state, 0 where there is none.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.triton_utils import sequence_bounds, sequence_of_piece, silu, silu_slope


@triton.jit
def inputs_at(x, state, position, count, live, x_time, state_time, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr):
    """Inputs (TILE, BLOCK) at TILE positions: the sequence's, the initial state's before it, 0 past its end.

    `live` (1, BLOCK) says which channels exist. `x` and `state` point at the sequence's first step and at the oldest
    one of its state, per channel.
    """
    inside = ((position >= 0) & (position < count))[:, None] & live
    values = tl.load(x + position[:, None] * x_time, mask=inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        before = ((position < 0) & (position >= 1 - WIDTH))[:, None] & live
        at = state + (position + WIDTH - 1)[:, None] * state_time
        values += tl.load(at, mask=before, other=0.0).to(tl.float32)
    return values


@triton.jit
def convolve(
    x, state, weight, bias, position, count, live, x_time, state_time, weight_tap, WIDTH: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The filter's output at some positions."""
    total = tl.zeros((position.shape[0], live.shape[1]), tl.float32) + bias
    for k in range(WIDTH):
        tap = tl.load(weight + k * weight_tap, mask=live, other=0.0)
        total += tap * inputs_at(
            x, state, position + (k - WIDTH + 1), count, live, x_time, state_time, WIDTH, HAS_STATE
        )
    return total


@triton.jit
def locate(offsets, sequences, length, channels, PACKED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """A program's piece, sequence, first step in its row, steps of the sequence, first position, and channels."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    d = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    piece = pid // blocks
    sequence = sequence_of_piece(piece, offsets, sequences, length, PIECE, PACKED)
    begin, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    return piece, sequence, first, count, (piece - begin // PIECE - sequence) * PIECE, d


_RUNTIME = [
    "x_row", "x_time", "state_row", "state_time", "state_channel", "weight_channel", "weight_tap", "y_row",
    "y_time", "dy_row", "dy_time", "dfinal_row", "dfinal_time", "dfinal_channel",
    "sequences", "length", "channels",
]  # fmt: skip


@triton.jit(do_not_specialize=[name for name in _RUNTIME if not name.startswith("d")])
def forward_kernel(
    x, weight, bias, state, y, offsets,
    x_row, x_time, state_row, state_time, state_channel, weight_channel, weight_tap, y_row, y_time,
    sequences, length, channels,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, sequence, first, count, start, d = locate(offsets, sequences, length, channels, PACKED, PIECE, BLOCK)
    live = d < channels
    x += sequence * x_row + first * x_time + d
    y += sequence * y_row + first * y_time + d
    weight += d * weight_channel
    if HAS_STATE:
        state += sequence * state_row + d * state_channel
    b = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=live, other=0.0)
    for tile in range((tl.minimum(count - start, PIECE) + TILE - 1) // TILE):
        position = start + tile * TILE + tl.arange(0, TILE)
        out = convolve(x, state, weight, b, position, count, live, x_time, state_time, weight_tap, WIDTH, HAS_STATE)
        if SILU:
            out = silu(out)
        tl.store(y + position[:, None] * y_time, out.to(y.dtype.element_ty), mask=(position < count)[:, None] & live)


@triton.jit(do_not_specialize=["x_row", "x_time", "state_row", "state_time", "state_channel", "channels"])
def final_state_kernel(
    x, state, final, offsets, x_row, x_time, state_row, state_time, state_channel, length, channels,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last WIDTH - 1 inputs of each sequence, its initial state among them when it is shorter than that."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // blocks
    d = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = d < channels
    _, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    x += sequence * x_row + first * x_time + d
    if HAS_STATE:
        state += sequence * state_row + d * state_channel
    for k in range(WIDTH - 1):
        position = count - (WIDTH - 1) + k + tl.zeros((1,), tl.int64)
        values = inputs_at(x, state, position, count, live, x_time, state_time, WIDTH, HAS_STATE)
        at = final + (sequence * (WIDTH - 1) + k) * channels + d
        tl.store(at, values.to(final.dtype.element_ty), mask=live)


@triton.jit
def gradient_before_activation(
    dy, x, state, weight, bias, position, count, live, dy_time, x_time, state_time, weight_tap, WIDTH: tl.constexpr,
    SILU: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Gradient of the filter's output at some positions; 0 outside the sequence."""
    inside = ((position >= 0) & (position < count))[:, None] & live
    gradient = tl.load(dy + position[:, None] * dy_time, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        pre = convolve(x, state, weight, bias, position, count, live, x_time, state_time, weight_tap, WIDTH, HAS_STATE)
        gradient = tl.where(inside, gradient * silu_slope(pre), 0.0)
    return gradient


@triton.jit(do_not_specialize=_RUNTIME)
def backward_kernel(
    dy, dfinal, x, weight, bias, state, dx, dstate, dweight, dbias, offsets,
    dy_row, dy_time, dfinal_row, dfinal_time, dfinal_channel, x_row, x_time,
    state_row, state_time, state_channel, weight_channel, weight_tap, y_row, y_time,
    sequences, length, channels,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    TAPS: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one piece. dx has strides y_*; dweight (pieces, WIDTH, channels) and dbias (pieces, channels) are
    partial sums. TAPS: WIDTH rounded up to a power of two.

    What the gradient of position p gathers from the outputs p to p + WIDTH - 1 is recomputed here, as the filter is
    short; positions before the sequence belong to the initial state, and the program of its first piece serves them.
    """
    piece, sequence, first, count, start, d = locate(offsets, sequences, length, channels, PACKED, PIECE, BLOCK)
    live = d < channels
    dy += sequence * dy_row + first * dy_time + d
    x += sequence * x_row + first * x_time + d
    dx += sequence * y_row + first * y_time + d
    dfinal += sequence * dfinal_row + d * dfinal_channel
    weight += d * weight_channel
    if HAS_STATE:
        state += sequence * state_row + d * state_channel
    b = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=live, other=0.0)
    steps = tl.arange(0, TILE)
    taps = tl.arange(0, TAPS)[:, None]
    tap_sums = tl.zeros((TAPS, BLOCK), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    tiles = (tl.minimum(count - start, PIECE) + TILE - 1) // TILE

    for tile in range(tiles):
        position = start + tile * TILE + steps
        inside = (position < count)[:, None] & live
        kept = position - (count - (WIDTH - 1))
        total = tl.load(dfinal + kept[:, None] * dfinal_time, mask=inside & (kept >= 0)[:, None], other=0.0).to(
            tl.float32
        )
        for k in range(WIDTH):
            gradient = gradient_before_activation(
                dy, x, state, weight, b, position + (WIDTH - 1 - k), count, live, dy_time, x_time, state_time,
                weight_tap, WIDTH, SILU, HAS_STATE,
            )  # fmt: skip
            total += gradient * tl.load(weight + k * weight_tap, mask=live, other=0.0)
        tl.store(dx + position[:, None] * y_time, total.to(dx.dtype.element_ty), mask=inside)

        gradient = gradient_before_activation(
            dy,
            x,
            state,
            weight,
            b,
            position,
            count,
            live,
            dy_time,
            x_time,
            state_time,
            weight_tap,
            WIDTH,
            SILU,
            HAS_STATE,
        )
        bias_sum += tl.sum(gradient, 0)
        for k in range(WIDTH):
            values = inputs_at(x, state, position + (k - WIDTH + 1), count, live, x_time, state_time, WIDTH, HAS_STATE)
            tap_sums += tl.where(taps == k, tl.sum(gradient * values, 0)[None, :], 0.0)
    if tiles > 0:
        tl.store(dweight + (piece * WIDTH + taps) * channels + d, tap_sums, mask=live & (taps < WIDTH))
        if HAS_BIAS:
            tl.store(dbias + piece * channels + d, bias_sum[None, :], mask=live)


@triton.jit(do_not_specialize=_RUNTIME)
def state_gradient_kernel(
    dy, dfinal, x, weight, bias, state, dx, dstate, dweight, dbias, offsets,
    dy_row, dy_time, dfinal_row, dfinal_time, dfinal_channel, x_row, x_time,
    state_row, state_time, state_channel, weight_channel, weight_tap, y_row, y_time,
    sequences, length, channels,
    PACKED: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial states: what `backward_kernel` does, at the positions before each sequence."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // blocks
    d = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = d < channels
    _, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    dy += sequence * dy_row + first * dy_time + d
    x += sequence * x_row + first * x_time + d
    state += sequence * state_row + d * state_channel
    dfinal += sequence * dfinal_row + d * dfinal_channel
    weight += d * weight_channel
    b = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=live, other=0.0)
    for row in range(WIDTH - 1):
        # Of a sequence shorter than the state, part of the initial state is still in the final one.
        total = tl.load(dfinal + (row - count) * dfinal_time, mask=live & (row >= count), other=0.0).to(tl.float32)
        for k in range(row + 1):
            position = row - k + tl.zeros((1,), tl.int64)
            gradient = gradient_before_activation(
                dy,
                x,
                state,
                weight,
                b,
                position,
                count,
                live,
                dy_time,
                x_time,
                state_time,
                weight_tap,
                WIDTH,
                SILU,
                True,
            )
            total += gradient * tl.load(weight + k * weight_tap, mask=live, other=0.0)
        at = dstate + (sequence * (WIDTH - 1) + row) * channels + d
        tl.store(at, total.to(dstate.dtype.element_ty), mask=live)


@triton.jit(
    do_not_specialize=[
        "state_row", "state_time", "state_channel", "x_row", "weight_channel", "weight_tap", "channels",
    ]
)  # fmt: skip
def step_kernel(
    state, x, weight, bias, y, state_row, state_time, state_channel, x_row, weight_channel, weight_tap, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step, and the state moved on by one in place: a thread reads each entry before it writes the one before."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = d < channels
    state += row * state_row + d * state_channel
    weight += d * weight_channel
    newest = tl.load(x + row * x_row + d, mask=live, other=0.0)
    total = newest.to(tl.float32) * tl.load(weight + (WIDTH - 1) * weight_tap, mask=live, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=live, other=0.0)
    for k in range(WIDTH - 1):
        entry = tl.load(state + k * state_time, mask=live, other=0.0)
        total += entry.to(tl.float32) * tl.load(weight + k * weight_tap, mask=live, other=0.0)
        if k > 0:
            tl.store(state + (k - 1) * state_time, entry, mask=live)
    if WIDTH > 1:
        tl.store(state + (WIDTH - 2) * state_time, newest, mask=live)
    if SILU:
        total = silu(total)
    tl.store(y + row * channels + d, total.to(y.dtype.element_ty), mask=live)
