"""Outer-product recurrences with decay: linear attention, retention and their kin, in chunks and one step at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import (
    ACCUMULATION,
    activation_dtype,
    check_floating,
    check_shape,
    check_tensors,
    prepare_cu_seqlens,
)
from longscan.ops.decay_attention import library

__all__ = ["decay_attention", "decay_attention_update"]


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention whose memory is one matrix a head: outer products of keys and values, fading with time.

    .. math::
        S_t = e^{g_t} S_{t-1} + k_t v_t^\top, \qquad y_t = S_t^\top q_t = \sum_{s \le t} e^{g_{s+1} + \dots + g_t}
        (q_t \cdot k_s)\, v_s

    and with `normalise` :math:`y_t / (q_t \cdot z_t + \epsilon)`, where :math:`z_t = e^{g_t} z_{t-1} + k_t`.
    Katharopoulos et al. 2020 (arXiv 2006.16236), equations 16-20, without decay; Sun et al. 2023 (arXiv 2307.08621),
    equations 5-7, with one decay a head; Dao and Gu 2024 (arXiv 2405.21060) with one a step.

    Args:
        q, k: (batch, length, heads, d_k), float32, bfloat16, float16 or float64. Scale q beforehand, if wanted. Or of
            fewer heads, whose number divides that of v: head h of v goes with head h // (heads / their number), as with
            Mamba-2's groups.
        v: (batch, length, heads, d_v).
        log_decay: g, at most 0: (heads,) constant in time, or (batch, length, heads); None for no decay. -inf forgets
            everything that came before the step.
        initial_state: (batch, heads, d_k, d_v); with `cu_seqlens` (num_sequences, heads, d_k, d_v). Zero when None.
            With `normalise` d_v + 1 in place of d_v: z is its last column.
        normalise: divide by the sum of the weights. For keys and queries of which all products are positive.
        eps: added to that sum.
        cu_seqlens: (num_sequences + 1,) integers, 0 first, `length` last, never decreasing: the sequences packed in
            the one row of a batch of 1. No state leaks over a border. A sequence of length 0 keeps its initial state.
        return_final_state: also return the state after the last step.
        backend: "auto" (None), "triton", "chunked" or "reference"; a name never falls back to another.

    Returns:
        y (batch, length, heads, d_v) in v's dtype; with `return_final_state` also the state, shaped like
        `initial_state`, float32 whatever the inputs are (float64 for float64). Both carry gradients.

    Precision: q, k and v of unlike dtypes are promoted to a common one, under autocast to autocast's; the log-decay,
    the state and all sums are float32, or float64 for float64 inputs. Every exponent is a sum of numbers at most 0.

    Cost: with chunks of C steps, of order length (C + d_k) (d_v + d_k) operations a head and memory of order length.
    What is kept for the backward pass is the arguments alone. NaN or infinity at one step reaches the outputs of its
    own chunk, earlier ones included ("reference": later ones only), never another sequence's.

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
        BackendError: the backend asked for cannot serve the call.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ArgumentError(f"q: got shape {tuple(q.shape)}, expected (batch, length, heads, d_k), each at least 1")
    heads = _check_vectors(q, k, v, "batch, length, heads")
    batch, length, _, d_k = q.shape
    if log_decay is not None:
        check_floating("log_decay", log_decay)
        if log_decay.dim() == 1:
            check_shape("log_decay", log_decay, (heads,), "(heads,)")
        else:
            check_shape("log_decay", log_decay, (batch, length, heads), "(batch, length, heads), or (heads,)")
    check_tensors(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    sequences = batch
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, batch, q.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, sequences, heads, d_k, v.shape[3], normalise)

    y_dtype = v.dtype
    q, k, v, log_decay, initial_state = _promote(q, k, v, log_decay, initial_state, normalise)
    y, final = library.decay_attention(
        q, k, v, log_decay, initial_state, cu_seqlens, normalise, backends.requested(backend)
    )
    y = (_normalised(y, eps) if normalise else y).to(y_dtype)
    return (y, final) if return_final_state else y


def decay_attention_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    normalise: bool = False,
    eps: float = 1e-6,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `decay_attention`: the recurrence that generation walks.

    Args:
        state: (batch, heads, d_k, d_v), float32; with `normalise` d_v + 1 in place of d_v.
        q, k: (batch, heads, d_k), or of fewer heads, as in `decay_attention`.
        v: (batch, heads, d_v).
        log_decay: (heads,), (batch, heads) or None.
        normalise, eps, backend: as in `decay_attention`.
        inplace: overwrite `state` instead of returning a fresh one; not while gradients are recorded.

    Returns:
        (y, state): y (batch, heads, d_v) in v's dtype, and the new state (`state` itself with `inplace`). Without
        `inplace` both carry gradients.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or `inplace` where a gradient would be lost.
        BackendError: the backend asked for cannot serve the call.
    """
    if q.dim() != 3 or 0 in q.shape:
        raise ArgumentError(f"q: got shape {tuple(q.shape)}, expected (batch, heads, d_k), each at least 1")
    heads = _check_vectors(q, k, v, "batch, heads")
    batch, _, d_k = q.shape
    if log_decay is not None:
        check_floating("log_decay", log_decay)
        if log_decay.dim() == 1:
            check_shape("log_decay", log_decay, (heads,), "(heads,)")
        else:
            check_shape("log_decay", log_decay, (batch, heads), "(batch, heads), or (heads,)")
    _check_state("state", state, batch, heads, d_k, v.shape[2], normalise)
    check_tensors(q=q, state=state, k=k, v=v, log_decay=log_decay)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (state, q, k, v, log_decay)):
        if inplace:
            raise ArgumentError(
                "inplace: a gradient is recorded through the state; use inplace=False or torch.no_grad()"
            )
        over_time = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, None]
        out = decay_attention(
            q[:, None], k[:, None], v[:, None], over_time, state,
            normalise=normalise, eps=eps, return_final_state=True, backend=backend,
        )  # fmt: skip
        assert isinstance(out, tuple)
        return out[0][:, 0], out[1]

    y_dtype = v.dtype
    q, k, v, log_decay, promoted = _promote(q, k, v, log_decay, state, normalise)
    assert promoted is not None
    if inplace and promoted.dtype != state.dtype:
        raise ArgumentError(f"state: got {state.dtype}, expected {promoted.dtype} to be updated in place")
    if not inplace:
        promoted = promoted.clone(memory_format=torch.contiguous_format)
    y = library.decay_attention_update_(promoted, q, k, v, log_decay, backends.requested(backend))
    return (_normalised(y, eps) if normalise else y).to(y_dtype), promoted


def _check_vectors(q: Tensor, k: Tensor, v: Tensor, names: str) -> int:
    """The number of v's heads."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
    check_shape("k", k, tuple(q.shape), f"({names}, d_k) as q")
    if v.dim() != q.dim() or v.shape[-1] < 1:
        raise ArgumentError(f"v: got shape {tuple(v.shape)}, expected ({names}, d_v), each at least 1")
    heads = v.shape[-2] if v.shape[-2] and v.shape[-2] % q.shape[-2] == 0 else q.shape[-2]
    check_shape(
        "v", v, (*q.shape[:-2], heads, v.shape[-1]), f"({names}, d_v), with as many heads as q and k, or a multiple"
    )
    return heads


def _check_state(name: str, state: Tensor, sequences: int, heads: int, d_k: int, d_v: int, normalise: bool) -> None:
    check_floating(name, state)
    width, meaning = (d_v + 1, "d_v + 1, the last column for the normaliser") if normalise else (d_v, "d_v")
    check_shape(name, state, (sequences, heads, d_k, width), f"(sequences, heads, d_k, {meaning})")


def _promote(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k and v in one dtype, the rest in that of the sums; the normaliser as one more column of values, all ones."""
    dtype = activation_dtype(q, k, v)
    real = ACCUMULATION[dtype]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)
    return (
        q,
        k,
        v,
        None if log_decay is None else log_decay.to(real),
        None if state is None else state.to(real),
    )


def _normalised(y: Tensor, eps: float) -> Tensor:
    return y[..., :-1] / (y[..., -1:] + eps)
