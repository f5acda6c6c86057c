"""How a call of the CPU scan is laid out in memory, and the loads and stores that all its kernels share.

Everything is addressed in bytes through two int64 tables: `a`, the call's arguments under the names below, and `seqs`,
per sequence (row, first step, length, first checkpoint, first padded step). Channels of a group are cut into vectors of
`WIDTH`; parameters and states of a vector are one register per state (`PADDED` of them). B and C of every step are
float32, `STEPS` steps of a state side by side; sequences are padded to whole tiles of `STEPS`.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from longscan.ops.jit import inline
from longscan.ops.simd import VECTOR_BYTES, broadcast
from longscan.ops.simd_memory import load, load_scalar, read, store, store_scalar

# Addresses (0: the argument is absent), then strides per row and step in bytes, then sizes and flags.
X, DT, Z, DOUT, OUT, DX, DDT, DZ = range(8)
A_, B_, C_, D_, BIAS, INITIAL, FINAL, SAVED = range(8, 16)
DINITIAL, DFINAL, DA_, DB_, DC_, DD_, DBIAS = range(16, 23)
X_ROW, X_STEP, DT_ROW, DT_STEP, Z_ROW, Z_STEP, DOUT_ROW, DOUT_STEP, OUT_ROW, OUT_STEP = range(23, 33)
FORMAT, SOFTPLUS, CHUNK, STATES, PADDED, CHANNELS, GROUPS, PER_GROUP, VECTORS, BLOCK_VECTORS, BLOCKS = range(33, 44)
PADDED_STEPS, CREWS, SEQUENCES, ITEM, SAVE = range(44, 49)
ARGUMENTS = 49

#: Steps of a tile: a state passes through them in a register, unrolled, so that their exponentials overlap.
STEPS = 8

#: States that the backward pass takes at a time, and their steps; its 16 products with each of B and C make whole
#: vectors of sums over channels.
BLOCK = 4
PRODUCTS = BLOCK * BLOCK


def chunk_length(state: int) -> int:
    """Steps between saved states, whole tiles: the more states, the fewer are saved, so bytes do not grow with N."""
    return max(64, -(-4 * state // STEPS) * STEPS)


def checkpoints_shape(tokens: int, channels: int, state: int, num_sequences: int) -> tuple[int, ...]:
    """Shape of the saved states: an upper bound on the chunks that `num_sequences` sequences can make."""
    return (tokens // chunk_length(state) + num_sequences, channels, state)


@inline
def fill(address, count):
    """Writes `count` vectors of zeros."""
    for i in range(count):
        store(broadcast(0.0), address + i * VECTOR_BYTES)


@inline
def to_vectors(states, vectors, lanes, a):
    """States of `lanes` channels, (channel, state) in memory, to one vector per state."""
    fill(vectors, a[PADDED])
    for lane in range(lanes):
        for n in range(a[STATES]):
            store_scalar(load_scalar(states + 4 * (lane * a[STATES] + n)), vectors + n * VECTOR_BYTES + 4 * lane)


@inline
def from_vectors(vectors, states, lanes, a):
    """The inverse of `to_vectors`."""
    for lane in range(lanes):
        for n in range(a[STATES]):
            store_scalar(load_scalar(vectors + n * VECTOR_BYTES + 4 * lane), states + 4 * (lane * a[STATES] + n))


@inline
def place(a, which, fixed, vector, group, step):
    """Address of B or C for a vector of channels at a padded step, for state 0.

    `fixed` is None when there is a B or C for every step, a number when it is constant in time; so in all kernels,
    which are compiled for each.
    """
    if fixed is None:
        tile = step // STEPS * a[GROUPS] + group
        return a[which] + (tile * a[PADDED] * STEPS + step % STEPS) * 4
    return a[which] + vector * a[PADDED] * VECTOR_BYTES


@inline
def stride(fixed):
    """Bytes from a state's B or C to the next state's."""
    if fixed is None:
        return STEPS * 4
    return VECTOR_BYTES


@inline
def tile_stride(a, fixed):
    """Bytes from a tile's B or C to the next tile's."""
    if fixed is None:
        return a[GROUPS] * a[PADDED] * STEPS * 4
    return 0


@inline
def coefficient(address, t, fixed):
    """B or C of a state at step t of a tile: one number for all channels, or a vector when constant in time."""
    if fixed is None:
        return broadcast(load_scalar(address + 4 * t))
    return load(address)


@inline
def raw_step(address, bias, number_format, lanes):
    """dt with its bias, before softplus."""
    raw = read(address, number_format, lanes)
    if bias != 0:
        raw = raw + load(bias)
    return raw
