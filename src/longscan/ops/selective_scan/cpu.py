"""The selective scan on a CPU: Numba kernels over explicit SIMD vectors, fitted to the operator's contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longscan.ops.checks import row_offsets
from longscan.ops.jit import run, threads
from longscan.ops.selective_scan import cpu_complex
from longscan.ops.selective_scan import cpu_table as k
from longscan.ops.selective_scan.cpu_backward import backward_driver, backward_task
from longscan.ops.selective_scan.cpu_forward import MOST_VECTORS, forward_driver, forward_task
from longscan.ops.selective_scan.cpu_step import step_driver, step_task
from longscan.ops.selective_scan.cpu_table import BLOCK, STEPS, checkpoints_shape, chunk_length
from longscan.ops.simd import HAS_FLOAT16, WIDTH
from longscan.ops.simd_memory import FORMATS

_LOG2_E = 1.4426950408889634

# A step over fewer states than this is done by the calling thread.
_NUMBERS_PER_STEP_TASK = 1 << 16

# Tasks that the backward pass makes at least, where there are channels enough, and runs of sequences at most. Both are
# constants, not numbers of threads: the order of every sum follows from the shapes alone.
_TASKS = 16
_CREWS = 16


def unsupported(x: Tensor, *_: Any) -> str | None:
    """Serves float32, bfloat16 and float16, real and complex A."""
    if x.dtype not in FORMATS:
        return f"it computes in float32, the activations are {x.dtype}"
    if x.dtype == torch.float16 and not HAS_FLOAT16:
        return "this processor does not convert float16"
    return None


def _served(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its channels are not side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class _Call:
    """A call's arguments in the form the kernels take, an int64 table and per-sequence rows; keeps tensors alive."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        batch, length, channels = x.shape
        self.sequences = row_offsets(batch, length, cu_seqlens)
        self.alive: list[Tensor] = []
        self.table = a = np.zeros(k.ARGUMENTS, dtype=np.int64)
        chunk = chunk_length(A.shape[1])
        groups = max([t.shape[2] for t in (B, C) if t.dim() == 4], default=1)
        lengths = np.array([end - start for _, start, end in self.sequences], dtype=np.int64)
        rounded = -(-lengths // STEPS) * STEPS
        slots = -(-lengths // chunk)
        self.rows = np.zeros((len(self.sequences), 5), dtype=np.int64)
        self.rows[:, 0] = [row for row, _, _ in self.sequences]
        self.rows[:, 1] = [start for _, start, _ in self.sequences]
        self.rows[:, 2] = lengths
        self.rows[1:, 3] = np.cumsum(slots)[:-1]
        self.rows[1:, 4] = np.cumsum(rounded)[:-1]
        self.padded_steps = int(rounded.sum())
        a[k.FORMAT], a[k.ITEM] = FORMATS[x.dtype], x.element_size()
        a[k.SOFTPLUS], a[k.CHUNK] = dt_softplus, chunk
        a[k.STATES], a[k.PADDED] = A.shape[1], -(-A.shape[1] // BLOCK) * BLOCK
        a[k.CHANNELS], a[k.GROUPS], a[k.PER_GROUP] = channels, groups, channels // groups
        a[k.VECTORS] = -(-(channels // groups) // WIDTH)
        a[k.PADDED_STEPS], a[k.SEQUENCES] = self.padded_steps, len(self.sequences)
        for tensor, address, row in ((x, k.X, k.X_ROW), (dt, k.DT, k.DT_ROW), (z, k.Z, k.Z_ROW)):
            if tensor is not None:
                self.place(_served(tensor), address, row)
        a[k.A_] = self.keep(self.in_vectors(A * _LOG2_E))
        a[k.D_] = 0 if D is None else self.keep(self.in_vectors(D[:, None], pad_states=False))
        a[k.BIAS] = 0 if dt_bias is None else self.keep(self.in_vectors(dt_bias[:, None], pad_states=False))
        self.positions = self.padded_positions(lengths, rounded)
        # None or a number: the kernels are compiled for each.
        self.fixed = tuple(0 if tensor.dim() == 2 else None for tensor in (B, C))
        for tensor, address in ((B, k.B_), (C, k.C_)):
            a[address] = self.keep(self.in_vectors(tensor) if tensor.dim() == 2 else self.in_steps(tensor))

    def keep(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return tensor.data_ptr()

    def place(self, tensor: Tensor, address: int, row: int) -> None:
        """Enters an activation's address and its strides in bytes."""
        self.table[address] = self.keep(tensor)
        self.table[row] = tensor.stride(0) * tensor.element_size()
        self.table[row + 1] = tensor.stride(1) * tensor.element_size()

    def in_vectors(self, tensor: Tensor, pad_states: bool = True) -> Tensor:
        """(channels, state) as (vector of channels, state, lane), padded with zeros."""
        groups, size, vectors = (int(self.table[i]) for i in (k.GROUPS, k.PER_GROUP, k.VECTORS))
        states = int(self.table[k.PADDED]) if pad_states else tensor.shape[1]
        out = tensor.new_zeros((groups, vectors * WIDTH, states), dtype=torch.float32)
        out[:, :size, : tensor.shape[1]] = tensor.reshape(groups, size, -1)
        return out.view(groups, vectors, WIDTH, states).transpose(2, 3).contiguous()

    def padded_positions(self, lengths: np.ndarray, rounded: np.ndarray) -> Tensor | None:
        """Where each step of the flattened call lies among the padded ones; None: where it is."""
        if (lengths == rounded).all():
            return None
        shift = np.repeat(self.rows[:, 4] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        return torch.from_numpy(np.arange(int(lengths.sum())) + shift)

    def in_steps(self, tensor: Tensor) -> Tensor:
        """(batch, length, groups, state) as float32 (tile, group, padded state, step of the tile)."""
        groups, states = int(self.table[k.GROUPS]), int(self.table[k.PADDED])
        flat = tensor.flatten(0, 1)
        if flat.shape[1] != groups:
            flat = flat.repeat_interleave(groups // flat.shape[1], dim=1)
        if self.positions is not None or flat.shape[2] != states:
            padded = flat.new_zeros((self.padded_steps, groups, states))
            where = slice(None) if self.positions is None else self.positions
            padded[where, :, : flat.shape[2]] = flat
            flat = padded
        out = torch.empty((self.padded_steps // STEPS, groups, states, STEPS))
        out.copy_(flat.view(-1, STEPS, groups, states).permute(0, 2, 3, 1))
        return out

    def share(self, block_vectors: int) -> int:
        """Splits a group's vectors into blocks; returns the number of blocks over all groups."""
        vectors, groups = int(self.table[k.VECTORS]), int(self.table[k.GROUPS])
        self.table[k.BLOCK_VECTORS] = block_vectors
        self.table[k.BLOCKS] = groups * -(-vectors // block_vectors)
        return int(self.table[k.BLOCKS])


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    dt_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and with `save` the states at chunk borders."""
    if A.is_complex():
        return cpu_complex.forward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus=dt_softplus, save=save
        )
    batch, length, channels = x.shape
    state = A.shape[1]
    call = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
    sequences = len(call.sequences)
    y = torch.empty((batch, length, channels), dtype=x.dtype)
    final = torch.empty((sequences, channels, state))
    shape = checkpoints_shape(batch * length, channels, state, sequences) if save else (0,)
    checkpoints = torch.zeros(shape)
    a = call.table
    call.place(y, k.OUT, k.OUT_ROW)
    a[k.FINAL], a[k.SAVED], a[k.SAVE] = final.data_ptr(), checkpoints.data_ptr(), save
    if initial_state is not None:
        a[k.INITIAL] = call.keep(initial_state.contiguous())
    vectors = int(a[k.VECTORS] * a[k.GROUPS]) * sequences
    blocks = call.share(min(MOST_VECTORS, max(1, vectors // (2 * threads()))))
    run(forward_driver, forward_task, sequences * blocks, a, call.rows, *call.fixed)
    return y, final, checkpoints


def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    *,
    dt_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None where the argument is None)."""
    if A.is_complex():
        return cpu_complex.backward(
            dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, checkpoints, dt_softplus=dt_softplus
        )
    batch, length, channels = x.shape
    state = A.shape[1]
    call = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, dt_softplus)
    a = call.table
    sequences, groups = len(call.sequences), int(a[k.GROUPS])
    crews = min(sequences, _CREWS)
    per_group = min(int(a[k.VECTORS]), max(1, _TASKS // (crews * groups)))
    blocks = call.share(-(-int(a[k.VECTORS]) // per_group))

    dx, ddt = torch.empty((2, batch, length, channels), dtype=x.dtype).unbind(0)
    dz = None if z is None else torch.empty((batch, length, channels), dtype=x.dtype)
    dinitial = None if initial_state is None else torch.empty((sequences, channels, state))
    dA = torch.empty((crews, channels, state))
    dD, dbias = torch.empty((2, crews, channels)).unbind(0)
    sums = (blocks, int(a[k.PADDED]) // BLOCK, call.padded_steps, BLOCK)
    dB, dC = (torch.empty((crews, channels, state)) if t.dim() == 2 else torch.zeros(sums) for t in (B, C))

    call.place(_served(dy), k.DOUT, k.DOUT_ROW)
    a[k.OUT_ROW], a[k.OUT_STEP] = dx.stride(0) * dx.element_size(), dx.stride(1) * dx.element_size()
    a[k.SAVED], a[k.DFINAL] = checkpoints.data_ptr(), call.keep(dfinal.float().contiguous())
    a[k.CREWS] = crews
    for tensor, address in (
        (dx, k.DX), (ddt, k.DDT), (dz, k.DZ), (dinitial, k.DINITIAL), (dA, k.DA_), (dB, k.DB_), (dC, k.DC_),
        (dD, k.DD_), (dbias, k.DBIAS),
    ):  # fmt: skip
        a[address] = 0 if tensor is None else tensor.data_ptr()
    run(backward_driver, backward_task, crews * blocks, a, call.rows, *call.fixed)

    def varying(partial: Tensor, like: Tensor) -> Tensor:
        if like.dim() == 2:
            return partial.sum(0).to(like.dtype)
        steps = partial.view(groups, -1, *sums[1:]).sum(1).permute(2, 0, 1, 3).flatten(2)[..., :state]
        if call.positions is not None:
            steps = steps[call.positions]
        if like.shape[2] != groups:
            steps = steps.unflatten(1, (like.shape[2], -1)).sum(2)
        return steps.reshape(like.shape).to(like.dtype)

    return (
        dx,
        ddt,
        dA.sum(0),
        varying(dB, B),
        varying(dC, C),
        None if D is None else dD.sum(0),
        dz,
        None if dt_bias is None else dbias.sum(0),
        dinitial,
    )


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
) -> Tensor:
    """One step from `state` (batch, channels, state), which is overwritten; x, dt, z (batch, channels)."""
    if A.is_complex():
        gate = None if z is None else z[:, None]
        y, final, _ = cpu_complex.forward(
            x[:, None], dt[:, None], A, B[:, None], C[:, None], D, gate, dt_bias, state, None,
            dt_softplus=dt_softplus, save=False,
        )  # fmt: skip
        state.copy_(final)
        return y[:, 0]
    batch, channels = x.shape
    states, item = state.shape[2], x.element_size()
    out = torch.empty((batch, channels), dtype=x.dtype)
    own = state.contiguous()
    x, dt, B, C = (_served(tensor) for tensor in (x, dt, B, C))
    A = A.contiguous()
    D, dt_bias = (None if tensor is None else tensor.contiguous() for tensor in (D, dt_bias))
    gate = x if z is None else _served(z)
    tasks = 1 if state.numel() < _NUMBERS_PER_STEP_TASK else 2 * threads()
    table = np.array(
        (
            own.data_ptr(), A.data_ptr(),
            0 if D is None else D.data_ptr(), 0 if dt_bias is None else dt_bias.data_ptr(),
            x.data_ptr(), x.stride(0) * item, dt.data_ptr(), dt.stride(0) * item,
            0 if z is None else gate.data_ptr(), gate.stride(0) * item, out.data_ptr(),
            B.data_ptr(), B.stride(0) * item, B.stride(1) * item, channels // B.shape[1],
            C.data_ptr(), C.stride(0) * item, C.stride(1) * item, channels // C.shape[1],
            FORMATS[x.dtype], item, dt_softplus, batch, channels, states, tasks,
        ),
        dtype=np.int64,
    )  # fmt: skip
    run(step_driver, step_task, tasks, table)
    if own is not state:
        state.copy_(own)
    return out
