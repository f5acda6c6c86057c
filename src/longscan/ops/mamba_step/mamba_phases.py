"""The phases of a Mamba layer, each of which needs the whole of the one before.

    project   norm of the stream; in_proj of a block of channels, both halves; their convolution and gate
    select    rows of x_proj: dt of low rank, B and C, of each head
    advance   for a block of channels: step sizes, states, output, gate
    contract  rows of out_proj

The matrices of several heads lie one behind the other, and the channels of a head side by side.
"""

from __future__ import annotations

from longscan.ops.int8 import GROUP
from longscan.ops.jit import inline, kernel
from longscan.ops.mamba_step.layout import (
    BATCH,
    CHANNEL_UNIT,
    D_CONV,
    D_INNER,
    D_MODEL,
    D_STATE,
    DELTA,
    DONE,
    DT_RANK,
    GATE,
    HEADS,
    HIDDEN,
    MIXED,
    OWN_HEADER,
    ROW_UNIT,
    Field,
    X,
    Y,
)
from longscan.ops.mamba_step.phases import block, item, normalise, scale
from longscan.ops.mamba_step.products import product
from longscan.ops.mamba_step.tasks import fetch, wait_until
from longscan.ops.simd import WIDTH, broadcast, fma, total
from longscan.ops.simd_math import exp2_product, silu, softplus
from longscan.ops.simd_memory import FLOAT32, load_scalar, read, store_scalar, write

NORM, IN_PROJ, IN_PROJ_KIND, IN_PROJ_SCALES, IN_PROJ_BIAS, PAIRED, CONV, CONV_BIAS = map(int, list(Field)[1:9])
X_PROJ, X_PROJ_KIND, X_PROJ_SCALES, SELECTION_NORM = map(int, list(Field)[9:13])
DT_PROJ, DT_PROJ_KIND, DT_PROJ_SCALES, DT_BIAS = map(int, list(Field)[13:17])
A_, D_, OUT_PROJ, OUT_PROJ_KIND, OUT_PROJ_SCALES, OUT_PROJ_BIAS = map(int, list(Field)[17:])


@kernel
def project(a, w, conv_state, form, ssm_state, eps, layer, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    d_model, d_inner = a[D_MODEL], a[D_INNER]
    first, last = block(task, tasks, d_inner, CHANNEL_UNIT)
    row = d_model * item(w[IN_PROJ_KIND])
    # From a channel's row to the next one's, and to its gate's.
    step, gate = (2 * row, row) if w[PAIRED] != 0 else (row, d_inner * row)
    wait_until(a[DONE], begun, w[IN_PROJ] + first * step, w[IN_PROJ] + last * step)
    normed = normalise(a, eps, w[NORM], layer, task == 0, own)
    _fetch_small(a, w, conv_state, form, ssm_state, first, last)
    for half in range(2):
        scales = w[IN_PROJ_SCALES] + 4 * half * d_inner * ((d_model + GROUP - 1) // GROUP)
        bias = w[IN_PROJ_BIAS] + 4 * half * d_inner if w[IN_PROJ_BIAS] != 0 else 0
        product(
            w[IN_PROJ_KIND], w[IN_PROJ] + half * gate, step, scales, first, last, d_model, bias,
            normed, 4 * d_model, a[BATCH], a[X + half] + 4 * first, 4 * d_inner,
        )  # fmt: skip
    _convolve(a, w, conv_state, form, first, last)


@inline
def _fetch_small(a, w, conv_state, form, ssm_state, first, last):  # type: ignore[no-untyped-def]
    """Asks for what the convolution and the scan of a block of channels will read: short pieces, each a late start."""
    d_inner, d_state, size, before = a[D_INNER], a[D_STATE], item(form), a[D_CONV] - 1
    for k in range(a[D_CONV]):
        fetch(w[CONV] + 4 * (k * d_inner + first), w[CONV] + 4 * (k * d_inner + last))
    fetch(w[A_] + 4 * first * d_state, w[A_] + 4 * last * d_state)
    for b in range(a[BATCH]):
        for k in range(before):
            row = conv_state + (b * before + k) * d_inner * size
            fetch(row + first * size, row + last * size)
        row = ssm_state + 4 * b * d_inner * d_state
        fetch(row + 4 * first * d_state, row + 4 * last * d_state)


@kernel
def _convolve(a, w, conv_state, form, first, last):  # type: ignore[no-untyped-def]
    """x to silu(conv(x)) and z to silu(z), in place, for a block of channels; the state takes x in."""
    d_inner, size, before = a[D_INNER], item(form), a[D_CONV] - 1
    for b in range(a[BATCH]):
        for c in range(first, last, WIDTH):
            lanes = min(WIDTH, last - c)
            x_at, gate_at = a[X] + 4 * (b * d_inner + c), a[GATE] + 4 * (b * d_inner + c)
            state = conv_state + (b * before * d_inner + c) * size
            x = read(x_at, FLOAT32, lanes)
            y = x * read(w[CONV] + 4 * (before * d_inner + c), FLOAT32, lanes)
            for k in range(before):
                tap = read(w[CONV] + 4 * (k * d_inner + c), FLOAT32, lanes)
                y = fma(tap, read(state + k * d_inner * size, form, lanes), y)
                if k > 0:
                    # Copied in its own format: no rounding.
                    past = read(state + k * d_inner * size, form, lanes)
                    write(past, state + (k - 1) * d_inner * size, form, lanes)
            if before > 0:
                write(x, state + (before - 1) * d_inner * size, form, lanes)
            if w[CONV_BIAS] != 0:
                y = y + read(w[CONV_BIAS] + 4 * c, FLOAT32, lanes)
            write(silu(y), x_at, FLOAT32, lanes)
            write(silu(read(gate_at, FLOAT32, lanes)), gate_at, FLOAT32, lanes)


@kernel
def select(a, w, begun, task, tasks):  # type: ignore[no-untyped-def]
    d_inner, heads, mixed = a[D_INNER], a[HEADS], a[DT_RANK] + 2 * a[D_STATE]
    width = d_inner // heads
    first, last = block(task, tasks, heads * mixed, ROW_UNIT)
    row = width * item(w[X_PROJ_KIND])
    wait_until(a[DONE], begun, w[X_PROJ] + first * row, w[X_PROJ] + last * row)
    for head in range(first // mixed, (last - 1) // mixed + 1):
        low, high = max(first, head * mixed), min(last, (head + 1) * mixed)
        product(
            w[X_PROJ_KIND], w[X_PROJ], row, w[X_PROJ_SCALES], low, high, width, 0,
            a[X] + 4 * head * width, 4 * d_inner, a[BATCH], a[MIXED] + 4 * low, 4 * heads * mixed,
        )  # fmt: skip


@kernel
def advance(a, w, ssm_state, eps, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    d_inner, heads, d_state, dt_rank = a[D_INNER], a[HEADS], a[D_STATE], a[DT_RANK]
    width, mixed = d_inner // heads, 4 * (dt_rank + 2 * d_state)
    first, last = block(task, tasks, d_inner, CHANNEL_UNIT)
    row = dt_rank * item(w[DT_PROJ_KIND])
    wait_until(a[DONE], begun, w[DT_PROJ] + first * row, w[DT_PROJ] + last * row)
    selected = a[MIXED]
    if w[SELECTION_NORM] != 0:
        selected = own + OWN_HEADER + 4 * a[BATCH] * a[D_MODEL]
        for at in range(0, a[BATCH] * heads * mixed, mixed):
            part = 0
            for size in (dt_rank, d_state, d_state):
                scale(a[MIXED] + at + part, size, eps, w[SELECTION_NORM] + part, selected + at + part)
                part += 4 * size
    for head in range(first // width, (last - 1) // width + 1):
        low, high = max(first, head * width), min(last, (head + 1) * width)
        _advance_head(a, w, ssm_state, low, high, selected + head * mixed, heads * mixed)


@kernel
def _advance_head(a, w, ssm_state, first, last, selected, stride):  # type: ignore[no-untyped-def]
    """A block of channels of one head, whose dt, B and C are at `selected`; `stride` to the next of the batch."""
    d_inner, d_state, dt_rank = a[D_INNER], a[D_STATE], a[DT_RANK]
    product(
        w[DT_PROJ_KIND], w[DT_PROJ], dt_rank * item(w[DT_PROJ_KIND]), w[DT_PROJ_SCALES], first, last, dt_rank,
        w[DT_BIAS], selected, stride, a[BATCH], a[DELTA] + 4 * first, 4 * d_inner,
    )  # fmt: skip
    for b in range(a[BATCH]):
        B = selected + b * stride + 4 * dt_rank
        C = B + 4 * d_state
        for v in range(first, last, WIDTH):
            lanes, at = min(WIDTH, last - v), 4 * (b * d_inner + v)
            x = read(a[X] + at, FLOAT32, lanes)
            delta = softplus(read(a[DELTA] + at, FLOAT32, lanes))
            write(delta, a[DELTA] + at, FLOAT32, lanes)
            write(delta * x, a[Y] + at, FLOAT32, lanes)
            for i in range(lanes):
                step, drive = load_scalar(a[DELTA] + at + 4 * i), load_scalar(a[Y] + at + 4 * i)
                rates = w[A_] + 4 * (v + i) * d_state
                state = ssm_state + 4 * (b * d_inner + v + i) * d_state
                y = broadcast(0.0)
                for n in range(0, d_state, WIDTH):
                    count = min(WIDTH, d_state - n)
                    decay = exp2_product(read(rates + 4 * n, FLOAT32, count), step)
                    h = fma(decay, read(state + 4 * n, FLOAT32, count), drive * read(B + 4 * n, FLOAT32, count))
                    write(h, state + 4 * n, FLOAT32, count)
                    y = fma(h, read(C + 4 * n, FLOAT32, count), y)
                store_scalar(total(y), a[Y] + at + 4 * i)
            y = read(a[Y] + at, FLOAT32, lanes)
            if w[D_] != 0:
                y = fma(read(w[D_] + 4 * v, FLOAT32, lanes), x, y)
            write(y * read(a[GATE] + at, FLOAT32, lanes), a[Y] + at, FLOAT32, lanes)


@kernel
def contract(a, w, begun, task, tasks):  # type: ignore[no-untyped-def]
    d_inner, d_model = a[D_INNER], a[D_MODEL]
    first, last = block(task, tasks, d_model, ROW_UNIT)
    row = d_inner * item(w[OUT_PROJ_KIND])
    wait_until(a[DONE], begun, w[OUT_PROJ] + first * row, w[OUT_PROJ] + last * row)
    product(
        w[OUT_PROJ_KIND], w[OUT_PROJ], row, w[OUT_PROJ_SCALES], first, last, d_inner, w[OUT_PROJ_BIAS],
        a[Y], 4 * d_inner, a[BATCH], a[HIDDEN] + 4 * first, 4 * d_model,
    )  # fmt: skip
