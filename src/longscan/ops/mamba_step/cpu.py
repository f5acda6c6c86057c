"""The compiled step: all layers and the head in one parallel region, as one list of tasks.

A layer is a few phases (`mamba_phases`, `mlp_phases`), each of which needs the whole of the one before, and after the
last layer the head is one more. `tasks` says how threads share the list. A thread that has to wait fetches the weights
of its next task meanwhile, so that memory never rests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import carray

from longscan.ops.jit import c_function, kernel, parallel_kernel, prange
from longscan.ops.mamba_step.layout import (
    ARGUMENTS,
    BATCH,
    CLAIMED,
    D_MODEL,
    DONE,
    FIELDS,
    FINAL_NORM,
    HEAD,
    HEAD_BIAS,
    HEAD_KIND,
    HEAD_SCALES,
    LAYERS,
    LOGITS,
    OWN,
    OWN_SPAN,
    PHASES,
    PLAN,
    ROW_UNIT,
    VOCABULARY,
    Field,
    Layer,
)
from longscan.ops.mamba_step.mamba_phases import advance, contract, project, select
from longscan.ops.mamba_step.mlp_phases import consult, expand, gather, reduce, route
from longscan.ops.mamba_step.phases import block, item, normalise
from longscan.ops.mamba_step.products import product
from longscan.ops.mamba_step.tasks import call_at, fetch_add, int64_pointer, wait_until
from longscan.ops.simd_memory import load_scalar

KIND, MAMBA, MLP = int(Field.LAYER), int(Layer.MAMBA), int(Layer.MLP)


@kernel
def _score(a, eps, begun, task, tasks, own):  # type: ignore[no-untyped-def]
    """Rows of the head."""
    d_model = a[D_MODEL]
    first, last = block(task, tasks, a[VOCABULARY], ROW_UNIT)
    row = d_model * item(a[HEAD_KIND])
    wait_until(a[DONE], begun, a[HEAD] + first * row, a[HEAD] + last * row)
    normed = normalise(a, eps, a[FINAL_NORM], a[LAYERS], False, own)
    product(
        a[HEAD_KIND], a[HEAD], row, a[HEAD_SCALES], first, last, d_model, a[HEAD_BIAS],
        normed, 4 * d_model, a[BATCH], a[LOGITS] + 4 * first, 4 * a[VOCABULARY],
    )  # fmt: skip


def _one_thread(thread, arguments, weights, state_addresses, epsilons):  # type: ignore[no-untyped-def]
    """What one thread does: it claims tasks until there are none. Takes addresses of the arrays."""
    a = carray(int64_pointer(arguments), ARGUMENTS)
    layers = a[LAYERS]
    table = carray(int64_pointer(weights), (layers, FIELDS))
    states = carray(int64_pointer(state_addresses), (layers, 3))
    plan = carray(int64_pointer(a[PLAN]), (layers + 1, PHASES + 1))
    own = a[OWN] + thread * a[OWN_SPAN]
    carray(int64_pointer(own), 1)[0] = -1
    layer = 0
    while True:
        claim = fetch_add(a[CLAIMED], 1)
        if claim >= plan[layers, PHASES]:
            break
        while claim >= plan[layer, PHASES]:
            layer += 1
        phase = 0
        while claim >= plan[layer, phase + 1]:
            phase += 1
        begun = plan[layer, phase]
        task, tasks = claim - begun, plan[layer, phase + 1] - begun
        eps = load_scalar(epsilons + 8 * layer)
        if layer == layers:
            _score(a, eps, begun, task, tasks, own)
            fetch_add(a[DONE], 1)
            continue
        w = table[layer]
        if w[KIND] == MAMBA:
            conv, form, ssm = states[layer, 0], states[layer, 1], states[layer, 2]
            if phase == 0:
                project(a, w, conv, form, ssm, eps, layer, begun, task, tasks, own)
            elif phase == 1:
                select(a, w, begun, task, tasks)
            elif phase == 2:
                advance(a, w, ssm, load_scalar(epsilons + 8 * layer + 4), begun, task, tasks, own)
            else:
                contract(a, w, begun, task, tasks)
        elif w[KIND] == MLP:
            if phase == 0:
                expand(a, w, eps, layer, begun, task, tasks, own)
            else:
                reduce(a, w, begun, task, tasks)
        elif phase == 0:
            route(a, w, eps, layer, begun, task, tasks, own)
        elif phase == 1:
            consult(a, w, eps, layer, begun, task, tasks, own)
        else:
            gather(a, w, begun, task, tasks)
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
