"""Sums over the lanes of many vectors at once: what gradients of B and C, which all channels of a group share, need."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from longscan.ops.simd import FLOATS, INTEGERS, WIDTH, TileType, tile_slot, vector


def _fold(builder: Any, a: Any, b: Any, half: int) -> Any:
    """Adds the halves of every run of 2 half lanes: a's sums take the place of the lower halves, b's of the upper."""
    odd = [lane // half % 2 for lane in range(WIDTH)]
    kept = [WIDTH + lane if odd[lane] else lane for lane in range(WIDTH)]
    moved = [WIDTH + lane - half if odd[lane] else lane + half for lane in range(WIDTH)]
    parts = (builder.shuffle_vector(a, b, ir.Constant(INTEGERS, order)) for order in (kept, moved))
    return builder.fadd(*parts)


@intrinsic
def lane_sums(typingctx: Any, vectors: Any, first: Any) -> Any:
    """lane_sums(tile, first): lane i is the sum of the lanes of tile[first + i], for i < WIDTH; first is a constant.

    A transposition that adds as it goes: WIDTH - 1 additions. The order of the sums is fixed.
    """
    if not isinstance(vectors, TileType) or not isinstance(first, types.IntegerLiteral):
        raise TypingError("lane_sums(tile, first): first must be a constant")
    start = first.literal_value

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        runs = [(builder.load(tile_slot(builder, values[0], start + i)), [i] * WIDTH) for i in range(WIDTH)]
        half = WIDTH // 2
        while half:
            folded = []
            for (a, a_owners), (b, b_owners) in zip(runs[0::2], runs[1::2], strict=True):
                owners = [(b_owners if lane // half % 2 else a_owners)[lane] for lane in range(WIDTH)]
                folded.append((_fold(builder, a, b, half), owners))
            runs, half = folded, half // 2
        ((total, owners),) = runs
        order = [owners.index(i) for i in range(WIDTH)]
        return builder.shuffle_vector(total, ir.Constant(FLOATS, ir.Undefined), ir.Constant(INTEGERS, order))

    return vector(vectors, first), generate
