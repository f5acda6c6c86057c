"""How the CUDA kernels of the selective scan spread a call over a GPU: a small model of what a plan costs.

The kernels are bound by instructions, so a plan's time is counted in cycles of a scheduler (a quarter of a
multiprocessor): the steps of the longest chain of work it is given, times what a step costs. A step of one warp alone
is bound by latency (ALONE); of several warps, by the issue of instructions (SHARED). Splitting time fills a GPU that
rows and channels leave empty, at the price of a pass that finds the state before each piece. The constants were fitted
to measurements on an H100; they rank plans, they do not predict times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# Cycles of a step of a warp: a part that does not depend on the states of a lane, and one for each of them.
_SHARED = (19.0, 9.5)
_ALONE = (22.0, 12.5)

# What splitting time costs: the first pass beside the full one (with as many parts), the start of every piece, two more
# launches, and a number of the state that is written, chained and read.
_FIRST_PASS = (0.65, 0.025)
_PIECE = 3_000
_LAUNCHES = 22_000
_STATE = 0.01

# Warps of a scheduler that run side by side.
_RESIDENT = 3

# Cycles of a step of a block of the backward pass, alone on a multiprocessor and with another one. Blocks of two warps,
# four to a multiprocessor, took as long at 1,536 channels and a third longer at 2,048; of three, longer everywhere.
_BACKWARD = (600.0, 870.0)
_BACKWARD_FIRST_PASS = 0.25

#: Steps of a piece of time that are tried.
SPANS = tuple(2**power for power in range(6, 13))


@dataclass(frozen=True)
class Split:
    """Real numbers of a channel's state that one lane takes, and steps of a piece of time (0: time is not split)."""

    numbers: int
    steps: int


def _rounds(work: float, places: int) -> int:
    """Turns that `places` workers need for `work` equal pieces."""
    return max(1, -(-int(work) // places))


def _forward_step(warps: int, each: int) -> float:
    """Cycles that a scheduler spends on a step of so many warps, whose lanes take `each` numbers."""
    alone = _ALONE[0] + _ALONE[1] * each
    whole, rest = divmod(warps, _RESIDENT)
    shared = _SHARED[0] + _SHARED[1] * each
    return whole * _RESIDENT * shared + (max(alone, rest * shared) if rest else 0.0)


@cache
def forward_split(sequences: int, tokens: int, channels: int, numbers: int, multiprocessors: int) -> Split:
    """The plan of a forward pass.

    Args:
        sequences, tokens: how many, and how long all of them are together.
        channels: of one token.
        numbers: real numbers of a channel's state.
        multiprocessors: of the GPU.
    """
    longest = -(-tokens // sequences)
    width = 1 << (numbers - 1).bit_length()
    best, best_cost = Split(min(width, 8), 0), float("inf")
    for each in (8, 4, 2):
        if each > max(width, 2):
            continue
        warps = channels * max(1, width // each) / 32
        for span in (0, *SPANS):
            if span >= longest:
                break
            pieces = -(-longest // span) if span else 1
            at_once = _rounds(sequences * warps * pieces, 4 * multiprocessors)
            cost = _forward_step(at_once, each) * (span or longest)
            if span:
                cost = cost * (1 + _FIRST_PASS[0] + _FIRST_PASS[1] * each)
                cost += _PIECE * max(1, at_once // _RESIDENT) + _LAUNCHES
                cost += _STATE * sequences * pieces * channels * numbers
            if cost < best_cost:
                best, best_cost = Split(each, span), cost
    return best


@cache
def backward_split(sequences: int, tokens: int, channels: int, numbers: int, multiprocessors: int) -> Split:
    """The plan of a backward pass; arguments as for :func:`forward_split`."""
    longest = -(-tokens // sequences)
    width = 1 << (numbers - 1).bit_length()
    each = min(width, 8)
    blocks = channels * (width // each) / 128
    best, best_cost = Split(each, 0), float("inf")
    for span in (0, *SPANS):
        if span >= longest:
            break
        pieces = -(-longest // span) if span else 1
        work = sequences * blocks * pieces
        rounds = _rounds(work, 2 * multiprocessors)
        step = _BACKWARD[0] if work <= multiprocessors else _BACKWARD[1] * rounds
        cost = step * (span or longest)
        if span:
            cost = cost * (1 + _BACKWARD_FIRST_PASS) + _PIECE * rounds + _LAUNCHES
            cost += _STATE * sequences * pieces * channels * numbers
        if cost < best_cost:
            best, best_cost = Split(each, span), cost
    return best
