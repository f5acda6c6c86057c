"""How the Triton kernels of the selective scan see B and C: float32 with time last, and back.

A thread of the scan owns one channel and walks `TILE` steps, so it wants the same B_n of all those steps next to one
another. Columns of the time-last tensors are counted per sequence, from a multiple of `TILE` on; the columns between a
sequence's end and that tile's end are zero, so that the scan may read whole tiles.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.triton_utils import pieces, sequence_bounds, sequence_of_piece

#: Steps a thread takes at once.
TILE = 16

# Steps and states one program of the kernels below moves.
_STEPS = 64
_STATES = 16


def columns(tokens: int, sequences: int) -> int:
    """Columns of a time-last tensor."""
    return pieces(tokens, sequences, TILE) * TILE


def planes(tensor: Tensor) -> Tensor:
    """A complex tensor with an axis (re, im) in front, as a view; a real one with an axis of length 1."""
    return torch.view_as_real(tensor.resolve_conj()).movedim(-1, 0) if tensor.is_complex() else tensor.unsqueeze(0)


def to_time_last(tensor: Tensor, offsets: Tensor | None, sequences: int) -> Tensor:
    """B or C (batch, length, groups, state) as float32 (planes, groups, state, columns)."""
    batch, length, groups, state = tensor.shape
    source = planes(tensor)
    width = columns(batch * length, sequences)
    out = torch.empty((source.shape[0], groups, state, width), dtype=torch.float32, device=tensor.device)
    grid = (pieces(batch * length, sequences, _STEPS) * groups * triton.cdiv(state, _STATES),)
    for plane in range(source.shape[0]):
        row, step, group, column = source[plane].stride()
        _to_time_last_kernel[grid](
            source[plane], out[plane], offsets, 0 if offsets is not None else row, step, group, column,
            sequences, length, groups, state, width,
            PACKED=offsets is not None, TILE=TILE, STEPS=_STEPS, STATES=_STATES, num_warps=4,
        )  # fmt: skip
    return out


def from_time_last(partials: Tensor, like: Tensor, offsets: Tensor | None, sequences: int) -> Tensor:
    """Sum of (parts, planes, groups, state, columns) over the parts, in order, with the shape and dtype of `like`."""
    batch, length, groups, state = like.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    target = planes(out)
    grid = (pieces(batch * length, sequences, _STEPS) * groups * triton.cdiv(state, _STATES),)
    for plane in range(target.shape[0]):
        row, step, group, column = target[plane].stride()
        _from_time_last_kernel[grid](
            partials[:, plane], target[plane], offsets, 0 if offsets is not None else row, step, group, column,
            sequences, length, groups, state, partials.shape[-1], partials.shape[0], partials.stride(0),
            PACKED=offsets is not None, TILE=TILE, STEPS=_STEPS, STATES=_STATES, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _piece(offsets, sequences, length, groups, state, PACKED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr):  # fmt: skip  # noqa: E501
    """What one program moves: sequence, its first step in its row and length, steps, first column, group, states."""
    state_blocks = tl.cdiv(state, STATES)
    pid = tl.program_id(0).to(tl.int64)
    n = (pid % state_blocks) * STATES + tl.arange(0, STATES)
    group = (pid // state_blocks) % groups
    piece = pid // (state_blocks * groups)
    sequence = sequence_of_piece(piece, offsets, sequences, length, STEPS, PACKED)
    begin, first, count = sequence_bounds(offsets, sequence, length, PACKED)
    step = (piece - begin // STEPS - sequence) * STEPS + tl.arange(0, STEPS)
    column = (begin // TILE + sequence) * TILE + step
    return sequence, first, count, step, column, group, n


@triton.jit(do_not_specialize=["row", "time", "group_stride", "state_stride", "sequences", "length", "groups", "state"])
def _to_time_last_kernel(
    source, out, offsets, row, time, group_stride, state_stride, sequences, length, groups, state, width,
    PACKED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    sequence, first, count, step, column, group, n = _piece(
        offsets, sequences, length, groups, state, PACKED, TILE, STEPS, STATES
    )
    base = source + sequence * row + first * time + group * group_stride
    inside = (step < count)[:, None] & (n < state)[None, :]
    values = tl.load(base + step[:, None] * time + n[None, :] * state_stride, mask=inside, other=0.0)
    padded = (step < (count + TILE - 1) // TILE * TILE)[:, None] & (n < state)[None, :]
    target = out + (group * state + n)[None, :] * width + column[:, None]
    tl.store(target, values.to(tl.float32), mask=padded)


@triton.jit(
    do_not_specialize=["row", "time", "group_stride", "state_stride", "sequences", "length", "groups", "state", "parts"]
)
def _from_time_last_kernel(
    partials, out, offsets, row, time, group_stride, state_stride, sequences, length, groups, state, width, parts,
    part_stride, PACKED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    sequence, first, count, step, column, group, n = _piece(
        offsets, sequences, length, groups, state, PACKED, TILE, STEPS, STATES
    )
    inside = (step < count)[:, None] & (n < state)[None, :]
    total = tl.zeros((STEPS, STATES), tl.float32)
    source = partials + (group * state + n)[None, :] * width + column[:, None]
    for part in range(parts.to(tl.int64)):
        total += tl.load(source + part * part_stride, mask=inside, other=0.0)
    base = out + sequence * row + first * time + group * group_stride
    tl.store(base + step[:, None] * time + n[None, :] * state_stride, total.to(out.dtype.element_ty), mask=inside)
