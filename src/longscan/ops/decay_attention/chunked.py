"""Outer-product recurrences with decay as matrix products over chunks of time: plain PyTorch, on every device.

Within a chunk of C steps, with D[i, j] = exp(g[j+1] + ... + g[i]) for j <= i and 0 above, p[i] = exp(g[1] + ... +
g[i]), e the last row of D, a the last entry of p, and S the state that enters:

    Y  = (Q K^T * D) V + (p * Q) S,        S' = a S + (e * K)^T V

so that time is walked a chunk at a time, and the rest are products of matrices. No quotient of decays is ever formed:
every exponent is a sum of numbers at most 0, so nothing overflows, and a step may forget everything (-inf).

Backward, with G the gradient of S':

    dA = (dY V^T) * D,   dQ = dA K + p * (dY S^T),   dK = dA^T Q + e * (V G^T),   dV = A^T dY + (e * K) G
    dS = a G + (p * Q)^T dY

Only the arguments are kept for it; states are computed again. Chunks are taken a stretch at a time, so that temporaries
stay small. Chunks grow with the state so that the states at their borders are no more numbers than q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops.checks import ACCUMULATION
from longscan.ops.packing import Rows, back_in_one_row, in_rows

# Entries of the largest temporary of a stretch: about a core's second-level cache, or enough to fill an accelerator.
_ENTRIES = {"cpu": 2**18}
_ENTRIES_ELSEWHERE = 2**25


def unsupported(*_: Tensor | None) -> str | None:
    """It serves every call."""
    return None


def chunk_length(d_k: int, d_v: int) -> int:
    """Steps of a chunk, a power of two: its d_k + d_v numbers a step leave room for a state of d_k d_v."""
    return 1 << (max(64, min(256, d_k * d_v // (d_k + d_v))) - 1).bit_length()


class _Stretch(NamedTuple):
    """Some whole chunks of every row in the accumulation dtype, (batch, heads, chunks, C, ...), and their decays.

    The decays are D, p, e and a of the module's docstring, or None where nothing decays. `shared` neighbouring heads
    have their q and k in common.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shared: int
    D: Tensor
    p: Tensor | None
    e: Tensor | None
    a: Tensor | None

    def scores(self) -> Tensor:
        """Q K^T, computed once for heads that share it."""
        once = self.q[:, :: self.shared] @ self.k[:, :: self.shared].transpose(-1, -2)
        return _for_heads(once, self.shared)

    def query_decayed(self) -> Tensor:
        return self.q if self.p is None else self.q * self.p[..., None]

    def key_decayed(self) -> Tensor:
        return self.k if self.e is None else self.k * self.e[..., None]

    def entering(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """The states before each chunk, (batch, heads, chunks, d_k, d_v), and the one after the last."""
        drive = self.key_decayed().transpose(-1, -2) @ self.v
        before = torch.empty_like(drive)
        for n in range(drive.shape[2]):
            before[:, :, n] = S
            S = drive[:, :, n] + (S if self.a is None else S * self._total(n))
        return before, S

    def leaving(self, drive: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """The same for gradients, backwards: of the states after each chunk, and of the one before the first."""
        after = torch.empty_like(drive)
        for n in reversed(range(drive.shape[2])):
            after[:, :, n] = G
            G = drive[:, :, n] + (G if self.a is None else G * self._total(n))
        return after, G

    def _total(self, n: int) -> Tensor:
        assert self.a is not None
        return self.a[:, :, n if self.a.shape[2] > 1 else 0, None, None]


def _for_heads(tensor: Tensor, shared: int) -> Tensor:
    """(batch, groups, ...) to (batch, heads, ...)."""
    return tensor if shared == 1 else tensor.repeat_interleave(shared, 1)


def _stretches(q: Tensor, v: Tensor, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, C) of stretches of whole chunks, and of what is left as one shorter chunk."""
    batch, length, heads, d_v = v.shape
    width = max(chunk, q.shape[3], d_v)
    entries = _ENTRIES.get(q.device.type, _ENTRIES_ELSEWHERE)
    step = chunk * max(1, entries // (batch * heads * chunk * width))
    whole = length - length % chunk
    for start in range(0, whole, step):
        yield start, min(start + step, whole), chunk
    if whole < length:
        yield whole, length, length - whole


def _cut(tensor: Tensor, where: tuple[int, int, int], real: torch.dtype) -> Tensor:
    """A stretch of (batch, length, heads, ...) as contiguous (batch, heads, chunks, C, ...) of dtype `real`."""
    start, end, C = where
    part = tensor[:, start:end].unflatten(1, ((end - start) // C, C))
    return part.movedim(3, 1).to(real).contiguous()


def _put(target: Tensor, where: tuple[int, int, int], values: Tensor) -> None:
    """The inverse of `_cut`, into `target`; where that has fewer heads, those that share one add up."""
    start, end, C = where
    if target.shape[2] < values.shape[1]:
        values = values.unflatten(1, (target.shape[2], -1)).sum(2)
    target[:, start:end].unflatten(1, ((end - start) // C, C)).copy_(values.movedim(1, 3))


def _decays(log_decay: Tensor | None, where: tuple[int, int, int], like: Tensor) -> tuple[Tensor, ...]:
    """D, p, e and a of a stretch, with axes of size 1 where they are the same for all."""
    C = where[2]
    if log_decay is None:
        return (torch.ones((C, C), dtype=like.dtype, device=like.device).tril(),)
    if log_decay.dim() == 1:
        steps = torch.arange(C, device=like.device, dtype=like.dtype)
        g = log_decay.to(like.dtype)[:, None, None]
        # 0 * -inf is no number, so a step of 0 is taken out of the product.
        gaps = steps[:, None] - steps
        D = torch.where(gaps > 0, torch.exp(g * gaps.clamp(min=1)), (gaps == 0).to(like.dtype))[None, :, None]
        p = torch.exp(g[..., 0] * (steps + 1))[None, :, None]
    else:
        g = _cut(log_decay, where, like.dtype)
        below = torch.ones((C, C), dtype=torch.bool, device=like.device).tril(-1)
        # Sums over j < m <= i, each from its own terms: differences of running sums would lose what is small.
        sums = g[..., None].expand(*g.shape, C).masked_fill(~below, 0.0).cumsum(-2)
        D = sums.exp_().tril_()
        p = g.cumsum(-1).exp()
    return D, p, D[..., -1, :], p[..., -1]


def _stretch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, where: tuple[int, int, int]) -> _Stretch:
    real = ACCUMULATION[q.dtype]
    shared = v.shape[2] // q.shape[2]
    q, k, v = (_cut(tensor, where, real) for tensor in (q, k, v))
    q, k = _for_heads(q, shared), _for_heads(k, shared)
    D, *rest = _decays(log_decay, where, q)
    return _Stretch(q, k, v, shared, D, *(rest or (None, None, None)))


def _forward_rows(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of one length: output in `dtype`, and final states from `S`."""
    y = torch.empty(v.shape, dtype=dtype, device=v.device)
    for where in _stretches(q, v, chunk_length(q.shape[3], v.shape[3])):
        part = _stretch(q, k, v, log_decay, where)
        before, S = part.entering(S)
        scores = part.scores().mul_(part.D)
        _put(y, where, (scores @ part.v).add_(part.query_decayed() @ before))
    return y, S


def _backward_rows(
    dy: Tensor, G: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor
) -> tuple[Any, ...]:
    """Gradients of q, k, v, of the log-decay of every step (None without decay), and of the state `S` that came in."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    dg = None if log_decay is None else torch.empty(v.shape[:3], dtype=S.dtype, device=q.device)
    places = list(_stretches(q, v, chunk_length(q.shape[3], v.shape[3])))
    borders = [S]
    for where in places[:-1]:
        borders.append(_stretch(q, k, v, log_decay, where).entering(borders[-1])[1])
    for where in reversed(places):
        part = _stretch(q, k, v, log_decay, where)
        before, _ = part.entering(borders.pop())
        out = _cut(dy, where, S.dtype)
        after, G_in = part.leaving(part.query_decayed().transpose(-1, -2) @ out, G)
        scores = part.scores()
        into_scores = (out @ part.v.transpose(-1, -2)).mul_(part.D)
        q_later = out @ before.transpose(-1, -2)
        k_later = part.v @ after.transpose(-1, -2)
        if part.p is not None:
            assert part.e is not None
            q_later.mul_(part.p[..., None])
            k_later.mul_(part.e[..., None])
        if dg is not None:
            _put(dg, where, _decay_gradient(part, scores * into_scores, q_later, k_later, before, after))
        _put(dq, where, q_later.add_(into_scores @ part.k))
        _put(dk, where, k_later.add_(into_scores.transpose(-1, -2) @ part.q))
        _put(dv, where, (scores.mul_(part.D).transpose(-1, -2) @ out).add_(part.key_decayed() @ after))
        G = G_in
    return dq, dk, dv, dg, G


def _decay_gradient(
    part: _Stretch, within: Tensor, q_later: Tensor, k_later: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """Gradient of each step's log-decay, (batch, heads, chunks, C): step m decays what passes from before m to m or on.

    `within` holds what each (i, j) of a chunk gives to the loss per unit of its log-decay; a step gets the sum over
    i >= m > j, of these terms themselves: sums of rows less sums of columns would lose it behind those of no gap.
    """
    assert part.a is not None
    pairs = F.pad(within.cumsum(-1).tril_(-1).sum(-2)[..., :-1], (1, 0))
    # What the entering state gives at i, decayed by all steps up to i; what j gives to the leaving state, decayed by
    # all steps after j.
    from_start, to_end = (part.q * q_later).sum(-1), (part.k * k_later).sum(-1)
    later = from_start.flip(-1).cumsum(-1).flip(-1)
    earlier = F.pad(to_end.cumsum(-1)[..., :-1], (1, 0))
    through = (before * after).sum((-1, -2)) * part.a
    return pairs.add_(later).add_(earlier).add_(through[..., None])


def _start(q: Tensor, v: Tensor, initial_state: Tensor | None, sequences: int) -> Tensor:
    real = ACCUMULATION[q.dtype]
    if initial_state is not None:
        return initial_state.to(real)
    return torch.zeros((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=real, device=q.device)


def _padded(rows: Rows, log_decay: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Packed tensors as padded rows whose pads change no state: zero keys and values, and no decay."""
    taken = [rows.take(tensor) * rows.real[..., None, None] for tensor in tensors]
    if log_decay is None:
        return taken, None
    own = log_decay.expand(*rows.real.shape, -1) if log_decay.dim() == 1 else rows.take(log_decay)
    return taken, own.masked_fill(~rows.real[..., None], 0.0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, heads, d_v) and final states, as the reference."""
    dtype = ACCUMULATION[v.dtype] if wide else v.dtype
    if cu_seqlens is None:
        return _forward_rows(q, k, v, log_decay, _start(q, v, initial_state, q.shape[0]), dtype)
    final = _start(q, v, initial_state, cu_seqlens.shape[0] - 1).clone()
    outputs = []
    for rows in in_rows(cu_seqlens, q.shape[1]):
        (q_rows, k_rows, v_rows), g_rows = _padded(rows, log_decay, q, k, v)
        y, final[rows.sequences] = _forward_rows(q_rows, k_rows, v_rows, g_rows, final[rows.sequences], dtype)
        outputs.append((rows, y))
    return back_in_one_row(outputs), final


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
    """Gradients of q, k, v, log_decay and initial_state (None where the argument is None), as the reference."""
    G = dfinal.to(ACCUMULATION[q.dtype])
    if cu_seqlens is None:
        S = _start(q, v, initial_state, q.shape[0])
        *grads, dg, G = _backward_rows(dy, G, q, k, v, log_decay, S)
    else:
        S = _start(q, v, initial_state, cu_seqlens.shape[0] - 1)
        G = G.clone()
        batches = []
        for rows in in_rows(cu_seqlens, q.shape[1]):
            (dy_rows, q_rows, k_rows, v_rows), g_rows = _padded(rows, log_decay, dy, q, k, v)
            own = _backward_rows(dy_rows, G[rows.sequences], q_rows, k_rows, v_rows, g_rows, S[rows.sequences])
            G[rows.sequences] = own[4]
            batches.append((rows, own))
        grads = [back_in_one_row([(rows, own[i]) for rows, own in batches]) for i in range(3)]
        dg = None if log_decay is None else back_in_one_row([(rows, own[3]) for rows, own in batches])
    if log_decay is not None:
        dg = (dg.sum((0, 1)) if log_decay.dim() == 1 else dg).to(log_decay.dtype)
    return *grads, dg, None if initial_state is None else G.to(initial_state.dtype)


def update(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """One step from `state` (batch, heads, d_k, d_v), which is overwritten; q, k, v (batch, heads, ...)."""
    q, k, v = (tensor.to(state.dtype) for tensor in (q, k, v))
    q, k = (_for_heads(tensor, state.shape[1] // q.shape[1]) for tensor in (q, k))
    if log_decay is not None:
        state.mul_(log_decay.to(state.dtype).exp()[..., None, None])
    state.add_(k[..., None] * v[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2)
