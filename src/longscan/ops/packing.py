"""Packed sequences of unlike lengths as a few padded batches, for computations that want rows of one length.

Sequences whose lengths lie between the same powers of two share a batch, so that padding at most doubles the work, and
the number of batches is at most the logarithm of the longest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longscan.ops.checks import check_offsets


@dataclass(frozen=True)
class Rows:
    """One padded batch.

    Attributes:
        sequences: (rows,) which sequences they are.
        index: (rows, longest) places in the packed row; past a sequence's end they repeat its last one.
        real: (rows, longest) which places are no padding.
        lengths: (rows,) int64 on the CPU.
    """

    sequences: Tensor
    index: Tensor
    real: Tensor
    lengths: Tensor

    def take(self, packed: Tensor) -> Tensor:
        """(1, length, ...) to (rows, longest, ...)."""
        return packed[0].index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


def in_rows(cu_seqlens: Tensor, length: int) -> list[Rows]:
    """The padded batches of packed sequences, shortest first. A sequence of length 0 is in none.

    Args:
        cu_seqlens: (num_sequences + 1,) offsets. Their values are looked at, wherever they are.
        length: of the packed row.

    Raises:
        ArgumentError: the offsets do not start at 0, decrease, or do not end at `length`.
    """
    device, cu_seqlens = cu_seqlens.device, cu_seqlens.to("cpu")
    check_offsets(cu_seqlens, length)
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for sequence, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if end > start:
            groups.setdefault((end - start - 1).bit_length(), []).append((sequence, start, end - start))
    return [_rows(groups[key], device) for key in sorted(groups)]


def _rows(members: list[tuple[int, int, int]], device: torch.device) -> Rows:
    sequences, starts, lengths = (torch.tensor(column, dtype=torch.int64) for column in zip(*members, strict=True))
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths[:, None]
    index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return Rows(sequences.to(device), index.to(device), real.to(device), lengths)


def back_in_one_row(batches: Sequence[tuple[Rows, Tensor]]) -> Tensor:
    """The inverse of taking apart: (rows, longest, ...) of every batch to the packed (1, length, ...)."""
    places = torch.cat([rows.index[rows.real] for rows, _ in batches])
    values = torch.cat([padded[rows.real] for rows, padded in batches])
    return values.index_select(0, torch.argsort(places)).unsqueeze(0)
