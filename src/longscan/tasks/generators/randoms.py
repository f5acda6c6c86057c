"""Random numbers for compiled generators: SplitMix64 (Steele, Lea and Flood 2014), one stream for each item.

Item k of a data set depends on the seed and k alone, whatever else is made, in whatever order.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from longscan.ops.jit import inline

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = (np.uint64(shift) for shift in (30, 27, 31, 11))
_UNIT = 2.0**-53


@inline
def _mix(word):
    word = (word ^ (word >> _30)) * _FIRST
    word = (word ^ (word >> _27)) * _SECOND
    return word ^ (word >> _31)


@inline
def stream(seed, item):
    """The state of an item's stream: (1,) uint64, which the draws below advance."""
    state = np.empty(1, np.uint64)
    state[0] = _mix(np.uint64(seed) + _STEP) ^ _mix(np.uint64(item) * _STEP)
    return state


@inline
def uniform(state):
    """A number in [0, 1)."""
    state[0] += _STEP
    return np.float64(_mix(state[0]) >> _11) * _UNIT


@inline
def below(state, bound):
    """An integer of 0 .. bound - 1."""
    return np.int64(uniform(state) * bound)
