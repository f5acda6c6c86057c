"""The selective scan with complex A on a CPU: the definition's loops, compiled, over channels in parallel.

A task is a block of channels of one group over all sequences, so that gradients of parameters have one owner; sums over
channels go to a part of their own per block, and the parts are added in order.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longscan.ops.checks import row_offsets
from longscan.ops.jit import inline, kernel, parallel_kernel, run
from longscan.ops.selective_scan.cpu_table import checkpoints_shape, chunk_length

# Blocks a group's channels are split into, whatever the number of threads.
_BLOCKS = 8


@inline
def _softplus(x):
    return x if x > 20 else np.float32(math.log1p(math.exp(x)))


@inline
def _sigmoid(x):
    return np.float32(1 / (1 + math.exp(-x))) if x > -80 else np.float32(0)


@inline
def _exp(z):
    scale = math.exp(z.real)
    return np.complex64(complex(scale * math.cos(z.imag), scale * math.sin(z.imag)))


@kernel
def _forward(task, x, dt, A, B, C, D, z, bias, initial, seqs, softplus, chunk, groups, fixed, y, final, saved):
    channels, states = A.shape
    per_group = channels // groups
    blocks = min(per_group, _BLOCKS)
    group, block = task // blocks, task % blocks
    for c in range(
        group * per_group + block * per_group // blocks, group * per_group + (block + 1) * per_group // blocks
    ):
        h = np.empty(states, dtype=np.complex64)
        for s in range(seqs.shape[0]):
            start, length, slot = seqs[s, 0], seqs[s, 1], seqs[s, 2]
            for n in range(states):
                h[n] = initial[s, c, n]
            for t in range(length):
                i = start + t
                if t % chunk == 0 and saved.shape[0]:
                    for n in range(states):
                        saved[slot + t // chunk, c, n] = h[n]
                delta = dt[i, c] + bias[c]
                if softplus:
                    delta = _softplus(delta)
                drive = delta * x[i, c]
                total = np.float32(0)
                for n in range(states):
                    b = B[0, c, n] if fixed[0] else B[i, group, n]
                    read = C[0, c, n] if fixed[1] else C[i, group, n]
                    h[n] = _exp(delta * A[c, n]) * h[n] + drive * b
                    total += np.float32(2) * (read * h[n]).real
                total += D[c] * x[i, c]
                if z.shape[0]:
                    total *= z[i, c] * _sigmoid(z[i, c])
                y[i, c] = total
            for n in range(states):
                final[s, c, n] = h[n]


@parallel_kernel
def _forward_driver(tasks, x, dt, A, B, C, D, z, bias, initial, seqs, softplus, chunk, groups, fixed, y, final, saved):
    for task in prange(tasks):
        _forward(task, x, dt, A, B, C, D, z, bias, initial, seqs, softplus, chunk, groups, fixed, y, final, saved)


@kernel
def _backward(
    task, dy, dfinal, x, dt, A, B, C, D, z, bias, seqs, softplus, chunk, groups, fixed, saved,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
):  # fmt: skip
    channels, states = A.shape
    per_group = channels // groups
    blocks = min(per_group, _BLOCKS)
    group, block = task // blocks, task % blocks
    h = np.empty((chunk + 1, states), dtype=np.complex64)
    two = np.float32(2)
    for c in range(
        group * per_group + block * per_group // blocks, group * per_group + (block + 1) * per_group // blocks
    ):
        for s in range(seqs.shape[0]):
            start, length, slot = seqs[s, 0], seqs[s, 1], seqs[s, 2]
            carry = dfinal[s, c].copy()
            for part in range((length + chunk - 1) // chunk - 1, -1, -1):
                steps = min(chunk, length - part * chunk)
                for n in range(states):
                    h[0, n] = saved[slot + part, c, n]
                for t in range(steps):
                    i = start + part * chunk + t
                    delta = dt[i, c] + bias[c]
                    if softplus:
                        delta = _softplus(delta)
                    for n in range(states):
                        b = B[0, c, n] if fixed[0] else B[i, group, n]
                        h[t + 1, n] = _exp(delta * A[c, n]) * h[t, n] + delta * x[i, c] * b
                for t in range(steps - 1, -1, -1):
                    i = start + part * chunk + t
                    raw = dt[i, c] + bias[c]
                    delta = _softplus(raw) if softplus else raw
                    into_y = dy[i, c]
                    if z.shape[0]:
                        into_y *= z[i, c] * _sigmoid(z[i, c])
                    p, r, y = np.float32(0), np.float32(0), D[c] * x[i, c]
                    for n in range(states):
                        b = B[0, c, n] if fixed[0] else B[i, group, n]
                        read = C[0, c, n] if fixed[1] else C[i, group, n]
                        decay = _exp(delta * A[c, n])
                        decayed = decay * h[t, n]
                        G = carry[n] + two * into_y * np.conj(read)
                        to_c = two * into_y * np.conj(h[t + 1, n])
                        to_b = G * (delta * x[i, c])
                        if fixed[0]:
                            dB[0, 0, c, n] += to_b
                        else:
                            dB[block, i, group, n] += to_b
                        if fixed[1]:
                            dC[0, 0, c, n] += to_c
                        else:
                            dC[block, i, group, n] += to_c
                        y += two * (read * h[t + 1, n]).real
                        p += (G * np.conj(b)).real
                        r += (G * np.conj(A[c, n] * decayed)).real
                        dA[c, n] += G * np.conj(delta * decayed)
                        carry[n] = np.conj(decay) * G
                    dx[i, c] = delta * p + D[c] * into_y
                    slope = _sigmoid(raw) if softplus else np.float32(1)
                    ddt[i, c] = (r + x[i, c] * p) * slope
                    dD[c] += into_y * x[i, c]
                    dbias[c] += ddt[i, c]
                    if z.shape[0]:
                        gate = _sigmoid(z[i, c])
                        dz[i, c] = dy[i, c] * y * gate * (np.float32(1) + z[i, c] * (np.float32(1) - gate))
            for n in range(states):
                dinitial[s, c, n] = carry[n]


@parallel_kernel
def _backward_driver(
    tasks, dy, dfinal, x, dt, A, B, C, D, z, bias, seqs, softplus, chunk, groups, fixed, saved,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
):  # fmt: skip
    for task in prange(tasks):
        _backward(
            task, dy, dfinal, x, dt, A, B, C, D, z, bias, seqs, softplus, chunk, groups, fixed, saved,
            dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
        )  # fmt: skip


def _real(tensor: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """An activation as float32 over flattened steps; empty when absent."""
    if tensor is None:
        return np.zeros((0, shape[-1]), dtype=np.float32)
    return tensor.float().reshape(-1, shape[-1]).contiguous().numpy()


def _complex(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.complex64).resolve_conj().contiguous().numpy()


class _Call:
    """What forward and backward both need of the arguments, as arrays."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, cu_seqlens: Tensor | None,
    ) -> None:  # fmt: skip
        batch, length, channels = self.shape = tuple(x.shape)
        sequences = row_offsets(batch, length, cu_seqlens)
        self.chunk = chunk_length(A.shape[1])
        self.seqs = np.zeros((len(sequences), 3), dtype=np.int64)
        slot = 0
        for i, (row, start, end) in enumerate(sequences):
            self.seqs[i] = row * length + start, end - start, slot
            slot += -(-(end - start) // self.chunk)
        self.groups = max([t.shape[2] for t in (B, C) if t.dim() == 4], default=1)
        self.tasks = self.groups * min(channels // self.groups, _BLOCKS)
        self.fixed = np.array([t.dim() == 2 for t in (B, C)])
        self.x, self.dt, self.z = (_real(t, self.shape) for t in (x, dt, z))
        self.A = _complex(A)
        self.B, self.C = (self.varying(t) for t in (B, C))
        zeros = np.zeros(channels, dtype=np.float32)
        self.D = zeros if D is None else D.float().contiguous().numpy()
        self.bias = zeros if dt_bias is None else dt_bias.float().contiguous().numpy()

    def varying(self, tensor: Tensor) -> np.ndarray:
        if tensor.dim() == 2:
            return _complex(tensor)[None]
        repeated = tensor.flatten(0, 1)
        if repeated.shape[1] != self.groups:
            repeated = repeated.repeat_interleave(self.groups // repeated.shape[1], dim=1)
        return _complex(repeated)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, *, dt_softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, final state, and with `save` the states at chunk borders."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens)
    batch, length, channels = call.shape
    sequences, states = len(call.seqs), A.shape[1]
    y = torch.empty(batch * length, channels)
    final = torch.empty(sequences, channels, states, dtype=torch.complex64)
    initial = torch.zeros_like(final) if initial_state is None else initial_state
    shape = checkpoints_shape(batch * length, channels, states, sequences) if save else (0, channels, states)
    saved = torch.zeros(shape, dtype=torch.complex64)
    run(
        _forward_driver, _forward, call.tasks, call.x, call.dt, call.A, call.B, call.C, call.D, call.z, call.bias,
        _complex(initial), call.seqs, dt_softplus, call.chunk, call.groups, call.fixed, y.numpy(), final.numpy(),
        saved.numpy(),
    )  # fmt: skip
    return y.view(batch, length, channels).to(x.dtype), final, saved if save else saved.flatten()


def backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    checkpoints: Tensor, *, dt_softplus: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None where the argument is None)."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, cu_seqlens)
    channels = call.shape[2]
    dx, ddt, dz = (np.empty_like(call.x) for _ in range(3))
    dA, dinitial = np.zeros_like(call.A), np.empty((len(call.seqs), *call.A.shape), dtype=np.complex64)
    dD, dbias = np.zeros((2, channels), dtype=np.float32)
    blocks = call.tasks // call.groups
    dB, dC = (
        np.zeros((1 if fixed else blocks, *array.shape), dtype=np.complex64)
        for array, fixed in zip((call.B, call.C), call.fixed, strict=True)
    )
    run(
        _backward_driver, _backward, call.tasks, _real(dy, call.shape), _complex(dfinal), call.x, call.dt, call.A,
        call.B, call.C, call.D, call.z, call.bias, call.seqs, dt_softplus, call.chunk, call.groups, call.fixed,
        _complex(checkpoints), dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
    )  # fmt: skip

    def like(array: Any, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.from_numpy(array).reshape(tensor.shape).to(tensor.dtype)

    def varying(parts: np.ndarray, tensor: Tensor) -> Tensor | None:
        total = torch.from_numpy(parts).sum(0)
        if tensor.dim() == 4 and tensor.shape[2] != call.groups:
            total = total.unflatten(1, (tensor.shape[2], -1)).sum(2)
        return total.reshape(tensor.shape)

    return (
        like(dx, x), like(ddt, dt), torch.from_numpy(dA), varying(dB, B), varying(dC, C), like(dD, D), like(dz, z),
        like(dbias, dt_bias), like(dinitial, initial_state),
    )  # fmt: skip
