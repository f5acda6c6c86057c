"""The memory in which a decoder's threads leave things for one another, and how its work is cut into tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longscan.ops.jit import run
from longscan.ops.mamba_step import cpu, layout
from longscan.ops.mamba_step.matrices import Sizes, address_of
from longscan.ops.mamba_step.mlp_weights import MlpStepWeights
from longscan.ops.mamba_step.model_weights import StepWeights
from longscan.ops.mamba_step.weights import MambaStepWeights

if TYPE_CHECKING:
    from longscan.ops.mamba_step.decoder import Head

# int64 numbers in a cache line: the two counters are not to share one.
_LINE = 8

# Tasks per thread and phase: enough that a late thread holds no one up, few enough that claiming them costs nothing.
_TASKS_PER_THREAD = 4
_HEAD_TASKS_PER_THREAD = 32


def _tasks(size: int, unit: int, most: int) -> int:
    return max(1, min(most, -(-size // unit)))


def _alone(thread: int, _function: int, *arrays: int) -> None:
    """Without a parallel region."""
    cpu.one_thread().ctypes(thread, *arrays)


class Workspace:
    """Buffers and table of arguments for one size of batch and number of threads."""

    def __init__(self, sizes: Sizes, layers: Sequence[StepWeights], batch: int, threads: int) -> None:
        self.batch, self.threads = batch, threads
        self.arguments = a = np.zeros(layout.ARGUMENTS, dtype=np.int64)
        a[layout.D_MODEL], a[layout.D_INNER], a[layout.D_STATE] = sizes.d_model, sizes.d_inner, sizes.d_state
        a[layout.DT_RANK], a[layout.D_CONV], a[layout.HEADS] = sizes.dt_rank, sizes.d_conv, sizes.heads
        a[layout.BATCH], a[layout.LAYERS] = batch, len(layers)
        self._plan = _plan(layers, _TASKS_PER_THREAD * threads)
        a[layout.PLAN] = self._plan.ctypes.data
        mlps = [layer for layer in layers if isinstance(layer, MlpStepWeights)]
        inner = max([sizes.d_inner, *(mlp.chosen * mlp.d_intermediate for mlp in mlps)])
        mixed = max([sizes.heads * sizes.mixed, *(mlp.router.shape[0] for mlp in mlps if mlp.router is not None)])
        spans = {
            layout.STREAMS: 2 * sizes.d_model,
            layout.X: inner,
            layout.GATE: inner,
            layout.MIXED: mixed,
            layout.DELTA: sizes.d_inner,
            layout.Y: inner,
        }
        self._buffers = {name: torch.empty(batch * span) for name, span in spans.items()}
        # A thread's own: the header, the norm before a layer, the norms of what a layer has selected.
        size = layout.OWN_HEADER + 4 * batch * (sizes.d_model + sizes.heads * sizes.mixed)
        a[layout.OWN_SPAN] = -(-size // layout.OWN_HEADER) * layout.OWN_HEADER
        self._buffers[layout.OWN] = torch.empty(threads * int(a[layout.OWN_SPAN]) // 4)
        for name, buffer in self._buffers.items():
            a[name] = buffer.data_ptr()
        self.streams = self._buffers[layout.STREAMS].view(2, batch, sizes.d_model)
        self._counters = np.zeros(3 * _LINE, dtype=np.int64)
        a[layout.CLAIMED], a[layout.DONE] = self._counters[_LINE:].ctypes.data, self._counters[2 * _LINE :].ctypes.data

    def run(
        self,
        hidden: Tensor,
        aside: Tensor | None,
        table: np.ndarray,
        states: np.ndarray,
        eps: np.ndarray,
        head: Head | None,
    ) -> None:
        """One token; overwrites `hidden` (batch, d_model), reads the first stream and leaves the last."""
        a, scored = self.arguments, self._plan[-1]
        a[layout.HIDDEN], a[layout.ASIDE] = hidden.data_ptr(), 0 if aside is None else aside.data_ptr()
        scored[1:] = scored[0]
        if head is not None:
            rows = head.matrix.shape[0]
            scored[1:] += _tasks(rows, layout.ROW_UNIT, _HEAD_TASKS_PER_THREAD * self.threads)
            a[layout.VOCABULARY] = rows
            a[layout.LOGITS], a[layout.FINAL_NORM] = head.logits.data_ptr(), head.norm.data_ptr()
            a[layout.HEAD], a[layout.HEAD_KIND], a[layout.HEAD_SCALES] = address_of(head.matrix)
            a[layout.HEAD_BIAS] = 0 if head.bias is None else head.bias.data_ptr()
        self._counters.fill(0)
        function = cpu.one_thread()
        arrays = (array.ctypes.data for array in (a, table, states, eps))
        run(cpu.every_thread, _alone, self.threads, function.address, *arrays)


def _plan(layers: Sequence[StepWeights], most: int) -> np.ndarray:
    """(layers and the head, phases + 1): the numbers of the tasks with which phases begin, and the next layer."""
    counts = [[_tasks(size, unit, most) if size else 0 for size, unit in _work(layer)] for layer in layers]
    plan = np.zeros((len(layers) + 1, layout.PHASES + 1), dtype=np.int64)
    begun = 0
    for row, own in zip(plan, counts, strict=False):
        row[0], row[1:] = begun, begun + np.cumsum(own)
        begun = row[-1]
    plan[-1] = begun
    return plan


def _work(layer: StepWeights) -> list[tuple[int, int]]:
    """What each phase of a layer is cut into: its size, and the unit of a task's share."""
    rows = (layer.sizes.d_model, layout.ROW_UNIT)
    if isinstance(layer, MambaStepWeights):
        channels = (layer.sizes.d_inner, layout.CHANNEL_UNIT)
        return [channels, (layer.heads * layer.sizes.mixed, layout.ROW_UNIT), channels, rows]
    width = (layer.d_intermediate, layout.CHANNEL_UNIT)
    if layer.router is None:
        return [width, rows, (0, 1), (0, 1)]
    return [(layer.router.shape[0], layout.ROW_UNIT), width, rows, (0, 1)]
