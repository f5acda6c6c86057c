"""What the Triton backends share: how packed and batched sequences are numbered, and the pointwise functions.

Sequences are cut into pieces of `size` steps, counted from each sequence's own start. A sequence that begins at token b
(rows of a batch laid end to end) owns the pieces from `b // size + sequence` on. That numbering needs no table: two
sequences never share a piece, and there are at most `tokens // size + sequences` of them. A few may be empty.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor


def pieces(tokens: int, sequences: int, size: int) -> int:
    """Upper bound on the pieces of `size` steps that `sequences` sequences of `tokens` tokens in all are cut into."""
    return tokens // size + sequences


Function = TypeVar("Function", bound=Callable[..., Any])


def on_its_device(function: Function) -> Function:
    """Runs a backend's function with its first argument's GPU as the current one: Triton launches on that."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **options: Any) -> Any:
        if first.device.type == "cpu":
            return function(first, *args, **options)
        with torch.get_device_module(first.device).device(first.device):
            return function(first, *args, **options)

    return run  # type: ignore[return-value]


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; a small number for the interpreter, which has none."""
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", None) or properties.max_compute_units)


@cache
def warp_size() -> int:
    """Threads that run in lockstep: 64 on AMD's data-centre GPUs, 32 elsewhere."""
    return 64 if torch.version.hip is not None else 32


def refuse_dtype(x: Tensor) -> str | None:
    """Why activations of this dtype cannot be served; None when they can."""
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"its kernels take float32, bfloat16 and float16, not {x.dtype}"


def channels_together(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels are neighbours in memory, else a copy that has them so.

    The kernels count on it: a warp's threads own neighbouring channels, and Triton lays a tile out along time where it
    cannot see that. Any strides between rows and between steps will do.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_strides(tensor: Tensor, packed: bool) -> tuple[int, int]:
    """Strides between rows and between steps; all packed sequences lie in row 0."""
    return (0 if packed else tensor.stride(0)), tensor.stride(1)


@triton.jit
def sequence_bounds(offsets, sequence, length, PACKED: tl.constexpr):
    """First token of a sequence (rows laid end to end), its first step inside its row, and its number of steps."""
    if PACKED:
        begin = tl.load(offsets + sequence).to(tl.int64)
        first = begin
        count = tl.load(offsets + sequence + 1).to(tl.int64) - begin
    else:
        begin = sequence.to(tl.int64) * length
        first = begin * 0
        count = first + length
    return begin, first, count


@triton.jit
def sequence_of_piece(piece, offsets, sequences, length, size, PACKED: tl.constexpr):
    """The sequence that owns a piece: the last one whose first piece does not come after it."""
    low = piece * 0
    high = low + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        begin, _, _ = sequence_bounds(offsets, middle, length, PACKED)
        before = begin // size + middle <= piece
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of silu."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), linear above 20, to a few units in the last place everywhere.

    The GPU's fast logarithm loses the small step sizes that Mamba starts from, so log1p(e) is summed as
    2 atanh(e / (2 + e)), whose argument is at most 1/3.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    tail = 1.0 / 15.0
    tail = tail * q + 1.0 / 13.0
    tail = tail * q + 1.0 / 11.0
    tail = tail * q + 1.0 / 9.0
    tail = tail * q + 1.0 / 7.0
    tail = tail * q + 1.0 / 5.0
    tail = tail * q + 1.0 / 3.0
    log1p = 2.0 * s * (1.0 + q * tail)
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p)
