"""The Cauchy product as real matrix products, a stretch of places at a time: plain PyTorch on any device.

With S = R + R' and D = R - R' (see reference.py) and v = a + i b,

    Re y = sum_n a Re S - b Im D,    Im y = sum_n a Im S + b Re D

so that all products over one system share the quotients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Quotients in memory at a time.
_QUOTIENTS = {"cpu": 1 << 18}
_MOST_QUOTIENTS = 1 << 24


def unsupported(*_: Tensor | None) -> str | None:
    """Plain PyTorch serves every call."""
    return None


def _stretches(z: Tensor, w: Tensor) -> Iterator[tuple[int, int]]:
    size = max(32, _QUOTIENTS.get(z.device.type, _MOST_QUOTIENTS) // w.numel())
    for start in range(0, z.shape[0], size):
        yield start, min(start + size, z.shape[0])


def _quotients(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (z - w) and 1 / (z - w*), (channels, N, places)."""
    return torch.reciprocal(z - w[..., None]), torch.reciprocal(z - torch.conj_physical(w)[..., None])


def _matrix(one: Tensor, other: Tensor) -> Tensor:
    """(channels, 2 N, 2 places): takes pairs (a, b) of all n to the real parts at all places, then the imaginary."""
    total, difference = one + other, one - other
    return torch.cat(
        (torch.cat((total.real, total.imag), -1), torch.cat((-difference.imag, difference.real), -1)), dim=-2
    )


def _halves(x: Tensor) -> Tensor:
    """Complex (products, channels, n) to (channels, products, 2 n): real parts, then imaginary ones."""
    return torch.cat((x.real, x.imag), -1).transpose(0, 1)


def _joined(x: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    return torch.complex(*(half.contiguous() for half in x.transpose(0, 1).chunk(2, -1)))


def product(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """(products, channels, N), (length,), (channels, N) to (products, channels, length)."""
    pairs = _halves(v)
    out = v.new_empty((*v.shape[:2], z.shape[0]))
    for start, stop in _stretches(z, w):
        out[..., start:stop] = _joined(pairs @ _matrix(*_quotients(z[start:stop], w)))
    return out


def transpose(g: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """S1 and S2, each (products, channels, N), of g (products, channels, length)."""
    first: Tensor | None = None
    second: Tensor | None = None
    for start, stop in _stretches(z, w):
        one, other = _quotients(z[start:stop], w)
        pairs = _halves(g[..., start:stop])
        s1, s2 = pairs @ _matrix(one, other).mT, pairs @ _matrix(one.square(), other.square()).mT
        first, second = (s1, s2) if first is None or second is None else (first.add_(s1), second.add_(s2))
    assert first is not None
    assert second is not None
    return _joined(first), _joined(second)
