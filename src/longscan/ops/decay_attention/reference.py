"""Outer-product recurrences with decay as they are defined: plain PyTorch, one step at a time, forward and backward.

This file is the specification that every other backend is tested against. Per head, with a matrix S as its state:

    S[t] = exp(g[t]) S[t-1] + k[t] v[t]^T,    y[t] = S[t]^T q[t]

where g, the logarithm of the decay, is at most 0 (absent: 0), constant in time or not. With fewer heads of q and k than
of v, each of them serves as many neighbouring heads.

The backward pass walks from the end, with G[t] the gradient of S[t]:

    G[t] = q[t] dy[t]^T + exp(g[t+1]) G[t+1]

and reads dq[t] = S[t] dy[t], dk[t] = G[t] v[t], dv[t] = G[t]^T k[t] and dg[t] = <G[t], exp(g[t]) S[t-1]> off it. States
are not stored but recomputed from those at chunk borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION, row_offsets, stacked

_CHUNK = 32


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


class _Sequence:
    """One sequence's arguments in the accumulation dtype: q, k, v (length, heads, ...), decays, first state."""

    def __init__(
        self,
        where: tuple[int, int, int],
        sequence: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        row, start, end = where
        real = ACCUMULATION[q.dtype]
        heads = v.shape[2]
        shared = heads // q.shape[2]
        self.q, self.k = (tensor[row, start:end].to(real).repeat_interleave(shared, 1) for tensor in (q, k))
        self.v = v[row, start:end].to(real)
        self.length = end - start
        if log_decay is None:
            self.decays = torch.ones((self.length, heads, 1, 1), dtype=real, device=q.device)
        else:
            own = log_decay.expand(self.length, heads) if log_decay.dim() == 1 else log_decay[row, start:end]
            self.decays = own.to(real).exp()[..., None, None]
        if initial_state is None:
            self.first = torch.zeros((heads, q.shape[3], v.shape[3]), dtype=real, device=q.device)
        else:
            self.first = initial_state[sequence].to(real)

    def advance(self, t: int, S: Tensor) -> Tensor:
        return self.decays[t] * S + self.k[t, :, :, None] * self.v[t, :, None, :]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    wide: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, heads, d_v) and final states. Differentiable by autograd as it stands.

    Both are in the precision of the sums; the output is in v's dtype unless `wide`.
    """
    batch, length = q.shape[:2]
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    final = []
    for i, where in enumerate(row_offsets(batch, length, cu_seqlens)):
        p = _Sequence(where, i, q, k, v, log_decay, initial_state)
        S = p.first
        for t in range(p.length):
            S = p.advance(t, S)
            rows[where[0]].append((p.q[t, :, :, None] * S).sum(1))
        final.append(S)
    y = stacked([torch.stack(row) for row in rows])
    return y if wide else y.to(v.dtype), stacked(final)


def backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, log_decay and initial_state (None where the argument is None)."""
    batch, length, heads = v.shape[:3]
    real = ACCUMULATION[q.dtype]
    dq, dk = (torch.zeros((batch, length, heads, q.shape[3]), dtype=real, device=q.device) for _ in range(2))
    dv = torch.zeros_like(v, dtype=real)
    dg = torch.zeros((batch, length, heads), dtype=real, device=q.device)
    dinitial = []
    for i, where in enumerate(row_offsets(batch, length, cu_seqlens)):
        row, start, _ = where
        p = _Sequence(where, i, q, k, v, log_decay, initial_state)
        borders = []
        S = p.first
        for t in range(p.length):
            if t % _CHUNK == 0:
                borders.append(S)
            S = p.advance(t, S)
        G = dfinal[i].to(real)
        for chunk in reversed(range(len(borders))):
            begin, stop = chunk * _CHUNK, min((chunk + 1) * _CHUNK, p.length)
            states = [borders[chunk]]
            for t in range(begin, stop):
                states.append(p.advance(t, states[-1]))
            for t in reversed(range(begin, stop)):
                before, S = states[t - begin], states[t - begin + 1]
                out = dy[row, start + t].to(real)
                G = G + p.q[t, :, :, None] * out[:, None, :]
                dq[row, start + t] = (S * out[:, None, :]).sum(2)
                dk[row, start + t] = (G * p.v[t, :, None, :]).sum(2)
                dv[row, start + t] = (G * p.k[t, :, :, None]).sum(1)
                dg[row, start + t] = (G * p.decays[t] * before).sum((1, 2))
                G = p.decays[t] * G
        dinitial.append(G)
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = (dg.sum((0, 1)) if log_decay.dim() == 1 else dg).to(log_decay.dtype)
    dq, dk = (grad.unflatten(2, (q.shape[2], heads // q.shape[2])).sum(3) for grad in (dq, dk))
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        dlog_decay,
        None if initial_state is None else torch.stack(dinitial).to(initial_state.dtype),
    )


def update(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """One step from `state` (batch, heads, d_k, d_v), which is overwritten; q, k, v (batch, heads, ...)."""
    if log_decay is not None and log_decay.dim() == 2:
        log_decay = log_decay[:, None]
    y, final = forward(q[:, None], k[:, None], v[:, None], log_decay, state, None)
    state.copy_(final)
    return y[:, 0]
