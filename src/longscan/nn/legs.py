r"""Steps of the HiPPO-LegS memory, ``m' = (A m + B u) / t`` discretised by a step of 1 / t: of order N^1.5, not N^3.

A is :math:`-p_n p_k` below its diagonal and :math:`-(n + 1)` on it, with :math:`p_n = B_n = \sqrt{2n + 1}`. So with
:math:`c = \alpha / t`, solving :math:`(1 - c A)\, y = m` is a linear scan over n, and what enters it at n = 0 is u:

.. math::
    s_0 = -u, \qquad s_{n+1} = a_n s_n + w_n m_n, \qquad m'_n = g_n m_n + q_n s_n, \\
    d_n = 1 + c (n + 1), \quad a_n = \frac{1 - c n}{d_n}, \quad w_n = \frac{p_n}{d_n}, \quad
    q_n = -\frac{c}{\alpha} w_n, \quad g_n = \frac{1}{\alpha d_n} - \frac{1 - \alpha}{\alpha} .

Every :math:`|a_n|` is at most 1. Of larger orders the scan is cut into blocks of about :math:`\sqrt N` places: within
them, and over them, it is a matrix product, with matrices that are products of a, made for many steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops import linear_scan

# Orders up to this have one block: their matrices are small, and a step is two operations.
_DENSE = 64


class DenseStep(NamedTuple):
    """A step by its matrices: A_bar^T (N, N) or (rows, N, N), and B_bar (N,) or (rows, 1, N)."""

    A_bar: Tensor
    B_bar: Tensor

    def ahead(self, memory: Tensor, u: Tensor) -> Tensor:
        """memory (rows, signals, N) and u (rows, signals) to the next memory."""
        return torch.addcmul(memory @ self.A_bar, u[..., None], self.B_bar)

    def back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of memory and u, of that of the next memory."""
        return gradient @ self.A_bar.mT, (gradient * self.B_bar).sum(-1)


class BlockStep(NamedTuple):
    """One step of each of ``clocks`` memories; ``blocks * size`` is N.

    Attributes:
        within: (clocks * blocks, size, size + 1), from a block's m to its own m', and to what it adds to s behind it.
        across: (clocks, blocks, blocks), from -u and what the blocks but the last add to s where each block begins.
        entered: (clocks, blocks, 1, size), from s where a block begins to its m'.
    """

    within: Tensor
    across: Tensor
    entered: Tensor

    def ahead(self, memory: Tensor, u: Tensor) -> Tensor:
        """As of :class:`DenseStep`, with rows a multiple of the clocks."""
        clocks, blocks, _, size = self.entered.shape
        m = memory.view(clocks, -1, blocks, size).transpose(1, 2)  # (clocks, blocks, rows and signals, size)
        found = torch.bmm(m.flatten(0, 1), self.within).view(*m.shape[:3], size + 1)
        into = torch.cat((-u.view(clocks, 1, -1), found[:, :-1, :, size]), dim=1)
        starts = torch.bmm(self.across, into)
        return torch.addcmul(found[..., :size], starts[..., None], self.entered).transpose(1, 2).reshape(memory.shape)

    def back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """As of :class:`DenseStep`."""
        clocks, blocks, _, size = self.entered.shape
        given = gradient.view(clocks, -1, blocks, size).transpose(1, 2)
        starts = torch.matmul(given, self.entered.mT).squeeze(-1)
        into = torch.bmm(self.across.mT, starts)
        added = F.pad(into[:, 1:], (0, 0, 0, 1))[..., None]
        own = torch.bmm(torch.cat((given, added), dim=-1).flatten(0, 1), self.within.mT).view(given.shape)
        return own.transpose(1, 2).reshape(gradient.shape), -into[:, 0].reshape(gradient.shape[:-1])


def block_size(order: int) -> int:
    """Places of a block: all, or the divisor of the order that is nearest to its root."""
    if order <= _DENSE:
        return order
    return next(size for size in range(math.isqrt(order), 0, -1) if order % size == 0)


def numbers(order: int) -> int:
    """Of a step's matrices."""
    size = block_size(order)
    return order * (size + 2) + (order // size) ** 2


def legs_steps(
    order: int, clock: Tensor, steps: int, alpha: float, dtype: torch.dtype
) -> Sequence[DenseStep | BlockStep]:
    """The steps that follow.

    Args:
        order: N.
        clock: (clocks,) integers, the steps before.
        steps: how many.
        alpha: 1/2 "bilinear", 1 "backward_euler".
        dtype: of the results.
    """
    clocks, size, device = len(clock), block_size(order), clock.device
    n = torch.arange(order, device=device, dtype=dtype)
    rate = 1 / (clock + torch.arange(1, steps + 1, device=device)[:, None]).to(dtype)[..., None]
    c = alpha * rate
    d = 1 + c * (n + 1)
    w = torch.sqrt(2 * n + 1) / d
    # (steps * clocks * blocks, size)
    a, w, q, g = (
        part.reshape(-1, size) for part in ((1 - c * n) / d, w, -rate * w, 1 / (alpha * d) - (1 - alpha) / alpha)
    )
    before = F.pad(a, (1, 0), value=1.0)
    within = _products(before, torch.diag_embed(w, offset=-1)[..., :-1]) * F.pad(q, (0, 1), value=1.0)[..., None]
    within[:, :-1].diagonal(dim1=1, dim2=2).add_(g)
    passed = before.cumprod(1)
    entered = (q * passed[:, :-1]).view(steps, clocks, -1, 1, size)
    within = within.mT.unflatten(0, (steps, -1))
    if size == order:
        A_bar, B_bar = within[..., :-1], -entered[:, :, 0]
        if clocks == 1:
            A_bar, B_bar = A_bar[:, 0], B_bar[:, 0, 0]
        return [DenseStep(*step) for step in zip(A_bar.unbind(0), B_bar.unbind(0), strict=True)]
    blocks = F.pad(passed[:, -1].view(steps * clocks, -1), (1, 0), value=1.0)[:, :-1]
    across = _products(blocks, torch.eye(blocks.shape[1], device=device, dtype=dtype).expand(len(blocks), -1, -1))
    parts = within, across.unflatten(0, (steps, clocks)), entered
    return [BlockStep(*step) for step in zip(*(part.unbind(0) for part in parts), strict=True)]


def _products(a: Tensor, seeds: Tensor) -> Tensor:
    """Seeds (rows, places, columns), each times the a (rows, places) of the places behind it, up to every place."""
    products = linear_scan(a[..., None], seeds)
    assert isinstance(products, Tensor)
    return products
