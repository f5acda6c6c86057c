"""The phases of a gated MLP, and of a mixture of them.

expand    norm of the stream; for a block of the MLP's width: gate, up, and their product
reduce    rows of the last projection

route     norm of the stream; rows of the router
consult   as `expand`, for each sequence and each of its chosen experts, by its weight
gather    as `reduce`, the sum over the chosen experts
"""

from __future__ import annotations

import numpy as np

from longscan.ops.jit import inline, kernel
from longscan.ops.mamba_step.layout import (
    BATCH,
    CHANNEL_UNIT,
    D_MODEL,
    DONE,
    GATE,
    HIDDEN,
    MIXED,
    ROW_UNIT,
    MlpField,
    X,
    Y,
)
from longscan.ops.mamba_step.phases import block, item, normalise
from longscan.ops.mamba_step.products import product
from longscan.ops.mamba_step.tasks import wait_until
from longscan.ops.simd import WIDTH, broadcast
from longscan.ops.simd_math import silu
from longscan.ops.simd_memory import FLOAT32, load_scalar, read, write

NORM, GATE_PROJ, GATE_KIND, GATE_SCALES, UP, UP_KIND, UP_SCALES = map(int, list(MlpField)[1:8])
DOWN, DOWN_KIND, DOWN_SCALES, ROUTER, ROUTER_KIND, INTERMEDIATE, NUMBER, CHOSEN = map(int, list(MlpField)[8:])


@kernel
def expand(a, w, eps, layer, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    d_model, size = a[D_MODEL], w[INTERMEDIATE]
    first, last = block(task, tasks, size, CHANNEL_UNIT)
    row = d_model * item(w[GATE_KIND])
    wait_until(a[DONE], begun, w[GATE_PROJ] + first * row, w[GATE_PROJ] + last * row)
    normed = normalise(a, eps, w[NORM], layer, task == 0, own)
    _gated(a, w, 0, first, last, normed, a[BATCH], 0, np.float32(1.0))


@inline
def _gated(a, w, expert, first, last, normed, batch, place, weight):  # type: ignore[no-untyped-def]
    """A block of an expert's width, for `batch` vectors, to those of Y from number `place` on."""
    d_model, size = a[D_MODEL], w[INTERMEDIATE]
    row = d_model * item(w[GATE_KIND])
    # An expert's rows: those of its gate, then those of its up.
    skipped = 2 * expert * size * row
    at = 4 * (place * size + first)
    product(
        w[GATE_KIND], w[GATE_PROJ] + skipped, row, w[GATE_SCALES], first, last, d_model, 0,
        normed, 4 * d_model, batch, a[GATE] + at, 4 * size,
    )  # fmt: skip
    product(
        w[UP_KIND], w[UP] + skipped, row, w[UP_SCALES], first, last, d_model, 0,
        normed, 4 * d_model, batch, a[X] + at, 4 * size,
    )  # fmt: skip
    by = broadcast(weight)
    for b in range(batch):
        for c in range(0, last - first, WIDTH):
            lanes, to = min(WIDTH, last - first - c), at + 4 * (b * size + c)
            value = silu(read(a[GATE] + to, FLOAT32, lanes)) * read(a[X] + to, FLOAT32, lanes)
            write(value * by, a[Y] + to, FLOAT32, lanes)


@kernel
def reduce(a, w, begun, task, tasks):  # type: ignore[no-untyped-def]
    d_model, size = a[D_MODEL], w[INTERMEDIATE]
    first, last = block(task, tasks, d_model, ROW_UNIT)
    row = size * item(w[DOWN_KIND])
    wait_until(a[DONE], begun, w[DOWN] + first * row, w[DOWN] + last * row)
    product(
        w[DOWN_KIND], w[DOWN], row, w[DOWN_SCALES], first, last, size, 0,
        a[Y], 4 * size, a[BATCH], a[HIDDEN] + 4 * first, 4 * d_model,
    )  # fmt: skip


@kernel
def route(a, w, eps, layer, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    d_model = a[D_MODEL]
    first, last = block(task, tasks, w[NUMBER], ROW_UNIT)
    row = d_model * item(w[ROUTER_KIND])
    wait_until(a[DONE], begun, w[ROUTER] + first * row, w[ROUTER] + last * row)
    normed = normalise(a, eps, w[NORM], layer, task == 0, own)
    product(
        w[ROUTER_KIND], w[ROUTER], row, 0, first, last, d_model, 0,
        normed, 4 * d_model, a[BATCH], a[MIXED] + 4 * first, 4 * w[NUMBER],
    )  # fmt: skip


@inline
def _likeliest_after(scores, number, score, expert):  # type: ignore[no-untyped-def]
    """The expert that follows one of this score in order of scores; equal ones follow by number.

    Where there is none, scores being no numbers, it is the first.
    """
    best = 0
    found = False
    for e in range(number):
        candidate = load_scalar(scores + 4 * e)
        follows = candidate < score or (candidate == score and e > expert)
        if follows and (not found or candidate > load_scalar(scores + 4 * best)):
            best, found = e, True
    return best


@inline
def _partition(scores, number, highest):  # type: ignore[no-untyped-def]
    """The denominator of the softmax over the scores, of which the highest is known."""
    sum = np.float32(0.0)
    for e in range(number):
        sum += np.exp(load_scalar(scores + 4 * e) - highest)
    return sum


@kernel
def consult(a, w, eps, layer, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    number, chosen = w[NUMBER], w[CHOSEN]
    first, last = block(task, tasks, w[INTERMEDIATE], CHANNEL_UNIT)
    # Which rows will be read is not known before.
    wait_until(a[DONE], begun, 0, 0)
    normed = normalise(a, eps, w[NORM], layer, False, own)
    for b in range(a[BATCH]):
        scores = a[MIXED] + 4 * b * number
        expert = _likeliest_after(scores, number, np.float32(np.inf), -1)
        score = highest = load_scalar(scores + 4 * expert)
        whole = _partition(scores, number, highest)
        for k in range(chosen):
            weight = np.float32(np.exp(score - highest) / whole)
            _gated(a, w, expert, first, last, normed + 4 * b * a[D_MODEL], 1, b * chosen + k, weight)
            expert = _likeliest_after(scores, number, score, expert)
            score = load_scalar(scores + 4 * expert)


@kernel
def gather(a, w, begun, task, tasks):  # type: ignore[no-untyped-def]
    d_model, size, number, chosen = a[D_MODEL], w[INTERMEDIATE], w[NUMBER], w[CHOSEN]
    first, last = block(task, tasks, d_model, ROW_UNIT)
    row = size * item(w[DOWN_KIND])
    wait_until(a[DONE], begun, 0, 0)
    for b in range(a[BATCH]):
        scores, hidden = a[MIXED] + 4 * b * number, a[HIDDEN] + 4 * b * d_model
        expert, score = -1, np.float32(np.inf)
        for k in range(chosen):
            expert = _likeliest_after(scores, number, score, expert)
            score = load_scalar(scores + 4 * expert)
            # What the experts before gave is to this product what a bias is.
            product(
                w[DOWN_KIND], w[DOWN] + expert * d_model * row, row, 0, first, last, size, hidden if k > 0 else 0,
                a[Y] + 4 * (b * chosen + k) * size, 0, 1, hidden + 4 * first, 0,
            )  # fmt: skip
