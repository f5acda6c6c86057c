"""The selective scan as it is defined: plain PyTorch, one step at a time, forward and backward.

This file is the specification that every other backend is tested against. Per channel d and state n, with
delta[t] = softplus(dt[t] + dt_bias):

    h[t] = exp(delta[t] A) h[t-1] + delta[t] x[t] B[t]
    y[t] = sum_n C[t] h[t]      (2 Re of it when A is complex: the states stand for conjugate pairs)
    out[t] = (y[t] + D x[t]) silu(z[t])

(Gu and Dao 2023, algorithm 2, with A discretised by zero-order hold and B by Euler, as their released models have it.)

The backward pass walks the same recurrence from the end, with G[t] the gradient of h[t]:

    G[t] = 2 conj(C[t]) dy[t] + conj(exp(delta[t+1] A)) G[t+1]      (no 2 when real)

and reads every gradient off G[t], h[t-1] and h[t]. States are not stored but recomputed from those at chunk borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION, row_offsets, stacked


def chunk_length(state: int) -> int:
    """Steps between saved states: the more states a channel has, the fewer are saved, so bytes do not grow with N."""
    return 64 * -(-state // 16)


def checkpoints_shape(tokens: int, channels: int, state: int, num_sequences: int) -> tuple[int, ...]:
    """Shape of the saved states: an upper bound on the chunks that `num_sequences` sequences can make."""
    return (tokens // chunk_length(state) + num_sequences, channels, state)


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20))))


def _sequence(tensor: Tensor, row: int, start: int, end: int) -> Tensor:
    """The part of B or C that a sequence sees: a constant as it is, a per-step one cut to the sequence's time."""
    return tensor if tensor.dim() == 2 else tensor[row, start:end]


def _per_channel(tensor: Tensor, t: int, channels: int) -> Tensor:
    """B or C at step t as (channels, state): a constant as it is, groups repeated over their channels."""
    if tensor.dim() == 2:
        return tensor
    groups = tensor.shape[1]
    return tensor[t].repeat_interleave(channels // groups, dim=0)


class _Prepared:
    """One sequence's arguments in the accumulation dtype: x, delta (length, channels), B, C, first state."""

    def __init__(
        self,
        where: tuple[int, int, int],
        sequence: int,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        row, start, end = where
        real = ACCUMULATION[x.dtype]
        self.state_dtype = torch.promote_types(real, A.dtype)
        self.x = x[row, start:end].to(real)
        self.raw = dt[row, start:end].to(real)
        if dt_bias is not None:
            self.raw = self.raw + dt_bias
        self.delta = _softplus(self.raw) if dt_softplus else self.raw
        self.A = A
        self.B = _sequence(B, row, start, end).to(self.state_dtype)
        self.C = _sequence(C, row, start, end).to(self.state_dtype)
        self.channels = x.shape[2]
        self.length = end - start
        if initial_state is None:
            self.first = torch.zeros_like(A, dtype=self.state_dtype)
        else:
            self.first = initial_state[sequence].to(self.state_dtype)

    def decay(self, t: int) -> Tensor:
        return torch.exp(self.delta[t, :, None] * self.A)

    def advance(self, t: int, h: Tensor) -> Tensor:
        drive = (self.delta[t] * self.x[t])[:, None] * _per_channel(self.B, t, self.channels)
        return self.decay(t) * h + drive

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (_per_channel(self.C, t, self.channels) * h).sum(-1)
        return 2 * y.real if y.is_complex() else y


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
    """Output, final state and (with `save`) the states at chunk borders. Differentiable by autograd as it stands."""
    batch, length, channels = x.shape
    sequences = row_offsets(batch, length, cu_seqlens)
    real = ACCUMULATION[x.dtype]
    state_dtype = torch.promote_types(real, A.dtype)
    chunk = chunk_length(A.shape[1])
    shape = checkpoints_shape(batch * length, channels, A.shape[1], len(sequences)) if save else (0,)
    checkpoints = torch.zeros(shape, dtype=state_dtype, device=x.device)
    saved = 0
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    final = []
    for i, where in enumerate(sequences):
        p = _Prepared(where, i, x, dt, A, B, C, dt_bias, initial_state, dt_softplus)
        h = p.first
        for t in range(p.length):
            if save and t % chunk == 0:
                checkpoints[saved] = h.detach()
                saved += 1
            h = p.advance(t, h)
            y = p.read(t, h)
            rows[where[0]].append(y if D is None else y + D * p.x[t])
        final.append(h)
    out = stacked([torch.stack(row) for row in rows])
    if z is not None:
        out = out * torch.nn.functional.silu(z.to(real))
    return out.to(x.dtype), stacked(final), checkpoints


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
    batch, length, channels = x.shape
    real = ACCUMULATION[x.dtype]
    chunk = chunk_length(A.shape[1])
    scale = 2 if A.is_complex() else 1
    dx, ddt = torch.zeros_like(x, dtype=real), torch.zeros_like(x, dtype=real)
    dz = torch.zeros_like(x, dtype=real)
    dA = torch.zeros_like(A)
    dB, dC = torch.zeros_like(B, dtype=checkpoints.dtype), torch.zeros_like(C, dtype=checkpoints.dtype)
    sequences = row_offsets(batch, length, cu_seqlens)
    dinitial = torch.zeros((len(sequences), *A.shape), dtype=checkpoints.dtype, device=x.device)
    saved = 0
    for i, where in enumerate(sequences):
        row, start, end = where
        p = _Prepared(where, i, x, dt, A, B, C, dt_bias, initial_state, dt_softplus)
        dB_seq = dB if dB.dim() == 2 else dB[row, start:end]
        dC_seq = dC if dC.dim() == 2 else dC[row, start:end]
        g_out = dy[row, start:end].to(real)
        gate = torch.nn.functional.silu(z[row, start:end].to(real)) if z is not None else torch.ones_like(g_out)
        g_y = g_out * gate
        G = dfinal[i].to(checkpoints.dtype)
        chunks = -(-p.length // chunk)
        for c in reversed(range(chunks)):
            stop = min((c + 1) * chunk, p.length)
            states = [checkpoints[saved + c]]
            for t in range(c * chunk, stop):
                states.append(p.advance(t, states[-1]))
            for t in reversed(range(c * chunk, stop)):
                before, h = states[t - c * chunk], states[t - c * chunk + 1]
                b, a = _per_channel(p.B, t, channels), p.decay(t)
                G = G + scale * g_y[t, :, None] * _per_channel(p.C, t, channels).conj()
                u = p.delta[t] * p.x[t]
                _accumulate(dC_seq, t, scale * g_y[t, :, None] * h.conj())
                _accumulate(dB_seq, t, G * u[:, None])
                into_b = (G * b.conj()).sum(-1)
                decayed = a * before
                into_delta = (G * (A * decayed + p.x[t, :, None] * b).conj()).sum(-1)
                if A.is_complex():
                    into_b, into_delta = into_b.real, into_delta.real
                dx[row, start + t] = p.delta[t] * into_b
                ddt[row, start + t] = into_delta
                dA += G * (p.delta[t, :, None] * decayed).conj()
                if z is not None:
                    dz[row, start + t] = p.read(t, h)
                G = a.conj() * G
        saved += chunks
        dinitial[i] = G
        if dt_softplus:
            ddt[row, start:end] *= torch.where(p.raw > 20, 1.0, torch.sigmoid(p.raw))
        if z is not None:
            gate_in = z[row, start:end].to(real)
            sigmoid = torch.sigmoid(gate_in)
            ungated = dz[row, start:end] if D is None else dz[row, start:end] + D * p.x
            dz[row, start:end] = g_out * ungated * sigmoid * (1 + gate_in * (1 - sigmoid))
        if D is not None:
            dx[row, start:end] += D * g_y
    dD = None
    if D is not None:
        g_y = dy.to(real) if z is None else dy.to(real) * torch.nn.functional.silu(z.to(real))
        dD = (g_y * x.to(real)).sum((0, 1))
    return (
        dx.to(x.dtype),
        ddt.to(dt.dtype),
        dA,
        (dB if B.is_complex() or not A.is_complex() else dB.real).to(B.dtype),
        (dC if C.is_complex() or not A.is_complex() else dC.real).to(C.dtype),
        dD,
        None if z is None else dz.to(z.dtype),
        None if dt_bias is None else ddt.sum((0, 1)),
        None if initial_state is None else dinitial,
    )


def _accumulate(target: Tensor, t: int, gradient: Tensor) -> None:
    """Adds a per-channel gradient (channels, state) at step t to B's or C's, summing a group's channels."""
    if target.dim() == 2:
        target += gradient
    else:
        groups = target.shape[1]
        target[t] += gradient.reshape(groups, -1, gradient.shape[-1]).sum(1)


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
    y, final, _ = forward(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None if z is None else z[:, None],
        dt_bias,
        state,
        None,
        dt_softplus=dt_softplus,
        save=False,
    )
    state.copy_(final)
    return y[:, 0]
