"""The Vandermonde product and its transpose in Triton: no power leaves registers.

A tile is STARTS stretches of BLOCK places, whose powers factor, A_bar^(s + j) = A_bar^s A_bar^j: a state has
STARTS + BLOCK exponentials a tile, and its part of all places is a sum of two outer products. Each power is made from
its own exponential, and no program adds to what another one wrote.
"""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.triton_utils import on_its_device

_STARTS, _BLOCK = 16, 64


def unsupported(first: Tensor, log_A_bar: Tensor) -> str | None:
    """Serves complex64."""
    return None if log_A_bar.dtype == torch.complex64 else f"its kernels take complex64, not {log_A_bar.dtype}"


@triton.jit
def _powers(re, im, places):
    """Real and imaginary parts of exp((re + i im) places)."""
    size = tl.exp(re * places)
    return size * tl.cos(im * places), size * tl.sin(im * places)


@triton.jit(do_not_specialize=["channels", "states", "length"])
def _product(
    weights, log_A_bar, kernel, channels, states, length, STARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One tile of one row. Complex numbers are pairs: weights (rows, states), log_A_bar (channels, states)."""
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    start = tl.program_id(1).to(tl.int64) * (STARTS * BLOCK) + tl.arange(0, STARTS) * BLOCK
    within = tl.arange(0, BLOCK)
    total = tl.zeros((STARTS, BLOCK), tl.float32)
    for n in range(states):
        pole = log_A_bar + 2 * (channel * states + n)
        re = tl.load(pole)
        im = tl.load(pole + 1)
        weight = weights + 2 * (row * states + n)
        x = 2.0 * tl.load(weight)
        y = 2.0 * tl.load(weight + 1)
        a, b = _powers(re, im, start.to(tl.float32))
        c, d = _powers(re, im, within.to(tl.float32))
        total += (x * a - y * b)[:, None] * c[None, :] - (x * b + y * a)[:, None] * d[None, :]
    place = start[:, None] + within[None, :]
    tl.store(kernel + row * length + place, total, mask=place < length)


@triton.jit(do_not_specialize=["channels", "states", "length"])
def _moments(
    values, log_A_bar, sums, slopes, channels, states, length,
    STARTS: tl.constexpr, BLOCK: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """The sums of one row and state."""
    own = tl.program_id(0).to(tl.int64)
    row = own // states
    pole = log_A_bar + 2 * (row % channels * states + own % states)
    re = tl.load(pole)
    im = tl.load(pole + 1)
    within = tl.arange(0, BLOCK)
    c, d = _powers(re, im, within.to(tl.float32))
    real = tl.zeros((STARTS,), tl.float32)
    imaginary = tl.zeros((STARTS,), tl.float32)
    real_slope = tl.zeros((STARTS,), tl.float32)
    imaginary_slope = tl.zeros((STARTS,), tl.float32)
    for first in range(0, length, STARTS * BLOCK):
        start = first + tl.arange(0, STARTS) * BLOCK
        place = start[:, None] + within[None, :]
        value = tl.load(values + row * length + place, mask=place < length, other=0.0)
        steps = start.to(tl.float32)
        a, b = _powers(re, im, steps)
        x = tl.sum(value * c[None, :], 1)
        y = tl.sum(value * d[None, :], 1)
        real += x * a - y * b
        imaginary += x * b + y * a
        if SLOPE:
            # l = start + within
            value *= within.to(tl.float32)[None, :]
            x = steps * x + tl.sum(value * c[None, :], 1)
            y = steps * y + tl.sum(value * d[None, :], 1)
            real_slope += x * a - y * b
            imaginary_slope += x * b + y * a
    tl.store(sums + 2 * own, tl.sum(real, 0))
    tl.store(sums + 2 * own + 1, tl.sum(imaginary, 0))
    if SLOPE:
        tl.store(slopes + 2 * own, tl.sum(real_slope, 0))
        tl.store(slopes + 2 * own + 1, tl.sum(imaginary_slope, 0))


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj().contiguous())


@on_its_device
def product(weights: Tensor, log_A_bar: Tensor, length: int) -> Tensor:
    """(batch, channels, N), (channels, N) to (batch, channels, length), real."""
    batch, channels, states = weights.shape
    kernel = torch.empty((batch, channels, length), dtype=torch.float32, device=weights.device)
    _product[(batch * channels, triton.cdiv(length, _STARTS * _BLOCK))](
        _pairs(weights), _pairs(log_A_bar), kernel, channels, states, length, STARTS=_STARTS, BLOCK=_BLOCK
    )
    return kernel


@on_its_device
def moments(values: Tensor, log_A_bar: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Sums over l of values A_bar^l and, with `slope`, of l values A_bar^l: (batch, channels, length) to (..., N)."""
    batch, channels, length = values.shape
    states = log_A_bar.shape[1]
    found = torch.empty((1 + slope, batch, channels, states), dtype=log_A_bar.dtype, device=values.device)
    pairs = torch.view_as_real(found)
    _moments[(batch * channels * states,)](
        values.contiguous(), _pairs(log_A_bar), pairs[0], pairs[-1], channels, states, length,
        STARTS=_STARTS, BLOCK=_BLOCK, SLOPE=slope,
    )  # fmt: skip
    return found[0], found[1] if slope else None
