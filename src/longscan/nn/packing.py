"""Packed sequences for mixers that are computed on rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from longscan.nn.state import State
from longscan.ops.packing import back_in_one_row, in_rows

S = TypeVar("S", bound=State)


def over_rows(
    run: Callable[[Tensor, Any, Tensor], tuple[Tensor, S]], x: Tensor, state: S | None, cu_seqlens: Tensor
) -> tuple[Tensor, S | None]:
    """Run a mixer on packed sequences as a few padded batches.

    Args:
        run: takes x (rows, longest, d_model), the rows' states (None: fresh ones) and their lengths (rows,) on the CPU,
            and gives y like x, of which the padded part does not count, and each row's state after its own length.
        x: (1, length, d_model).
        state: of all sequences, or None.
        cu_seqlens: (sequences + 1,) offsets.

    Returns:
        y (1, length, d_model), and the state (None if none was given); an empty sequence keeps its own.

    Raises:
        ArgumentError: the offsets do not start at 0, decrease, or do not end at the length.
    """
    outputs = []
    after = state
    for rows in in_rows(cu_seqlens, x.shape[1]):
        y, own = run(rows.take(x), None if state is None else state.select(rows.sequences), rows.lengths)
        outputs.append((rows, y))
        if after is not None:
            fresh, sequences = iter(own.tensors()), rows.sequences
            after = after.map(lambda tensor: tensor.index_copy(0, sequences, next(fresh)))  # noqa: B023 (called here)
    return back_in_one_row(outputs), after


def after_own_length(states: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row's state after its own length: of those after every step, (rows, length, ...), or, for no step at all,
    the one before, (rows, ...). Lengths of None: all of the length."""
    if lengths is None:
        return states[:, -1]
    every = torch.cat((before[:, None], states), dim=1)
    return every[torch.arange(len(every), device=every.device), lengths.to(every.device)]
