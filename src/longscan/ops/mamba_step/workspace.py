"""The memory in which a decoder's threads leave things for one another, and how its work is cut into tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longscan.ops.jit import run
from longscan.ops.mamba_step import cpu
from longscan.ops.mamba_step.weights import Sizes, address_of

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

    def __init__(self, sizes: Sizes, layers: int, batch: int, threads: int) -> None:
        self.batch, self.threads = batch, threads
        self.arguments = a = np.zeros(cpu.ARGUMENTS, dtype=np.int64)
        a[cpu.D_MODEL], a[cpu.D_INNER], a[cpu.D_STATE] = sizes.d_model, sizes.d_inner, sizes.d_state
        a[cpu.DT_RANK], a[cpu.D_CONV], a[cpu.BATCH], a[cpu.LAYERS] = sizes.dt_rank, sizes.d_conv, batch, layers
        mixed = sizes.dt_rank + 2 * sizes.d_state
        most = _TASKS_PER_THREAD * threads
        a[cpu.IN_TASKS] = a[cpu.SCAN_TASKS] = _tasks(sizes.d_inner, cpu.CHANNEL_UNIT, most)
        a[cpu.MIX_TASKS] = _tasks(mixed, cpu.ROW_UNIT, most)
        a[cpu.OUT_TASKS] = _tasks(sizes.d_model, cpu.ROW_UNIT, most)
        spans = {
            cpu.STREAMS: 2 * sizes.d_model,
            cpu.X: sizes.d_inner,
            cpu.GATE: sizes.d_inner,
            cpu.MIXED: mixed,
            cpu.DELTA: sizes.d_inner,
            cpu.Y: sizes.d_inner,
            cpu.NORMED: threads * sizes.d_model,
        }
        self._buffers = {name: torch.empty(batch * span) for name, span in spans.items()}
        for name, buffer in self._buffers.items():
            a[name] = buffer.data_ptr()
        self.streams = self._buffers[cpu.STREAMS].view(2, batch, sizes.d_model)
        self._counters = np.zeros(3 * _LINE, dtype=np.int64)
        a[cpu.CLAIMED], a[cpu.DONE] = self._counters[_LINE:].ctypes.data, self._counters[2 * _LINE :].ctypes.data

    def run(self, hidden: Tensor, table: np.ndarray, states: np.ndarray, eps: np.ndarray, head: Head | None) -> None:
        """One token; overwrites `hidden` (batch, d_model), reads the first stream and leaves the last."""
        a = self.arguments
        a[cpu.HIDDEN] = hidden.data_ptr()
        a[cpu.VOCABULARY] = a[cpu.HEAD_TASKS] = 0
        if head is not None:
            rows = head.matrix.shape[0]
            a[cpu.VOCABULARY] = rows
            a[cpu.HEAD_TASKS] = _tasks(rows, cpu.ROW_UNIT, _HEAD_TASKS_PER_THREAD * self.threads)
            a[cpu.LOGITS], a[cpu.FINAL_NORM] = head.logits.data_ptr(), head.norm.data_ptr()
            a[cpu.HEAD], a[cpu.HEAD_KIND], a[cpu.HEAD_SCALES] = address_of(head.matrix)
            a[cpu.HEAD_BIAS] = 0 if head.bias is None else head.bias.data_ptr()
        self._counters.fill(0)
        function = cpu.one_thread()
        arrays = (array.ctypes.data for array in (a, table, states, eps))
        run(cpu.every_thread, _alone, self.threads, function.address, *arrays)
