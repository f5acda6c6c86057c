r"""One sequence over several processes: each has a stretch of it, and they exchange nothing but states.

A linear recurrence leaves, after a stretch, what it would leave from an empty past plus what entered, faded:

.. math::
    h_{end} = a \, h_{enter} + b, \qquad (a_1, b_1) \cdot (a_2, b_2) = (a_2 a_1,\; a_2 b_1 + b_2)

The product is associative (Blelloch 1990, section 1.4.1), so that what enters every stretch is found in
ceil(log2 P) + 1 exchanges between P processes, each of a state and its decay, whatever the length. Every process first
runs its stretch from an empty past for its b, then from what enters. Gradients of states obey the same law backward in
time, g_enter = a g_end + g: autograd takes the same way back, or :func:`met` does, with which no gradient is taken
through the first run.

Within :func:`sequence_parallel` mixers find the processes by themselves. What a mixer is made of decides what it does:
the operators of :mod:`longscan.nn.recurrences` do everything (a mixer that is built on them has nothing to add);
time-invariant systems and others with an associative law call :meth:`SequencePart.entering`; nonlinear recurrences walk
one process after another, :func:`longscan.nn.relay.relay`; attention hands its keys and values on.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.errors import ArgumentError
from longscan.ops.checks import check_offsets

#: What leaves a stretch: tensors, each with the sequences along axis 0.
Leaving = tuple[Tensor, ...]

T = TypeVar("T", bound=Callable[..., Any])


def uncompiled(function: T) -> T:
    """What a compiler leaves as it is: it does not trace exchanges, and breaks its graphs there."""
    # As torch.compiler.disable, but the compiler (a second's import) is not loaded before the function is called.
    left: Any = torch._disable_dynamo(function)
    return left


@dataclasses.dataclass
class Traffic:
    """What this process sent: bytes, and messages."""

    bytes: int = 0
    messages: int = 0


@dataclasses.dataclass(frozen=True)
class Segments:
    """The sequences that one process sees of a batch or of a packed row.

    Attributes:
        cu_seqlens: their offsets within this process's part; None without packing.
        rows: how many states there are here: the batch, or the sequences of the part.
        first, last: where in the part the first of them ends, and the last begins or goes on.
        starts: where all sequences begin, in the whole row, ascending.
    """

    cu_seqlens: Tensor | None
    rows: int
    first: int
    last: int
    starts: tuple[int, ...]

    @uncompiled
    def broken(self, first: int, end: int) -> bool:
        """Whether a sequence begins at a token of ``first .. end - 1``, so that nothing passes from before to after."""
        return bisect.bisect_left(self.starts, first) < bisect.bisect_left(self.starts, end)

    @uncompiled
    def begin(self, position: int) -> int:
        """Where the sequence began in which a token of the whole row lies."""
        return self.starts[bisect.bisect_right(self.starts, position) - 1]

    def rows_of(self, entering: Tensor, nothing: Tensor) -> Tensor:
        """The initial state of every row: what enters the first, and nothing the others, of a packed row."""
        if self.cu_seqlens is None or self.rows == 1:
            return entering
        return torch.cat((entering, nothing.expand(self.rows - 1, *nothing.shape[1:])))


class SequencePart:
    """The part of every sequence that this process has, and its way to the others.

    Attributes:
        rank, size: which of how many processes.
        length: of the whole sequence.
        start, end: the part, ``start .. end - 1``. Parts are as equal as can be.
        traffic: what this process has sent, forward and backward.
    """

    def __init__(self, group: dist.ProcessGroup | None, length: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ArgumentError("group: this process is not one of it")
        if length < self.size:
            raise ArgumentError(f"length: got {length}, fewer tokens than the {self.size} processes of the group")
        self.length = length
        self.bounds = [length * rank // self.size for rank in range(self.size + 1)]
        self.start, self.end = self.bounds[self.rank], self.bounds[self.rank + 1]
        self.traffic = Traffic()
        self._seen: tuple[Tensor, list[int]] | None = None

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a tensor that has the whole length along ``dim``."""
        if whole.shape[dim] != self.length:
            raise ArgumentError(f"whole: got length {whole.shape[dim]} along axis {dim}, expected {self.length}")
        return whole.narrow(dim, self.start, self.end - self.start)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, without gradient: the loss to report."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group)
        return value / self.size

    @uncompiled
    def segments(self, x: Tensor, cu_seqlens: Tensor | None) -> Segments:
        """What x (batch, part, ...) holds; ``cu_seqlens`` are offsets in the whole row, the same in all processes.

        Raises:
            ArgumentError: x is not of this part's length, or the offsets do not span the whole row.
        """
        own = self.end - self.start
        if x.shape[1] != own:
            raise ArgumentError(
                f"x: has {x.shape[1]} tokens; process {self.rank} of {self.size} has {own} of a sequence of "
                f"{self.length}, {self.start} to {self.end - 1}: take them with part.take"
            )
        if cu_seqlens is None:
            return Segments(None, x.shape[0], own, 0, (0,))
        if self._seen is None or self._seen[0] is not cu_seqlens:
            # Every layer asks; looking at values on a GPU waits for it.
            offsets = cu_seqlens.to("cpu")
            check_offsets(offsets, self.length)
            self._seen = cu_seqlens, [start for start, end in pairwise(offsets.tolist()) if end > start]
        starts = self._seen[1]
        inside = starts[bisect.bisect_right(starts, self.start) : bisect.bisect_left(starts, self.end)]
        local = [0, *(start - self.start for start in inside), own]
        return Segments(
            torch.tensor(local, dtype=cu_seqlens.dtype, device=cu_seqlens.device),
            len(local) - 1,
            local[1],
            local[-2],
            tuple(starts),
        )

    def entering(
        self,
        leaving: Leaving,
        join: Callable[[Leaving, Leaving, int], Leaving],
        nothing: Leaving,
        segments: Segments,
    ) -> Leaving:
        """What enters this part from those before it.

        Args:
            leaving: what leaves this part's last sequence (all rows, of a batch) if nothing enters.
            join: what leaves two stretches in a row, of what leaves the earlier one, what leaves the later one if
                nothing enters, and the tokens of the later one. Associative; ``nothing`` changes nothing.
            nothing: an empty past, of the same shapes.
            segments: of this part.
        """
        distance = 1
        while distance < self.size:
            first = self.bounds[max(self.rank - distance + 1, 0)]
            earlier = self.shift(leaving, distance, nothing, segments.broken(first, self.end))
            leaving = join(earlier, leaving, self.end - first)
            distance *= 2
        return self.neighbour(leaving, nothing, segments)

    def neighbour(self, leaving: Leaving, nothing: Leaving, segments: Segments) -> Leaving:
        """What left the part before, whatever had entered that one: the border of a short convolution."""
        return self.shift(leaving, 1, nothing, segments.broken(self.start, self.start + 1))

    def returning(self, own: Leaving, nothing: Leaving, segments: Segments) -> Tensor:
        """The gradient of the state that leaves this part, from those after it. No gradient passes through this.

        Args:
            own: the decay over this part's first sequence, and the gradient of the state that enters it, by this part
                alone.
            nothing: a decay and a gradient that change nothing.
            segments: of this part.
        """
        if segments.broken(self.start, self.start + 1):
            own = nothing
        distance = 1
        while distance < self.size:
            end = self.bounds[min(self.rank + distance, self.size)]
            received = self.exchange(own, self.rank - distance, self.rank + distance)
            if self.rank + distance < self.size and not segments.broken(self.start, end):
                own = own[0] * received[0], own[0] * received[1] + own[1]
            distance *= 2
        _, gradient = self.exchange(own, self.rank - 1, self.rank + 1)
        return gradient

    def border(self, x: Tensor, count: int, segments: Segments) -> Tensor:
        """The last ``count`` tokens before this part, of its first sequence, zeros where there are none.

        Args:
            x: (batch, part, channels).

        Raises:
            ArgumentError: a part is shorter than that.
        """
        shortest = self.length // self.size
        if shortest < count:
            raise ArgumentError(
                f"length: parts of {shortest} tokens are shorter than the {count} that a convolution looks back; "
                "use fewer processes"
            )
        known = min(count, x.shape[1] - segments.last)
        tail = torch.nn.functional.pad(x[:, x.shape[1] - known :], (0, 0, count - known, 0))
        (before,) = self.neighbour((tail,), (torch.zeros_like(tail),), segments)
        return before

    def all_before(self, own: Tensor, dim: int) -> Tensor:
        """The whole up to the end of this part, of this part ``own`` along ``dim``: each process sends to all later."""
        longest = max(end - start for start, end in pairwise(self.bounds))
        padding = longest - (self.end - self.start)
        padded = own if not padding else torch.cat((own, own.narrow(dim, 0, padding)), dim=dim)
        parts = [padded]
        for distance in range(1, self.size):
            parts += self.shift((padded,), distance, (torch.zeros_like(padded),), False)
        # The nearest came first. What those without predecessors got stays in the graph: its backward pass answers.
        sizes = [self.bounds[rank + 1] - self.bounds[rank] for rank in range(self.rank, -1, -1)]
        known = [part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=False)]
        rest = [part.narrow(dim, 0, 0) for part in parts[len(sizes) :]]
        return torch.cat([*rest, *known[::-1]], dim=dim)

    @uncompiled
    def shift(self, tensors: Leaving, distance: int, nothing: Leaving, cut: bool) -> Leaving:
        """The tensors of the process ``distance`` before this one; ``nothing`` where ``cut`` or where there is none.

        All processes must call it, and use what they get, in the same order, forward and backward.
        """
        return _Shift.apply(self, distance, cut or self.rank < distance, nothing, *tensors)

    def exchange(self, tensors: Leaving, to: int, source: int) -> Leaving:
        """Send tensors to one process and receive as many of the same shapes from another, where there are such."""
        out = [tensor.detach().contiguous() for tensor in tensors]
        received = [torch.zeros_like(tensor) for tensor in out]
        operations = []
        for mine, theirs in zip(out, received, strict=True):
            mine, theirs = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (mine, theirs))
            if 0 <= to < self.size:
                operations.append(dist.P2POp(dist.isend, mine, self._world(to), self.group))
                self.traffic.bytes += mine.numel() * mine.element_size()
                self.traffic.messages += 1
            if 0 <= source < self.size:
                operations.append(dist.P2POp(dist.irecv, theirs, self._world(source), self.group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        return tuple(received)

    def _world(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: SequencePart, distance: int, cut: bool, nothing: Leaving, *own: Tensor) -> Leaving:
        ctx.part, ctx.distance, ctx.cut = part, distance, cut
        # Saved to be looked at: under checkpointing that runs the forward exchanges again before the backward ones, in
        # all processes alike.
        ctx.save_for_backward(own[0])
        received = part.exchange(own, part.rank + distance, part.rank - distance)
        return tuple(t.clone() for t in nothing) if cut else received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors
        if ctx.cut:
            gradients = tuple(torch.zeros_like(gradient) for gradient in gradients)
        back = ctx.part.exchange(gradients, ctx.part.rank - ctx.distance, ctx.part.rank + ctx.distance)
        return None, None, None, None, *back


@uncompiled
def met(
    part: SequencePart,
    segments: Segments,
    enter: Callable[..., Leaving],
    y: Tensor,
    last: Tensor,
    sources: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """A recurrence's output and states, so that the gradients of what it leaves for later parts reach it.

    The recurrence ran from what entered as from a constant. Its backward pass is made once, when all is known.

    Args:
        part, segments: of this process.
        enter: of the gradients of ``y`` and ``last`` and of ``sources``, for the part's first sequence (each row, of a
            batch): the decay over it, and the gradient of the state that entered it.
        y, last: the output, and the state after each row.
        sources: tensors that ``enter`` needs.
    """
    return _Met.apply(part, segments, enter, y, last, *sources)


class _Met(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: SequencePart, segments: Segments, enter: Any, y: Tensor, last: Tensor, *sources: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.part, ctx.segments, ctx.enter = part, segments, enter
        ctx.save_for_backward(*sources)
        return y.view_as(y), last.view_as(last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        # As in _Shift: under checkpointing the forward exchanges are made again first.
        sources = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            decay, gradient = ctx.enter(dy, dlast, *sources)
        nothing = torch.ones_like(decay), torch.zeros_like(gradient)
        later = ctx.part.returning((decay, gradient), nothing, ctx.segments)
        dlast = torch.cat((dlast[: len(dlast) - len(later)], dlast[len(dlast) - len(later) :] + later))
        return None, None, None, dy, dlast, *(None for _ in sources)


_part: SequencePart | None = None


@contextlib.contextmanager
def sequence_parallel(group: dist.ProcessGroup | None = None, *, length: int) -> Iterator[SequencePart]:
    """Within the block, mixers and language models take a part of every sequence in each process of a group.

    Forward and backward passes belong inside. A loss is the mean over this process's part, and gradients of parameters
    are those of the sum of all processes' losses through this part: averaged over the processes, as
    DistributedDataParallel and FSDP do, they are those of the mean loss. It holds for all threads of the process.

    Args:
        group: the processes that share sequences, in order; None: all.
        length: tokens of the whole sequence (of the whole row, of packed ones), at least one a process.

    Raises:
        ArgumentError: the group does not hold this process, or has more processes than there are tokens. At the call,
            a mixer that cannot be cut says why.

    Example:
        >>> with sequence_parallel(group, length=tokens.shape[1]) as part:
        ...     loss = model.loss(part.take(tokens), part.take(targets))
        ...     loss.backward()
    """
    global _part
    before, _part = _part, SequencePart(group, length)
    try:
        yield _part
    finally:
        _part = before


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block, no sequence is shared."""
    global _part
    before, _part = _part, None
    try:
        yield
    finally:
        _part = before


def current_part() -> SequencePart | None:
    """The part of this process within :func:`sequence_parallel`, else None."""
    return _part


def first_position() -> int:
    """Where in the whole sequence this process's part starts; 0 outside :func:`sequence_parallel`."""
    return 0 if _part is None else _part.start


def whole_sequences_only(name: str, reason: str | None) -> None:
    """Raise ArgumentError within :func:`sequence_parallel` if there is a reason against it."""
    if _part is not None and reason is not None:
        raise ArgumentError(f"{name} takes whole sequences, not parts (sequence_parallel): {reason}")
