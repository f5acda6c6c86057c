"""The Cauchy product on a CPU: Numba kernels over explicit SIMD vectors, four products at a time.

A task is a block of places of a channel; backward, a pole and two products. Quotients live in registers only.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from longscan.ops.jit import inline, kernel, parallel_kernel, run
from longscan.ops.simd import VECTOR_BYTES, WIDTH, broadcast, fma, total
from longscan.ops.simd_memory import load, load_scalar, store

# Products that share quotients in one pass.
_GROUP = 4
# Vectors of places a forward task has.
_BLOCK = 64


def unsupported(v: Tensor, *_: Tensor | None) -> str | None:
    """Serves complex64."""
    return None if v.dtype == torch.complex64 else f"it computes in complex64, the numerators are {v.dtype}"


@inline
def _quotients(x, y, re, im):
    """Real and imaginary parts of 1 / (z - w), then of 1 / (z - w*), for z = x + iy and w = re + i im."""
    a, b, c = x - re, y - im, y + im
    square = a * a
    one, other = 1.0 / fma(b, b, square), 1.0 / fma(c, c, square)
    return a * one, -(b * one), a * other, -(c * other)


# Addresses: the grid's real and imaginary parts (2, padded length); poles (channels, N, 2); numerators
# (channels, N, 4, 2); values (channels, 4, 2, padded length). Lengths are in vectors.
@kernel
def _forward(task, grid, poles, numerators, values, states, vectors, blocks):
    channel, block = task // blocks, task % blocks
    row = vectors * VECTOR_BYTES
    out = values + channel * 8 * row
    for k in range(block * _BLOCK, min((block + 1) * _BLOCK, vectors)):
        x, y = load(grid + k * VECTOR_BYTES), load(grid + row + k * VECTOR_BYTES)
        r0, i0, r1, i1 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
        r2, i2, r3, i3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
        for n in range(channel * states, (channel + 1) * states):
            ar, ai, br, bi = _quotients(x, y, load_scalar(poles + 8 * n), load_scalar(poles + 8 * n + 4))
            sr, si, dr, di = ar + br, ai + bi, ar - br, ai - bi
            at = numerators + 32 * n
            re, im = load_scalar(at), load_scalar(at + 4)
            r0, i0 = fma(sr, re, fma(-di, im, r0)), fma(si, re, fma(dr, im, i0))
            re, im = load_scalar(at + 8), load_scalar(at + 12)
            r1, i1 = fma(sr, re, fma(-di, im, r1)), fma(si, re, fma(dr, im, i1))
            re, im = load_scalar(at + 16), load_scalar(at + 20)
            r2, i2 = fma(sr, re, fma(-di, im, r2)), fma(si, re, fma(dr, im, i2))
            re, im = load_scalar(at + 24), load_scalar(at + 28)
            r3, i3 = fma(sr, re, fma(-di, im, r3)), fma(si, re, fma(dr, im, i3))
        place = out + k * VECTOR_BYTES
        store(r0, place)
        store(i0, place + row)
        store(r1, place + 2 * row)
        store(i1, place + 3 * row)
        store(r2, place + 4 * row)
        store(i2, place + 5 * row)
        store(r3, place + 6 * row)
        store(i3, place + 7 * row)


@parallel_kernel
def _forward_driver(tasks, grid, poles, numerators, values, states, vectors, blocks):
    for task in prange(tasks):
        _forward(task, grid, poles, numerators, values, states, vectors, blocks)


@inline
def _add(at, row, sr, si, dr, di, re, im):
    """re + i im plus what the value at an address, with these sums and differences of quotients, gives to S."""
    gr, gi = load(at), load(at + row)
    return fma(gr, sr, fma(gi, si, re)), fma(gi, dr, fma(-gr, di, im))


@kernel
def _backward(task, grid, poles, values, sums, states, vectors):
    # sums: (channels, N, 2, 2, 2), for a pole and two products S1 and S2.
    row = vectors * VECTOR_BYTES
    n, half = task // 2, task % 2
    re, im = load_scalar(poles + 8 * n), load_scalar(poles + 8 * n + 4)
    g = values + (n // states) * 8 * row + half * 4 * row
    r0, i0, r1, i1 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
    r2, i2, r3, i3 = broadcast(0.0), broadcast(0.0), broadcast(0.0), broadcast(0.0)
    for k in range(vectors):
        at = g + k * VECTOR_BYTES
        ar, ai, br, bi = _quotients(load(grid + k * VECTOR_BYTES), load(grid + row + k * VECTOR_BYTES), re, im)
        sr, si, dr, di = ar + br, ai + bi, ar - br, ai - bi
        r0, i0 = _add(at, row, sr, si, dr, di, r0, i0)
        r1, i1 = _add(at + 2 * row, row, sr, si, dr, di, r1, i1)
        ar, ai, br, bi = ar * ar - ai * ai, 2.0 * (ar * ai), br * br - bi * bi, 2.0 * (br * bi)
        sr, si, dr, di = ar + br, ai + bi, ar - br, ai - bi
        r2, i2 = _add(at, row, sr, si, dr, di, r2, i2)
        r3, i3 = _add(at + 2 * row, row, sr, si, dr, di, r3, i3)
    sums[task, 0, 0, 0], sums[task, 0, 0, 1] = total(r0), total(i0)
    sums[task, 0, 1, 0], sums[task, 0, 1, 1] = total(r1), total(i1)
    sums[task, 1, 0, 0], sums[task, 1, 0, 1] = total(r2), total(i2)
    sums[task, 1, 1, 0], sums[task, 1, 1, 1] = total(r3), total(i3)


@parallel_kernel
def _backward_driver(tasks, grid, poles, values, sums, states, vectors):
    for task in prange(tasks):
        _backward(task, grid, poles, values, sums, states, vectors)


def _padded_grid(z: Tensor) -> tuple[Tensor, int]:
    """The grid's parts over whole vectors, and their number; the last place is repeated."""
    vectors = -(-z.shape[0] // WIDTH)
    parts = torch.view_as_real(z).t()
    return torch.cat((parts, parts[:, -1:].expand(2, vectors * WIDTH - z.shape[0])), dim=1).contiguous(), vectors


def product(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """(products, channels, N), (length,), (channels, N) to (products, channels, length)."""
    grid, vectors = _padded_grid(z)
    poles = torch.view_as_real(w.contiguous())
    channels, states = w.shape
    blocks = -(-vectors // _BLOCK)
    out = torch.empty((*v.shape[:2], z.shape[0]), dtype=v.dtype)
    for start in range(0, v.shape[0], _GROUP):
        own = v[start : start + _GROUP]
        numerators = torch.zeros((channels, states, _GROUP, 2))
        numerators[:, :, : own.shape[0]] = torch.view_as_real(own).permute(1, 2, 0, 3)
        values = torch.empty((channels, _GROUP, 2, vectors * WIDTH))
        addresses = (tensor.data_ptr() for tensor in (grid, poles, numerators, values))
        run(_forward_driver, _forward, channels * blocks, *addresses, states, vectors, blocks)
        parts = values[:, : own.shape[0], :, : z.shape[0]]
        torch.view_as_real(out[start : start + _GROUP]).copy_(parts.permute(1, 0, 3, 2))
    return out


def transpose(g: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """S1 and S2, each (products, channels, N), of g (products, channels, length)."""
    grid, vectors = _padded_grid(z)
    poles = torch.view_as_real(w.contiguous())
    channels, states = w.shape
    results = []
    for start in range(0, g.shape[0], _GROUP):
        own = torch.view_as_real(g[start : start + _GROUP])
        values = torch.zeros((channels, _GROUP, 2, vectors * WIDTH))
        values[:, : own.shape[0], :, : z.shape[0]] = own.permute(1, 0, 3, 2)
        sums = np.empty((channels * states * 2, 2, 2, 2), dtype=np.float32)
        addresses = (tensor.data_ptr() for tensor in (grid, poles, values))
        run(_backward_driver, _backward, channels * states * 2, *addresses, sums, states, vectors)
        # (channels, N, half, order, product of the half) to (order, products, channels, N)
        parts = torch.view_as_complex(torch.from_numpy(sums)).view(channels, states, 2, 2, 2).permute(3, 2, 4, 0, 1)
        results.append(parts.reshape(2, _GROUP, channels, states)[:, : own.shape[0]])
    first, second = torch.cat(results, dim=1)
    return first, second
