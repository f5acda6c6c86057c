"""The compiled step: all layers and the head in one parallel region, as one list of tasks.

A layer is four phases, each of which needs the whole of the one before:

    in    norm of the stream; in_proj of a block of channels, both halves; their convolution and gate
    mix   rows of x_proj: dt of low rank, B and C
    scan  for a block of channels: step sizes, states, output, gate
    out   rows of out_proj

and after the last layer the head is one more. `tasks` says how threads share the list. A thread that has to wait
fetches the weights of its next task meanwhile, so that memory never rests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from longscan.ops.jit import c_function, inline, kernel, parallel_kernel, prange
from longscan.ops.mamba_step.products import INT8, product
from longscan.ops.mamba_step.tasks import call_at, fetch, fetch_add, int64_pointer, wait_until
from longscan.ops.mamba_step.weights import Field
from longscan.ops.simd import WIDTH, broadcast, fma, total
from longscan.ops.simd_math import exp2_product, silu, softplus
from longscan.ops.simd_memory import FLOAT32, load_scalar, read, store_scalar, write

# What a call hands over, int64: sizes, then addresses (0: absent).
D_MODEL, D_INNER, D_STATE, DT_RANK, D_CONV, VOCABULARY, BATCH, LAYERS = range(8)
HIDDEN, STREAMS, X, GATE, MIXED, DELTA, Y, NORMED, CLAIMED, DONE = range(8, 18)
LOGITS, HEAD, HEAD_KIND, HEAD_SCALES, HEAD_BIAS, FINAL_NORM = range(18, 24)
IN_TASKS, MIX_TASKS, SCAN_TASKS, OUT_TASKS, HEAD_TASKS = range(24, 29)
ARGUMENTS = 29

NORM, IN_PROJ, IN_PROJ_KIND, IN_PROJ_SCALES, IN_PROJ_BIAS, CONV, CONV_BIAS = map(int, list(Field)[:7])
X_PROJ, X_PROJ_KIND, X_PROJ_SCALES, DT_PROJ, DT_PROJ_KIND, DT_PROJ_SCALES, DT_BIAS = map(int, list(Field)[7:14])
A_, D_, OUT_PROJ, OUT_PROJ_KIND, OUT_PROJ_SCALES, OUT_PROJ_BIAS = map(int, list(Field)[14:])

FIELDS = len(Field)

# Blocks are multiples of so many channels (the widest vector) or rows.
CHANNEL_UNIT, ROW_UNIT = 16, 4


@inline
def _item(form):  # type: ignore[no-untyped-def]
    return 4 if form == FLOAT32 else 1 if form == INT8 else 2


@inline
def _block(task, tasks, size, unit):  # type: ignore[no-untyped-def]
    """A task's share [first, last) of `size` rows or channels, in whole units."""
    units = (size + unit - 1) // unit
    return min(size, task * units // tasks * unit), min(size, (task + 1) * units // tasks * unit)


@kernel
def _normalise(a, eps, weight, layer, keep, normed):  # type: ignore[no-untyped-def]
    """The norm of stream + hidden to `normed`; with `keep`, the sum becomes the next stream.

    There are two streams, read and written in turn, because every thread takes the norm for itself.
    """
    d_model, batch = a[D_MODEL], a[BATCH]
    span = 4 * d_model
    before = a[STREAMS] + layer % 2 * batch * span
    after = a[STREAMS] + (layer + 1) % 2 * batch * span
    for b in range(batch):
        squares = broadcast(0.0)
        for c in range(0, d_model, WIDTH):
            lanes, at = min(WIDTH, d_model - c), b * span + 4 * c
            value = read(before + at, FLOAT32, lanes) + read(a[HIDDEN] + at, FLOAT32, lanes)
            squares = fma(value, value, squares)
            write(value, normed + at, FLOAT32, lanes)
            if keep:
                write(value, after + at, FLOAT32, lanes)
        rstd = np.float32(1.0) / np.sqrt(total(squares) / np.float32(d_model) + eps)
        for c in range(0, d_model, WIDTH):
            lanes, at = min(WIDTH, d_model - c), b * span + 4 * c
            value = read(normed + at, FLOAT32, lanes) * rstd * read(weight + 4 * c, FLOAT32, lanes)
            write(value, normed + at, FLOAT32, lanes)


@inline
def _fetch_small(a, w, conv_state, form, ssm_state, first, last):  # type: ignore[no-untyped-def]
    """Asks for what the convolution and the scan of a block of channels will read: short pieces, each a late start."""
    d_inner, d_state, item, before = a[D_INNER], a[D_STATE], _item(form), a[D_CONV] - 1
    for k in range(a[D_CONV]):
        fetch(w[CONV] + 4 * (k * d_inner + first), w[CONV] + 4 * (k * d_inner + last))
    fetch(w[A_] + 4 * first * d_state, w[A_] + 4 * last * d_state)
    for b in range(a[BATCH]):
        for k in range(before):
            row = conv_state + (b * before + k) * d_inner * item
            fetch(row + first * item, row + last * item)
        row = ssm_state + 4 * b * d_inner * d_state
        fetch(row + 4 * first * d_state, row + 4 * last * d_state)


@kernel
def _convolve(a, w, conv_state, form, first, last):  # type: ignore[no-untyped-def]
    """x to silu(conv(x)) and z to silu(z), in place, for a block of channels; the state takes x in."""
    d_inner, item, before = a[D_INNER], _item(form), a[D_CONV] - 1
    for b in range(a[BATCH]):
        for c in range(first, last, WIDTH):
            lanes = min(WIDTH, last - c)
            x_at, gate_at = a[X] + 4 * (b * d_inner + c), a[GATE] + 4 * (b * d_inner + c)
            state = conv_state + (b * before * d_inner + c) * item
            x = read(x_at, FLOAT32, lanes)
            y = x * read(w[CONV] + 4 * (before * d_inner + c), FLOAT32, lanes)
            for k in range(before):
                tap = read(w[CONV] + 4 * (k * d_inner + c), FLOAT32, lanes)
                y = fma(tap, read(state + k * d_inner * item, form, lanes), y)
                if k > 0:
                    # Copied in its own format: no rounding.
                    past = read(state + k * d_inner * item, form, lanes)
                    write(past, state + (k - 1) * d_inner * item, form, lanes)
            if before > 0:
                write(x, state + (before - 1) * d_inner * item, form, lanes)
            if w[CONV_BIAS] != 0:
                y = y + read(w[CONV_BIAS] + 4 * c, FLOAT32, lanes)
            write(silu(y), x_at, FLOAT32, lanes)
            write(silu(read(gate_at, FLOAT32, lanes)), gate_at, FLOAT32, lanes)


@kernel
def _advance(a, w, ssm_state, first, last):  # type: ignore[no-untyped-def]
    """Step sizes, states and gated outputs of a block of channels."""
    d_inner, d_state, dt_rank = a[D_INNER], a[D_STATE], a[DT_RANK]
    mixed_stride = 4 * (dt_rank + 2 * d_state)
    product(
        w[DT_PROJ_KIND], w[DT_PROJ], w[DT_PROJ_SCALES], first, last, dt_rank, w[DT_BIAS],
        a[MIXED], mixed_stride, a[BATCH], a[DELTA] + 4 * first, 4 * d_inner,
    )  # fmt: skip
    for b in range(a[BATCH]):
        B = a[MIXED] + b * mixed_stride + 4 * dt_rank
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


def _one_thread(thread, arguments, weights, state_addresses, epsilons):  # type: ignore[no-untyped-def]
    """What one thread does: it claims tasks until there are none. Takes addresses of the arrays."""
    a = carray(int64_pointer(arguments), ARGUMENTS)
    table = carray(int64_pointer(weights), (a[LAYERS], FIELDS))
    states = carray(int64_pointer(state_addresses), (a[LAYERS], 3))
    d_model, d_inner, batch, layers = a[D_MODEL], a[D_INNER], a[BATCH], a[LAYERS]
    mixed = a[DT_RANK] + 2 * a[D_STATE]
    normed = a[NORMED] + thread * 4 * batch * d_model
    mix = a[IN_TASKS]
    scan = mix + a[MIX_TASKS]
    out = scan + a[SCAN_TASKS]
    layer_tasks = out + a[OUT_TASKS]
    every = layers * layer_tasks + a[HEAD_TASKS]
    prepared = -1
    while True:
        claim = fetch_add(a[CLAIMED], 1)
        if claim >= every:
            break
        layer = min(layers, claim // layer_tasks)
        begun = layer * layer_tasks
        task = claim - begun
        if layer == layers:
            first, last = _block(task, a[HEAD_TASKS], a[VOCABULARY], ROW_UNIT)
            row = d_model * _item(a[HEAD_KIND])
            wait_until(a[DONE], begun, a[HEAD] + first * row, a[HEAD] + last * row)
            if prepared != layer:
                _normalise(a, load_scalar(epsilons + 4 * layer), a[FINAL_NORM], layer, False, normed)
                prepared = layer
            product(
                a[HEAD_KIND], a[HEAD], a[HEAD_SCALES], first, last, d_model, a[HEAD_BIAS],
                normed, 4 * d_model, batch, a[LOGITS] + 4 * first, 4 * a[VOCABULARY],
            )  # fmt: skip
        elif task < mix:
            w = table[layer]
            first, last = _block(task, a[IN_TASKS], d_inner, CHANNEL_UNIT)
            row = d_model * _item(w[IN_PROJ_KIND])
            wait_until(a[DONE], begun, w[IN_PROJ] + first * row, w[IN_PROJ] + last * row)
            if prepared != layer:
                _normalise(a, load_scalar(epsilons + 4 * layer), w[NORM], layer, task == 0, normed)
                prepared = layer
            _fetch_small(a, w, states[layer, 0], states[layer, 1], states[layer, 2], first, last)
            for half in range(2):
                product(
                    w[IN_PROJ_KIND], w[IN_PROJ], w[IN_PROJ_SCALES], half * d_inner + first, half * d_inner + last,
                    d_model, w[IN_PROJ_BIAS], normed, 4 * d_model, batch, a[X + half] + 4 * first, 4 * d_inner,
                )  # fmt: skip
            _convolve(a, w, states[layer, 0], states[layer, 1], first, last)
        elif task < scan:
            w = table[layer]
            first, last = _block(task - mix, a[MIX_TASKS], mixed, ROW_UNIT)
            row = d_inner * _item(w[X_PROJ_KIND])
            wait_until(a[DONE], begun + mix, w[X_PROJ] + first * row, w[X_PROJ] + last * row)
            product(
                w[X_PROJ_KIND], w[X_PROJ], w[X_PROJ_SCALES], first, last, d_inner, 0,
                a[X], 4 * d_inner, batch, a[MIXED] + 4 * first, 4 * mixed,
            )  # fmt: skip
        elif task < out:
            w = table[layer]
            first, last = _block(task - scan, a[SCAN_TASKS], d_inner, CHANNEL_UNIT)
            row = a[DT_RANK] * _item(w[DT_PROJ_KIND])
            wait_until(a[DONE], begun + scan, w[DT_PROJ] + first * row, w[DT_PROJ] + last * row)
            _advance(a, w, states[layer, 2], first, last)
        else:
            w = table[layer]
            first, last = _block(task - out, a[OUT_TASKS], d_model, ROW_UNIT)
            row = d_inner * _item(w[OUT_PROJ_KIND])
            wait_until(a[DONE], begun + out, w[OUT_PROJ] + first * row, w[OUT_PROJ] + last * row)
            product(
                w[OUT_PROJ_KIND], w[OUT_PROJ], w[OUT_PROJ_SCALES], first, last, d_inner, w[OUT_PROJ_BIAS],
                a[Y], 4 * d_inner, batch, a[HIDDEN] + 4 * first, 4 * d_model,
            )  # fmt: skip
        fetch_add(a[DONE], 1)


@cache
def one_thread() -> Any:
    """The compiled `_one_thread`."""
    return c_function(_one_thread, 5)


@parallel_kernel
def every_thread(threads, function, a, table, states, eps):  # type: ignore[no-untyped-def]
    """Runs the C function at address `function` in each of so many threads."""
    for thread in prange(threads):
        call_at(function, thread, a, table, states, eps)
