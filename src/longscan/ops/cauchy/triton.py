"""The Cauchy product in Triton: programs own places (forward) or a pole (backward); quotients live in registers."""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.triton_utils import on_its_device

# Products that share quotients in one pass, at most, and places a program has at a time.
_GROUP = 4
_BLOCK = 256


def unsupported(v: Tensor, *_: Tensor | None) -> str | None:
    """Serves complex64."""
    return None if v.dtype == torch.complex64 else f"its kernels take complex64, not {v.dtype}"


@triton.jit
def _quotients(x, y, re, im):
    """Real and imaginary parts of 1 / (z - w), then of 1 / (z - w*), for z = x + iy and w = re + i im."""
    a = x - re
    b = y - im
    c = y + im
    one = 1.0 / (a * a + b * b)
    other = 1.0 / (a * a + c * c)
    return a * one, -b * one, a * other, -c * other


@triton.jit(do_not_specialize=["products", "channels", "states", "length"])
def _forward(
    v, z, w, out, products, channels, states, length, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Complex numbers are pairs: v (products, channels, states), z (length,), w (channels, states)."""
    channel = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.arange(0, GROUP).to(tl.int64)
    inside = place < length
    x = tl.load(z + 2 * place, mask=inside, other=0.0)
    y = tl.load(z + 2 * place + 1, mask=inside, other=0.0)
    real = tl.zeros((GROUP, BLOCK), tl.float32)
    imaginary = tl.zeros((GROUP, BLOCK), tl.float32)
    for n in range(states):
        pole = w + 2 * (channel * states + n)
        ar, ai, br, bi = _quotients(x, y, tl.load(pole), tl.load(pole + 1))
        at = v + 2 * ((own * channels + channel) * states + n)
        re = tl.load(at, mask=own < products, other=0.0)[:, None]
        im = tl.load(at + 1, mask=own < products, other=0.0)[:, None]
        real += re * (ar + br)[None, :] - im * (ai - bi)[None, :]
        imaginary += re * (ai + bi)[None, :] + im * (ar - br)[None, :]
    to = out + 2 * ((own * channels + channel)[:, None] * length + place[None, :])
    kept = (own < products)[:, None] & inside[None, :]
    tl.store(to, real, mask=kept)
    tl.store(to + 1, imaginary, mask=kept)


@triton.jit(do_not_specialize=["products", "channels", "states", "length"])
def _backward(
    g, z, w, first, second, products, channels, states, length, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """S1 and S2 of one pole and a group of products."""
    pole = tl.program_id(0).to(tl.int64)
    channel = pole // states
    own = tl.arange(0, GROUP).to(tl.int64)
    re = tl.load(w + 2 * pole)
    im = tl.load(w + 2 * pole + 1)
    r1 = tl.zeros((GROUP, BLOCK), tl.float32)
    i1 = tl.zeros((GROUP, BLOCK), tl.float32)
    r2 = tl.zeros((GROUP, BLOCK), tl.float32)
    i2 = tl.zeros((GROUP, BLOCK), tl.float32)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < length
        x = tl.load(z + 2 * place, mask=inside, other=0.0)
        y = tl.load(z + 2 * place + 1, mask=inside, other=0.0)
        # Beyond the end the values are zero, and the quotients must only be finite.
        ar, ai, br, bi = _quotients(tl.where(inside, x, re + 1.0), y, re, im)
        at = g + 2 * ((own * channels + channel)[:, None] * length + place[None, :])
        kept = (own < products)[:, None] & inside[None, :]
        gr = tl.load(at, mask=kept, other=0.0)
        gi = tl.load(at + 1, mask=kept, other=0.0)
        r1 += gr * (ar + br)[None, :] + gi * (ai + bi)[None, :]
        i1 += gi * (ar - br)[None, :] - gr * (ai - bi)[None, :]
        cr = ar * ar - ai * ai
        ci = 2.0 * ar * ai
        dr = br * br - bi * bi
        di = 2.0 * br * bi
        r2 += gr * (cr + dr)[None, :] + gi * (ci + di)[None, :]
        i2 += gi * (cr - dr)[None, :] - gr * (ci - di)[None, :]
    to = 2 * (own * channels * states + pole)
    tl.store(first + to, tl.sum(r1, 1), mask=own < products)
    tl.store(first + to + 1, tl.sum(i1, 1), mask=own < products)
    tl.store(second + to, tl.sum(r2, 1), mask=own < products)
    tl.store(second + to + 1, tl.sum(i2, 1), mask=own < products)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.contiguous())


@on_its_device
def product(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """(products, channels, N), (length,), (channels, N) to (products, channels, length)."""
    channels, states = w.shape
    length = z.shape[0]
    out = torch.empty((*v.shape[:2], length), dtype=v.dtype, device=v.device)
    for start in range(0, v.shape[0], _GROUP):
        own = v[start : start + _GROUP]
        _forward[(channels, triton.cdiv(length, _BLOCK))](
            _pairs(own), _pairs(z), _pairs(w), torch.view_as_real(out[start : start + _GROUP]),
            own.shape[0], channels, states, length, GROUP=triton.next_power_of_2(own.shape[0]), BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@on_its_device
def transpose(g: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """S1 and S2, each (products, channels, N), of g (products, channels, length)."""
    channels, states = w.shape
    first, second = (torch.empty((g.shape[0], channels, states), dtype=g.dtype, device=g.device) for _ in range(2))
    for start in range(0, g.shape[0], _GROUP):
        own = g[start : start + _GROUP]
        _backward[(channels * states,)](
            _pairs(own), _pairs(z), _pairs(w),
            *(torch.view_as_real(part[start : start + _GROUP]) for part in (first, second)),
            own.shape[0], channels, states, z.shape[0], GROUP=triton.next_power_of_2(own.shape[0]), BLOCK=_BLOCK,
        )  # fmt: skip
    return first, second
