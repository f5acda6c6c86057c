"""Matrix times a few vectors, at the speed of reading the matrix.

A row is read once, from front to back, for all vectors of the batch: processors prefetch one long stream best (two rows
at a time read at half the rate). Sums run in the same order whatever the batch, so a vector's result does not depend on
its company.
"""

from __future__ import annotations

from longscan.ops.int8 import GROUP
from longscan.ops.jit import inline, kernel
from longscan.ops.simd import AMD, HAS_FLOAT16, VECTOR_BYTES, WIDTH, broadcast, fma, total
from longscan.ops.simd_memory import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    load,
    load_format,
    load_int8,
    load_int8_part,
    load_part,
    load_scalar,
    prefetch,
    prefetch_second,
    store_scalar,
)

#: The format of an `Int8Matrix`, beside those of `simd`.
INT8 = 3

_CACHE_LINE = 64

# Bytes ahead of a row that are asked for: a processor's own prefetching stops at the end of a page of 4 KiB, and the
# first cache waits for too few lines at a time.
_AHEAD = 3072

# Of 16 bits a number there is more to compute a line. Intel's cores read such rows at half the rate if they are not
# asked for ahead, AMD's lose by it.
_NARROW_AHEAD = not AMD

# Likewise of an int8 row.
_AHEAD_INT8 = 3072


@inline
def _one(row, form, item, columns, x):  # type: ignore[no-untyped-def]
    """row . x, with two sums under way."""
    even, odd = broadcast(0.0), broadcast(0.0)
    k = 0
    while k + 2 * WIDTH <= columns:
        if item == 4 or _NARROW_AHEAD:
            prefetch_second(row + k * item + _AHEAD)
            if 2 * WIDTH * item > _CACHE_LINE:
                prefetch_second(row + k * item + _AHEAD + _CACHE_LINE)
        even = fma(load_format(row + k * item, form), load(x + 4 * k), even)
        odd = fma(load_format(row + (k + WIDTH) * item, form), load(x + 4 * k + VECTOR_BYTES), odd)
        k += 2 * WIDTH
    if k + WIDTH <= columns:
        even = fma(load_format(row + k * item, form), load(x + 4 * k), even)
        k += WIDTH
    if k < columns:
        odd = fma(load_part(row + k * item, form, columns - k), load_part(x + 4 * k, FLOAT32, columns - k), odd)
    return total(even + odd)


@inline
def _four(row, form, item, columns, x, stride, following):  # type: ignore[no-untyped-def]
    """As `_one` for the four vectors at x, x + stride, ...; fetches the row at `following` on the way."""
    x1, x2, x3 = x + stride, x + 2 * stride, x + 3 * stride
    even0, even1, even2, even3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
    odd0, odd1, odd2, odd3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
    k = 0
    while k + 2 * WIDTH <= columns:
        prefetch(following + k * item)
        if 2 * WIDTH * item > _CACHE_LINE:
            prefetch(following + k * item + _CACHE_LINE)
        w, at = load_format(row + k * item, form), 4 * k
        even0, even1 = fma(w, load(x + at), even0), fma(w, load(x1 + at), even1)
        even2, even3 = fma(w, load(x2 + at), even2), fma(w, load(x3 + at), even3)
        w, at = load_format(row + (k + WIDTH) * item, form), 4 * k + VECTOR_BYTES
        odd0, odd1 = fma(w, load(x + at), odd0), fma(w, load(x1 + at), odd1)
        odd2, odd3 = fma(w, load(x2 + at), odd2), fma(w, load(x3 + at), odd3)
        k += 2 * WIDTH
    if k + WIDTH <= columns:
        w, at = load_format(row + k * item, form), 4 * k
        even0, even1 = fma(w, load(x + at), even0), fma(w, load(x1 + at), even1)
        even2, even3 = fma(w, load(x2 + at), even2), fma(w, load(x3 + at), even3)
        k += WIDTH
    if k < columns:
        left = columns - k
        w, at = load_part(row + k * item, form, left), 4 * k
        odd0 = fma(w, load_part(x + at, FLOAT32, left), odd0)
        odd1 = fma(w, load_part(x1 + at, FLOAT32, left), odd1)
        odd2 = fma(w, load_part(x2 + at, FLOAT32, left), odd2)
        odd3 = fma(w, load_part(x3 + at, FLOAT32, left), odd3)
    return total(even0 + odd0), total(even1 + odd1), total(even2 + odd2), total(even3 + odd3)


@inline
def _rows(form, item, matrix, span, first, last, columns, bias, x, x_stride, batch, out, out_stride):  # type: ignore[no-untyped-def]
    # With several vectors a core computes longer than it reads, and has to ask for the next row early.
    step = span if item == 2 or batch > 4 else 0
    for r in range(first, last):
        row = matrix + r * span
        offset = load_scalar(bias + 4 * r) if bias != 0 else 0.0
        to = out + 4 * (r - first)
        b = 0
        while b + 4 <= batch:
            y0, y1, y2, y3 = _four(row, form, item, columns, x + b * x_stride, x_stride, row + step)
            store_scalar(y0 + offset, to + b * out_stride)
            store_scalar(y1 + offset, to + (b + 1) * out_stride)
            store_scalar(y2 + offset, to + (b + 2) * out_stride)
            store_scalar(y3 + offset, to + (b + 3) * out_stride)
            b += 4
        while b < batch:
            store_scalar(_one(row, form, item, columns, x + b * x_stride) + offset, to + b * out_stride)
            b += 1


@inline
def _one_int8(row, scales, columns, x):  # type: ignore[no-untyped-def]
    """As `_one` for a row of int8: the sum over a group of columns, times its scale, and so on."""
    y = broadcast(0.0)
    k = 0
    while k + GROUP <= columns:
        prefetch_second(row + k + _AHEAD_INT8)
        prefetch_second(row + k + _AHEAD_INT8 + _CACHE_LINE)
        even, odd = broadcast(0.0), broadcast(0.0)
        for j in range(k, k + GROUP, 2 * WIDTH):
            even = fma(load_int8(row + j), load(x + 4 * j), even)
            odd = fma(load_int8(row + j + WIDTH), load(x + 4 * j + VECTOR_BYTES), odd)
        y = fma(even + odd, load_scalar(scales), y)
        k += GROUP
        scales += 4
    if k < columns:
        even = broadcast(0.0)
        for j in range(k, columns, WIDTH):
            lanes = min(WIDTH, columns - j)
            even = fma(load_int8_part(row + j, lanes), load_part(x + 4 * j, FLOAT32, lanes), even)
        y = fma(even, load_scalar(scales), y)
    return total(y)


@inline
def _four_int8(row, scales, columns, x, stride):  # type: ignore[no-untyped-def]
    """As `_one_int8` for the four vectors at x, x + stride, ..., each sum in the same order."""
    x1, x2, x3 = x + stride, x + 2 * stride, x + 3 * stride
    y0, y1, y2, y3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
    k = 0
    while k + GROUP <= columns:
        prefetch_second(row + k + _AHEAD_INT8)
        prefetch_second(row + k + _AHEAD_INT8 + _CACHE_LINE)
        even0, even1, even2, even3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
        odd0, odd1, odd2, odd3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
        for j in range(k, k + GROUP, 2 * WIDTH):
            w, at = load_int8(row + j), 4 * j
            even0, even1 = fma(w, load(x + at), even0), fma(w, load(x1 + at), even1)
            even2, even3 = fma(w, load(x2 + at), even2), fma(w, load(x3 + at), even3)
            w, at = load_int8(row + j + WIDTH), 4 * j + VECTOR_BYTES
            odd0, odd1 = fma(w, load(x + at), odd0), fma(w, load(x1 + at), odd1)
            odd2, odd3 = fma(w, load(x2 + at), odd2), fma(w, load(x3 + at), odd3)
        scale = load_scalar(scales)
        y0, y1 = fma(even0 + odd0, scale, y0), fma(even1 + odd1, scale, y1)
        y2, y3 = fma(even2 + odd2, scale, y2), fma(even3 + odd3, scale, y3)
        k += GROUP
        scales += 4
    if k < columns:
        even0, even1, even2, even3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
        for j in range(k, columns, WIDTH):
            lanes = min(WIDTH, columns - j)
            w, at = load_int8_part(row + j, lanes), 4 * j
            even0 = fma(w, load_part(x + at, FLOAT32, lanes), even0)
            even1 = fma(w, load_part(x1 + at, FLOAT32, lanes), even1)
            even2 = fma(w, load_part(x2 + at, FLOAT32, lanes), even2)
            even3 = fma(w, load_part(x3 + at, FLOAT32, lanes), even3)
        scale = load_scalar(scales)
        y0, y1, y2, y3 = fma(even0, scale, y0), fma(even1, scale, y1), fma(even2, scale, y2), fma(even3, scale, y3)
    return total(y0), total(y1), total(y2), total(y3)


@inline
def _rows_int8(matrix, span, scales, first, last, columns, bias, x, x_stride, batch, out, out_stride):  # type: ignore[no-untyped-def]
    for r in range(first, last):
        row, scale = matrix + r * span, scales + 4 * r * ((columns + GROUP - 1) // GROUP)
        offset = load_scalar(bias + 4 * r) if bias != 0 else 0.0
        to = out + 4 * (r - first)
        b = 0
        while b + 4 <= batch:
            y0, y1, y2, y3 = _four_int8(row, scale, columns, x + b * x_stride, x_stride)
            store_scalar(y0 + offset, to + b * out_stride)
            store_scalar(y1 + offset, to + (b + 1) * out_stride)
            store_scalar(y2 + offset, to + (b + 2) * out_stride)
            store_scalar(y3 + offset, to + (b + 3) * out_stride)
            b += 4
        while b < batch:
            store_scalar(_one_int8(row, scale, columns, x + b * x_stride) + offset, to + b * out_stride)
            b += 1


@kernel
def product(form, matrix, span, scales, first, last, columns, bias, x, x_stride, batch, out, out_stride):  # type: ignore[no-untyped-def]
    """Rows [first, last) of a matrix (rows, columns) times each of `batch` float32 vectors, plus a bias.

    Addresses, strides and `span`, from one row to the next, are in bytes; a bias of 0 is none; `scales` are read for
    INT8 only. The result of row `first` goes to `out`.
    """
    # The format is a constant in each of the loops.
    if form == FLOAT32:
        _rows(FLOAT32, 4, matrix, span, first, last, columns, bias, x, x_stride, batch, out, out_stride)
    elif form == BFLOAT16:
        _rows(BFLOAT16, 2, matrix, span, first, last, columns, bias, x, x_stride, batch, out, out_stride)
    elif form == INT8:
        _rows_int8(matrix, span, scales, first, last, columns, bias, x, x_stride, batch, out, out_stride)
    elif HAS_FLOAT16:
        _rows(FLOAT16, 2, matrix, span, first, last, columns, bias, x, x_stride, batch, out, out_stride)
