"""Forward and backward passes around any function that scans rows: what the backends in plain PyTorch share.

Backward, with g[t] the gradient of h[t], all later uses of it included, is the same recurrence walked from the end:

    g[t] = dh[t] + conj(a[t+1]) g[t+1],   db[t] = g[t],   da[t] = g[t] conj(h[t-1])
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION

#: h of a, b (rows, length, channels) and the state before (rows, channels), all in the dtype of the sums.
Scan = Callable[[Tensor, Tensor, Tensor], Tensor]


def accumulation(tensor: Tensor) -> torch.dtype:
    """The dtype of the sums."""
    return tensor.dtype if tensor.is_complex() else ACCUMULATION[tensor.dtype]


def gradient_dtype(a: Tensor, h: Tensor) -> torch.dtype:
    """Of the gradient of a at every step: that of the sums where steps, rows or channels are still to be added up."""
    return a.dtype if a.shape == h.shape else accumulation(h)


def _parts(b: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """What is scanned together, as (states, steps): all rows of a batch, or one packed sequence."""
    if cu_seqlens is None:
        return [(slice(0, b.shape[0]), slice(0, b.shape[1]))]
    return [
        (slice(i, i + 1), slice(start, end))
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist()))
        if start < end
    ]


def _before(b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    sequences = b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return b.new_zeros((sequences, b.shape[2]), dtype=accumulation(b))


def forward(
    scan: Scan, a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h in b's dtype, and the final states in that of the sums."""
    before, dtype = _before(b, initial_state, cu_seqlens), accumulation(b)
    outputs, final = [b.new_empty((b.shape[0], 0, b.shape[2]))], before.clone()
    a = a.expand(b.shape)
    for states, steps in _parts(b, cu_seqlens):
        h = scan(a[:, steps].to(dtype), b[:, steps].to(dtype), before[states])
        final[states] = h[:, -1]
        outputs.append(h.to(b.dtype))
    return torch.cat(outputs, 1), final


def backward(
    scan: Scan,
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a at every step, (batch, length, channels), of b, and of the initial states."""
    before, dtype = _before(h, initial_state, cu_seqlens), accumulation(h)
    da, db, dbefore = h.new_empty(h.shape, dtype=gradient_dtype(a, h)), torch.empty_like(h), dfinal.to(dtype).clone()
    a = a.expand(h.shape)
    for states, steps in _parts(h, cu_seqlens):
        decay = a[:, steps].to(dtype).conj()
        # The last state is what the call returns: its gradient enters with a decay of 1.
        shifted = torch.cat((decay[:, 1:], torch.ones_like(decay[:, :1])), 1)
        g = scan(shifted.flip(1), dh[:, steps].to(dtype).flip(1), dbefore[states]).flip(1)
        earlier = torch.cat((before[states, None], h[:, steps][:, :-1].to(dtype)), 1)
        da[:, steps] = (g * earlier.conj()).to(da.dtype)
        db[:, steps] = g.to(db.dtype)
        dbefore[states] = decay[:, 0] * g[:, 0]
    return da, db, dbefore
