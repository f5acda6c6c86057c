"""Which tokens each step sees: a pure function of the step, so that a run can go on from anywhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.shards import Tokens


@dataclasses.dataclass(frozen=True)
class Batches:
    """Sequences of a long row of tokens.

    Without ``carry_state`` an epoch cuts the tokens into sequences at a random offset and visits each once in random
    order. With it, row r of the batch starts at r / batch_size of the tokens and reads on from step to step; at the end
    of its part it starts over.

    Args:
        tokens: (tokens,) integers, usually of files that are mapped into memory.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        seed: of the order.
        carry_state: see above.

    Raises:
        DataError: there are not enough tokens for one sequence (with ``carry_state``: one per row).
    """

    tokens: np.ndarray | Tokens
    batch_size: int
    sequence_length: int
    seed: int = 0
    carry_state: bool = False

    def __post_init__(self) -> None:
        rows = self.batch_size if self.carry_state else 1
        least = rows * (self.sequence_length + 1)
        if len(self.tokens) < least:
            each = f" in each of {rows} rows" if rows > 1 else ""
            raise DataError(
                f"data: the training part has {len(self.tokens)} tokens, fewer than one sequence of "
                f"{self.sequence_length} tokens and its target{each}; give more text or a smaller sequence_length"
            )

    def positions(self, step: int) -> np.ndarray:
        """Where each sequence of a step starts: (batch_size,) int64."""
        if self.carry_state:
            part = len(self.tokens) // self.batch_size
            steps = (part - 1) // self.sequence_length
            rows = np.arange(self.batch_size, dtype=np.int64)
            return rows * part + (step % steps) * self.sequence_length
        number = np.arange(self.batch_size, dtype=np.int64) + step * self.batch_size
        spare = (len(self.tokens) - 1) % self.sequence_length
        count = (len(self.tokens) - 1) // self.sequence_length
        starts = np.empty_like(number)
        for epoch in np.unique(number // count):
            here = number // count == epoch
            offset = int(_mix(np.array([epoch], np.uint64), self.seed, 99)[0] % np.uint64(spare + 1))
            starts[here] = permute(number[here] % count, count, self.seed, int(epoch)) * self.sequence_length + offset
        return starts

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Tokens and targets of (some rows of) a step, (rows, sequence_length) int64 each."""
        starts = self.positions(step)[rows]
        # int64 first: arithmetic on a memory map of small integers would overflow.
        window = np.stack([self.tokens[s : s + self.sequence_length + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(window)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def restarts(self, step: int) -> bool:
        """Whether rows that carry state jump to another place before this step."""
        steps = (len(self.tokens) // self.batch_size - 1) // self.sequence_length
        return step % steps == 0


def permute(index: np.ndarray, count: int, seed: int, round_: int = 0) -> np.ndarray:
    """A pseudo-random permutation of 0 .. count - 1, evaluated at some indices without building it.

    A Feistel network of four rounds on the smallest even number of bits that hold ``count``, walked along its cycles
    until the value falls below ``count`` (Black and Rogaway, 2002). It needs no memory and is the same
    on every machine.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for key in range(4):
            left, right = right, left ^ (_mix(right, seed, round_ * 4 + key) & mask)
        value[outside] = (left << shift) | right
        outside[outside] = value[outside] >= count
    return value.astype(np.int64)


def _mix(value: np.ndarray, seed: int, key: int) -> np.ndarray:
    """The finaliser of SplitMix64 on value, seed and key."""
    with np.errstate(over="ignore"):
        z = value + np.uint64((seed * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
