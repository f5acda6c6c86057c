"""The Cauchy product and its gradients as they are defined: every quotient in memory, in plain PyTorch.

With k products over one system of c channels and N poles, each standing for a conjugate pair,

    y[k, c, l]  = sum_n v[k, c, n] / (z[l] - w[c, n]) + v*[k, c, n] / (z[l] - w*[c, n])

and, with R = 1 / (z - w), R' = 1 / (z - w*) and g the gradient of y, the sums that gradients are made of,

    S1[k, c, n] = sum_l g[k, c, l] R*[c, n, l]   + g*[k, c, l] R'[c, n, l]
    S2[k, c, n] = sum_l g[k, c, l] R*[c, n, l]^2 + g*[k, c, l] R'[c, n, l]^2

the gradient of v being S1 and that of w the sum over k of v* S2 (library.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def _quotients(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (z - w) and 1 / (z - w*), (channels, N, length)."""
    return 1 / (z - w[..., None]), 1 / (z - torch.conj_physical(w)[..., None])


def product(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """(products, channels, N), (length,), (channels, N) to (products, channels, length)."""
    one, other = _quotients(z, w)
    return (v[..., None] * one + torch.conj_physical(v)[..., None] * other).sum(-2)


def transpose(g: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """S1 and S2, each (products, channels, N), of g (products, channels, length)."""
    one, other = _quotients(z, w)
    one, g = torch.conj_physical(one), g[..., None, :]
    conjugate = torch.conj_physical(g)
    return (g * one + conjugate * other).sum(-1), (g * one.square() + conjugate * other.square()).sum(-1)
