"""The recurrent operators as mixers call them: each over this process's part, within sequence_parallel.

Outside it they are those of :mod:`longscan.ops`, argument for argument. Inside, ``cu_seqlens`` are offsets in the whole
row, no initial state is taken, and the final state is that of this part. First comes what leaves the part from an empty
past: for scans another run, for attention with decay one product of matrices. Then the recurrence runs from what
enters. On the way back likewise: first the gradient of what entered, by this part alone, then, from the gradient of
what leaves, the one backward pass (:func:`longscan.nn.sequence_parallel.met`). Nothing more is kept for it than
without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan import ops
from longscan.errors import ArgumentError
from longscan.nn.sequence_parallel import Leaving, Segments, SequencePart, current_part, met
from longscan.ops.checks import ACCUMULATION, activation_dtype

__all__ = ["causal_conv1d", "decay_attention", "linear_scan", "selective_scan"]

# A step that fades nothing, by which one can divide.
_NO_STEP = 1e-20


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
    return_final_state: bool = False,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.selective_scan`; what crosses is the state and exp(A sum dt), (batch, channels, N) each."""
    scan: dict[str, Any] = {"dt_softplus": dt_softplus, "cu_seqlens": cu_seqlens}
    part = current_part()
    if part is None:
        options["return_final_state"] = return_final_state
        return ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, **scan, **options)
    _check_fresh(initial_state)
    segments = part.segments(x, cu_seqlens)
    scan |= {"cu_seqlens": segments.cu_seqlens, "return_final_state": True}
    with torch.no_grad():
        _, last = ops.selective_scan(x, dt, A, B, C, None, None, dt_bias, None, **scan)
        total = _steps(dt, dt_bias, dt_softplus).sum(1)
        entering = _entering(part, torch.exp(A.to(last.dtype) * total[..., None]), last, segments)

    def enter(
        dy: Tensor, dlast: Tensor, dt: Tensor, A: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None
    ) -> Leaving:
        """The scan of gradients, from the last token of the first sequence to its first."""
        own, A = slice(None, segments.first), A.to(dlast.dtype).conj().resolve_conj()
        steps = _steps(dt[:, own], dt_bias, dt_softplus)
        driven = dy[:, own].to(steps.dtype) * (2 if A.is_complex() else 1)
        driven = driven if z is None else driven * F.silu(z[:, own].to(steps.dtype))
        # A token's gradient reaches the one before by its own step. The operator multiplies its input with the step.
        later = F.pad(steps[:, 1:], (0, 0, 0, 1)).flip(1)
        later = torch.where(later.abs() < _NO_STEP, _NO_STEP, later)
        C = (C if C.dim() == 2 else C[:, own].flip(1)).conj().resolve_conj()
        _, first = ops.selective_scan(
            driven.flip(1) / later, later, A, C, C, initial_state=dlast[: len(dy)], return_final_state=True
        )
        return torch.exp(A * steps.sum(1)[..., None]), torch.exp(A * steps[:, 0, :, None]) * first

    y, last = ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, entering, **scan, **options)
    y, last = met(part, segments, enter, y, last, (dt, A, C, z, dt_bias))
    return (y, last) if return_final_state else y


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The steps as the scan takes them, in the precision of sums."""
    wide = dt.to(ACCUMULATION[activation_dtype(dt)])
    wide = wide if bias is None else wide + bias
    return F.softplus(wide) if softplus else wide


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.linear_scan`; what crosses is the state and the product of a, (batch, channels) each."""
    part = current_part()
    if part is None:
        return ops.linear_scan(
            a, b, initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state, **options
        )
    _check_fresh(initial_state)
    segments = part.segments(b, cu_seqlens)
    steps = a.reshape((1,) * (3 - a.dim()) + tuple(a.shape))
    with torch.no_grad():
        own = slice(segments.last, None)
        _, last = ops.linear_scan(_over_time(steps, own), b[:, own], return_final_state=True)
        entering = _entering(part, _product(steps, b).to(last.dtype), last, segments)

    def enter(dy: Tensor, dlast: Tensor, steps: Tensor, b: Tensor) -> Leaving:
        """The scan of gradients, from the last token of the first sequence to its first."""
        own = slice(None, segments.first)
        fade = _over_time(steps, own).conj()
        gradients = dy[:, own].to(dlast.dtype).flip(1)
        gradients[:, 0] += dlast[: len(b)]
        # A token's gradient reaches the one before by its own decay.
        later = fade if fade.shape[1] == 1 else torch.cat((fade[:, :1], fade[:, 1:].flip(1)), dim=1)
        _, first = ops.linear_scan(later.resolve_conj(), gradients, return_final_state=True)
        decay = _product(_over_time(steps, own), b[:, own])
        return decay.conj().resolve_conj().to(first.dtype), first * fade[:, 0]

    h, last = ops.linear_scan(steps, b, entering, cu_seqlens=segments.cu_seqlens, return_final_state=True, **options)
    h, last = met(part, segments, enter, h, last, (steps, b))
    return (h, last) if return_final_state else h


def _over_time(steps: Tensor, own: slice) -> Tensor:
    """Of decays (batch or 1, length or 1, channels), some tokens' own."""
    return steps if steps.shape[1] == 1 else steps[:, own]


def _product(steps: Tensor, b: Tensor) -> Tensor:
    """The decay over all tokens of b, (batch, channels)."""
    wide = steps.to(torch.promote_types(steps.dtype, torch.float32))
    decay = wide[:, 0] ** b.shape[1] if steps.shape[1] == 1 else wide.prod(1)
    return decay.expand(b.shape[0], b.shape[2])


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    normalise: bool = False,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    **options: Any,
) -> Any:
    """:func:`longscan.ops.decay_attention`; what crosses is the state and one decay a head.

    What a part leaves is one product of its keys and values, each faded by what follows; and the gradient of what
    enters is one of queries and gradients.
    """
    part = current_part()
    options["return_final_state"] = return_final_state
    if part is None:
        return ops.decay_attention(
            q, k, v, log_decay, initial_state, normalise=normalise, eps=eps, cu_seqlens=cu_seqlens, **options
        )
    _check_fresh(initial_state)
    segments = part.segments(q, cu_seqlens)
    # The normaliser is one more column of values here: what comes back is its gradient too.
    values = F.pad(v, (0, 1), value=1.0) if normalise else v
    with torch.no_grad():
        own, fades = slice(segments.last, None), _log_fades(log_decay, v)
        after = F.pad(fades[:, segments.last + 1 :], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        last = _outer_sum(k[:, own], values[:, own], after)
        entering = _entering(part, fades.sum(1).exp()[..., None, None], last, segments)

    def enter(dy: Tensor, dlast: Tensor, q: Tensor, log_decay: Tensor | None) -> Leaving:
        own = slice(None, segments.first)
        until = _log_fades(log_decay, dy)[:, own].cumsum(1)
        decay = until[:, -1].exp()[..., None, None]
        return decay, _outer_sum(q[:, own], dy[:, own], until) + decay * dlast[: len(q)]

    options |= {"cu_seqlens": segments.cu_seqlens, "return_final_state": True}
    y, last = ops.decay_attention(q, k, values, log_decay, entering, **options)
    y, last = met(part, segments, enter, y, last, (q, log_decay))
    y = y[..., :-1] / (y[..., -1:] + eps) if normalise else y
    return (y, last) if return_final_state else y


def _log_fades(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """The logarithm of the decay at every step, (batch, length, heads), in the precision of sums."""
    dtype = ACCUMULATION[activation_dtype(v)]
    if log_decay is None:
        return v.new_zeros(v.shape[:3], dtype=dtype)
    return log_decay.to(dtype).expand(v.shape[:3])


def _outer_sum(k: Tensor, v: Tensor, log_weights: Tensor) -> Tensor:
    """The sum over time of weighted outer products, (batch, heads, d_k, d_v); k may be of fewer heads."""
    with torch.autocast(k.device.type, enabled=False):
        weighted = v.to(log_weights.dtype) * log_weights.exp()[..., None]
        shared = weighted.unflatten(2, (k.shape[2], -1))
        return torch.einsum("blgk,blgrv->bgrkv", k.to(weighted.dtype), shared).flatten(1, 2)


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
