"""Recurrences that no product joins, over parts of a sequence: one process walks after another.

Time is that of one process walking everything, less what lies between: layers cannot overlap within one sequence. What
is divided is memory. Each process sends its state forward, and its gradient back, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.nn.mixer import SequenceMixer
from longscan.nn.sequence_parallel import Leaving, SequencePart, alone, current_part, uncompiled


@uncompiled
def relay(mixer: SequenceMixer, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``mixer(x)`` of this process's part x (batch, part, d_model), once the process before is through with its own.

    The mixer's state must be of a fixed size. ``cu_seqlens`` are offsets in the whole row.
    """
    part = current_part()
    assert part is not None
    segments = part.segments(x, cu_seqlens)
    with alone():
        fresh = mixer.initial_state(segments.rows)
        cut = segments.broken(part.start, part.start + 1)
        packed = segments.cu_seqlens is not None
        first = fresh.select([0]) if packed else fresh
        before = iter(_Receive.apply(part, cut, first.tensors(), x, *mixer.parameters()))
        state = fresh.map(lambda tensor: segments.rows_of(next(before), tensor[:1]))
        y, after = mixer(x, state, cu_seqlens=segments.cu_seqlens)
        assert after is not None
        last = after.select([segments.rows - 1]) if packed else after
        out: Tensor = _Send.apply(part, y, *last.tensors())
        return out


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: SequencePart, cut: bool, fresh: list[Tensor], *sources: Tensor) -> Leaving:
        # What has no part in the result but a gradient of its own: it brings the backward pass here.
        ctx.sources = len(sources)
        ctx.part, ctx.cut, ctx.floating = part, cut, [tensor.is_floating_point() for tensor in fresh]
        received = part.exchange(tuple(fresh), part.size, part.rank - 1)
        entering = tuple(tensor.clone() for tensor in fresh) if cut else received
        ctx.mark_non_differentiable(*(tensor for tensor in entering if not tensor.is_floating_point()))
        return entering

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        back = tuple(
            torch.zeros_like(gradient) if ctx.cut else gradient
            for gradient, floating in zip(gradients, ctx.floating, strict=True)
            if floating
        )
        ctx.part.exchange(back, ctx.part.rank - 1, ctx.part.size)
        return (None,) * (3 + ctx.sources)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: SequencePart, y: Tensor, *last: Tensor) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(y, *last)
        part.exchange(last, part.rank + 1, part.size)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # Under checkpointing this walks forward again, in all processes, before any waits for the next one's gradient.
        _, *last = ctx.saved_tensors
        floating = tuple(tensor for tensor in last if tensor.is_floating_point())
        received = iter(ctx.part.exchange(floating, ctx.part.size, ctx.part.rank + 1))
        back = (next(received) if tensor.is_floating_point() else None for tensor in last)
        return None, gradient, *back
