"""Kernels of the Triton linear scan.

A program owns a block of channels of one piece and takes it in tiles of steps, each scanned by the associative product
(a, b) (a', b') = (a' a, a' b + b'). Steps are counted along the walk: forward from a sequence's first, backward
(REVERSE) from its last. Backward the decay of a step is that of the step after it, conjugated, and of the last step 1.
With PAIRS a number is complex, moved as one word of 64 bits: halves of their own would be every other float, in which
no neighbours are seen to share a transaction. Without, imaginary parts are numbers that nothing reads.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.triton_utils import sequence_bounds, sequence_of_piece


@triton.jit
def _then(a, b, c, d):
    return c * a, c * b + d


@triton.jit
def _then_pairs(ar, ai, br, bi, cr, ci, dr, di):
    return cr * ar - ci * ai, cr * ai + ci * ar, cr * br - ci * bi + dr, cr * bi + ci * br + di


@triton.jit
def _scanned(ar, ai, br, bi, PAIRS: tl.constexpr):
    """Products of decays, and states from zero, after every step of a tile."""
    if PAIRS:
        ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _then_pairs)
    else:
        ar, br = tl.associative_scan((ar, br), 0, _then)
    return ar, ai, br, bi


@triton.jit
def _times(ar, ai, br, bi, PAIRS: tl.constexpr):
    if PAIRS:
        return ar * br - ai * bi, ar * bi + ai * br
    else:
        return ar * br, bi


@triton.jit
def _row(x, chosen):
    """The one row of a tile that `chosen` (TILE,) marks."""
    return tl.sum(tl.where(chosen[:, None], x, 0.0), 0)[None, :]


@triton.jit
def _load(pointer, mask, other, PAIRS: tl.constexpr):
    """Real and imaginary parts; `other` (real) where there is nothing."""
    if PAIRS:
        word = tl.load(pointer, mask=mask, other=0)
        real = word.to(tl.int32).to(tl.float32, bitcast=True)
        return tl.where(mask, real, other), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        real = tl.load(pointer, mask=mask, other=other).to(tl.float32)
        return real, real * 0.0


@triton.jit
def _store(pointer, real, imaginary, mask, PAIRS: tl.constexpr):
    if PAIRS:
        low = real.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        high = imaginary.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(pointer, low | high, mask=mask)
    else:
        tl.store(pointer, real.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _locate(offsets, sequences, length, channels, size, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """A program's piece, sequence, first step in its row, steps of the sequence, first step of the walk, channels."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    d = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    piece = pid // blocks
    sequence = sequence_of_piece(piece, offsets, sequences, length, size, PACKED)
    begin, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    return piece, sequence, first, count, (piece - begin // size - sequence) * size, d


@triton.jit
def _tile(a, b, step, end, count, live, a_time, b_time, PAIRS: tl.constexpr, REVERSE: tl.constexpr):
    """Decays and inputs of some steps of the walk; past `end` a decay of 1 and nothing to add.

    `a` and `b` point at the sequence's first step, per channel.
    """
    inside = step < end
    if REVERSE:
        place = count - 1 - step
        ar, ai = _load(a + (place + 1)[:, None] * a_time, (inside & (step > 0))[:, None] & live, 1.0, PAIRS)
        ai = -ai
    else:
        place = step
        ar, ai = _load(a + place[:, None] * a_time, inside[:, None] & live, 1.0, PAIRS)
    br, bi = _load(b + place[:, None] * b_time, inside[:, None] & live, 0.0, PAIRS)
    return ar, ai, br, bi


@triton.jit
def summary_kernel(
    a, b, products, ends, offsets, a_row, a_time, a_channel, b_row, b_time, b_channel, sequences, length, channels,
    size, PACKED: tl.constexpr, PAIRS: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each piece's product of decays, and its end from zero: (pieces, channels)."""
    piece, sequence, first, count, start, d = _locate(offsets, sequences, length, channels, size, PACKED, BLOCK)
    live = d < channels
    a += sequence * a_row + first * a_time + d * a_channel
    b += sequence * b_row + first * b_time + d * b_channel
    end = tl.minimum(start + size, count)
    pr, pi = tl.full((1, BLOCK), 1.0, tl.float32), tl.zeros((1, BLOCK), tl.float32)
    er, ei = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
    last = tl.arange(0, TILE) == TILE - 1
    for tile in range((tl.maximum(end - start, 0) + TILE - 1) // TILE):
        step = start + tile * TILE + tl.arange(0, TILE)
        ar, ai, br, bi = _tile(a, b, step, end, count, live, a_time, b_time, PAIRS, REVERSE)
        ar, ai, br, bi = _scanned(ar, ai, br, bi, PAIRS)
        ar, ai, br, bi = _row(ar, last), _row(ai, last), _row(br, last), _row(bi, last)
        er, ei = _times(ar, ai, er, ei, PAIRS)
        er, ei = er + br, ei + bi
        pr, pi = _times(ar, ai, pr, pi, PAIRS)
    at = piece * channels + d
    _store(products + at, pr, pi, live, PAIRS)
    _store(ends + at, er, ei, live, PAIRS)


@triton.jit
def across_kernel(
    products, ends, state, offsets, sequences, length, channels, size, PACKED: tl.constexpr, PAIRS: tl.constexpr,
    HAS_STATE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces the pieces' ends from zero by their ends: a scan over the pieces of each sequence."""
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // blocks
    d = ((pid % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = d < channels
    begin, _, count = sequence_bounds(offsets, sequence, length, PACKED)
    piece = begin // size + sequence
    number = (count + size - 1) // size
    sr, si = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
    if HAS_STATE:
        sr, si = _load(state + sequence * channels + d, live, 0.0, PAIRS)
    last = tl.arange(0, TILE) == TILE - 1
    for tile in range((number + TILE - 1) // TILE):
        of_sequence = tile * TILE + tl.arange(0, TILE)
        mask = (of_sequence < number)[:, None] & live
        at = (piece + of_sequence)[:, None] * channels + d
        ar, ai = _load(products + at, mask, 1.0, PAIRS)
        br, bi = _load(ends + at, mask, 0.0, PAIRS)
        ar, ai, br, bi = _scanned(ar, ai, br, bi, PAIRS)
        hr, hi = _times(ar, ai, sr, si, PAIRS)
        hr, hi = hr + br, hi + bi
        _store(ends + at, hr, hi, mask, PAIRS)
        sr, si = _row(hr, last), _row(hi, last)


@triton.jit
def walk_kernel(
    a, b, out, state, ends, final, h, initial, da, offsets, a_row, a_time, a_channel, b_row, b_time, b_channel, h_row,
    h_time, h_channel, sequences, length, channels, size, PACKED: tl.constexpr, PAIRS: tl.constexpr,
    REVERSE: tl.constexpr, HAS_STATE: tl.constexpr, HAS_INITIAL: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """States of all steps, from `state` or, in later pieces of a sequence, from the `ends` of the piece before.

    Backward `out` is the gradient of b, `state` that of the final states and `final` that of the initial ones; the
    gradient of a is taken beside it, from h and the `initial` states. `out` and `da` are contiguous.
    """
    piece, sequence, first, count, start, d = _locate(offsets, sequences, length, channels, size, PACKED, BLOCK)
    live = d < channels
    a += sequence * a_row + first * a_time + d * a_channel
    b += sequence * b_row + first * b_time + d * b_channel
    # Rows of a packed call all lie in row 0, which `first` counts in.
    token = first if PACKED else sequence * length
    out += token * channels + d
    of_state = sequence * channels + d
    sr, si = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
    if HAS_STATE:
        sr, si = _load(state + of_state, live & (start == 0), 0.0, PAIRS)
    if CUT:
        er, ei = _load(ends + (piece - 1) * channels + d, live & (start > 0), 0.0, PAIRS)
        sr, si = sr + er, si + ei
    if REVERSE:
        da += token * channels + d
        h += sequence * h_row + first * h_time + d * h_channel
    end = tl.minimum(start + size, count)
    last = tl.arange(0, TILE) == TILE - 1
    for tile in range((tl.maximum(end - start, 0) + TILE - 1) // TILE):
        step = start + tile * TILE + tl.arange(0, TILE)
        ar, ai, br, bi = _tile(a, b, step, end, count, live, a_time, b_time, PAIRS, REVERSE)
        ar, ai, br, bi = _scanned(ar, ai, br, bi, PAIRS)
        xr, xi = _times(ar, ai, sr, si, PAIRS)
        xr, xi = xr + br, xi + bi
        mask = (step < end)[:, None] & live
        place = (count - 1 - step) if REVERSE else step
        _store(out + place[:, None] * channels, xr, xi, mask, PAIRS)
        if REVERSE:
            hr, hi = _load(h + (place - 1)[:, None] * h_time, mask & (place > 0)[:, None], 0.0, PAIRS)
            if HAS_INITIAL:
                ir, ii = _load(initial + of_state, mask & (place == 0)[:, None], 0.0, PAIRS)
                hr, hi = hr + ir, hi + ii
            gr, gi = _times(xr, xi, hr, -hi, PAIRS)
            _store(da + place[:, None] * channels, gr, gi, mask, PAIRS)
        sr, si = _row(xr, last), _row(xi, last)
    # The piece with the last step, or the only one of an empty sequence.
    if (start + size >= count) & ((start < count) | (start == 0)):
        if REVERSE:
            ar, ai = _load(a, live & (count > 0), 1.0, PAIRS)
            sr, si = _times(ar, -ai, sr, si, PAIRS)
        _store(final + of_state, sr, si, live, PAIRS)
