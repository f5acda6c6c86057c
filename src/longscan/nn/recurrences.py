"""The recurrent operators as mixers call them: each over this process's part, within sequence_parallel.

Outside it they are those of :mod:`longscan.ops`, argument for argument. Inside, ``cu_seqlens`` are offsets in the whole
row, no initial state is taken, and the final state is that of this part. A recurrence runs twice: from an empty past
for what leaves the part, and from what enters. Of the whole length nothing more is kept for the backward pass than
without, since both take the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longscan import ops
from longscan.errors import ArgumentError
from longscan.nn.sequence_parallel import Leaving, Segments, SequencePart, current_part
from longscan.ops.checks import ACCUMULATION, activation_dtype

__all__ = ["causal_conv1d", "decay_attention", "linear_scan", "selective_scan"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.causal_conv1d`; what crosses is the last width - 1 inputs."""
    part = current_part()
    if part is None:
        return ops.causal_conv1d(x, weight, bias, initial_state, cu_seqlens=cu_seqlens, **options)
    _check_fresh(initial_state)
    segments = part.segments(x, cu_seqlens)
    before = part.border(x, weight.shape[1] - 1, segments) if weight.shape[1] > 1 else None
    initial = None if before is None else segments.rows_of(before, torch.zeros_like(before))
    return ops.causal_conv1d(x, weight, bias, initial, cu_seqlens=segments.cu_seqlens, **options)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.selective_scan`; what crosses is the state and exp(A sum dt), (batch, channels, N) each."""
    scan: dict[str, Any] = {"dt_softplus": dt_softplus}
    part = current_part()
    if part is None:
        return ops.selective_scan(
            x, dt, A, B, C, D, z, dt_bias, initial_state, **scan, cu_seqlens=cu_seqlens, **options
        )
    _check_fresh(initial_state)
    segments = part.segments(x, cu_seqlens)
    scan["cu_seqlens"] = segments.cu_seqlens
    _, last = ops.selective_scan(x, dt, A, B, C, None, None, dt_bias, None, **scan, return_final_state=True)
    # Computed again in the backward pass: dt in float32 would be kept for it.
    total = checkpoint(_total_step, dt, dt_bias, dt_softplus, use_reentrant=False)
    entering = _entering(part, torch.exp(A.to(last.dtype) * total[..., None]), last, segments)
    return ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, entering, **scan, **options)


def _total_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The sum of the steps over time, (batch, channels)."""
    wide = dt.to(ACCUMULATION[activation_dtype(dt)])
    wide = wide if bias is None else wide + bias
    return (F.softplus(wide) if softplus else wide).sum(1)


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.linear_scan`; what crosses is the state and the product of a, (batch, channels) each."""
    part = current_part()
    if part is None:
        return ops.linear_scan(a, b, initial_state, cu_seqlens=cu_seqlens, **options)
    _check_fresh(initial_state)
    segments = part.segments(b, cu_seqlens)
    _, last = ops.linear_scan(a, b, cu_seqlens=segments.cu_seqlens, return_final_state=True)
    steps = a.reshape((1,) * (3 - a.dim()) + tuple(a.shape)).to(last.dtype)
    decay = steps[:, 0] ** b.shape[1] if steps.shape[1] == 1 else steps.prod(1)
    entering = _entering(part, decay.expand(b.shape[0], b.shape[2]), last, segments)
    return ops.linear_scan(a, b, entering, cu_seqlens=segments.cu_seqlens, **options)


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    normalise: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.decay_attention`; what crosses is the state and one decay a head."""
    part = current_part()
    if part is None:
        return ops.decay_attention(
            q, k, v, log_decay, initial_state, normalise=normalise, cu_seqlens=cu_seqlens, **options
        )
    _check_fresh(initial_state)
    segments = part.segments(q, cu_seqlens)
    call: dict[str, Any] = {"normalise": normalise, "cu_seqlens": segments.cu_seqlens}
    _, last = ops.decay_attention(q, k, v, log_decay, **call, return_final_state=True)
    batch, length, heads = v.shape[:3]
    if log_decay is None:
        total = last.new_zeros(batch, heads)
    else:
        wide = log_decay.to(last.dtype)
        total = (wide * length).expand(batch, heads) if wide.dim() == 1 else wide.sum(1)
    entering = _entering(part, torch.exp(total)[..., None, None], last, segments)
    return ops.decay_attention(q, k, v, log_decay, entering, **call, **options)


def _entering(part: SequencePart, decay: Tensor, last: Tensor, segments: Segments) -> Tensor:
    """Every row's initial state, of the decay over the part (batch, ...) and the rows' states after it."""
    own = last if segments.cu_seqlens is None else last[-1:]
    nothing = torch.ones_like(decay), torch.zeros_like(own)
    _, before = part.entering((decay, own), _in_a_row, nothing, segments)
    return segments.rows_of(before, nothing[1])


def _in_a_row(earlier: Leaving, later: Leaving, steps: int) -> Leaving:
    (fade, state), (own_fade, own_state) = earlier, later
    return own_fade * fade, own_fade * state + own_state


def time_invariant(
    part: SequencePart,
    x: Tensor,
    cu_seqlens: Tensor | None,
    leave: Callable[[Tensor], Tensor],
    advance: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The initial states and the local offsets of a linear system that is the same at every step.

    Args:
        part, x, cu_seqlens: the process's part, its input (batch, part, channels), and offsets in the whole row.
        leave: the state after an input (batch, any length, channels) from an empty past.
        advance: what becomes of a state over so many steps without input. Only states cross between processes.

    Returns:
        The state of every row of x (with offsets: of every sequence of the part), and the part's offsets.
    """
    segments = part.segments(x, cu_seqlens)
    own = leave(x[:, segments.last :])
    nothing = torch.zeros_like(own)

    def join(earlier: Leaving, later: Leaving, steps: int) -> Leaving:
        return (advance(earlier[0], steps) + later[0],)

    (before,) = part.entering((own,), join, (nothing,), segments)
    return segments.rows_of(before, nothing), segments.cu_seqlens


def _check_fresh(initial_state: Tensor | None) -> None:
    if initial_state is not None:
        raise ArgumentError("initial_state: within sequence_parallel it comes from the process before; pass None")
