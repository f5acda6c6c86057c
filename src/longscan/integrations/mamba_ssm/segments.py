"""Sequences numbered along rows, `seq_idx`, as one packed row with offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError


class Segments:
    """Where the sequences of `seq_idx` (batch, length) begin and end, with all rows put one after another.

    A sequence is a run of one number within a row. Negative numbers are padding: runs like others, but their output is
    zero and they carry no states.

    Attributes:
        cu_seqlens: (runs + 1,) int64 offsets into the packed row of batch * length steps.

    Raises:
        ArgumentError: another shape, or no integers.
    """

    def __init__(self, seq_idx: Tensor, shape: tuple[int, int]) -> None:
        if tuple(seq_idx.shape) != shape or seq_idx.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"seq_idx: got {seq_idx.dtype} of shape {tuple(seq_idx.shape)}, expected int32 or int64 of shape "
                f"{shape} = (batch, length)"
            )
        begins = torch.ones_like(seq_idx, dtype=torch.bool)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([seq_idx.numel()])])
        self._run = begins.flatten().cumsum(0).view(shape) - 1
        self._real = seq_idx >= 0
        self._all_real = bool(self._real.all())

    def _run_at(self, real: Tensor, place: Tensor) -> Tensor:
        return torch.where(real.any(1), self._run.gather(1, place[:, None]).squeeze(1), self._run[:, 0])

    def spread(self, states: Tensor) -> Tensor:
        """States of the rows (batch, ...) as those of the runs: each row's to its first sequence, zero elsewhere."""
        first = self._run_at(self._real, self._real.int().argmax(1))
        runs = self.cu_seqlens.shape[0] - 1
        return states.new_zeros((runs, *states.shape[1:])).index_copy(0, first, states)

    def last(self, states: Tensor, initial: Tensor | None) -> Tensor:
        """Of the runs' final states (runs, ...) that of each row's last sequence; rows of padding keep `initial`."""
        place = self._real.shape[1] - 1 - self._real.flip(1).int().argmax(1)
        found = states[self._run_at(self._real, place)]
        if self._all_real:
            return found
        before = torch.zeros_like(found) if initial is None else initial.to(found.dtype)
        return torch.where(self._real.any(1)[:, None, None], found, before)

    def blank(self, y: Tensor) -> Tensor:
        """Zero where there is padding; y (batch, length, channels)."""
        return y if self._all_real else y.masked_fill(~self._real[..., None], 0)
