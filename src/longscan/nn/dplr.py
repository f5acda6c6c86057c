r"""Systems whose A is diagonal plus low rank: their bilinear step, their kernel, and what goes through many steps.

Per channel :math:`\Delta A = \mathrm{diag}(w) - P P^*` and, by the bilinear rule,
:math:`\bar A = (I - \Delta A / 2)^{-1} (I + \Delta A / 2)`. Of each conjugate pair one is kept: w (channels, n)
complex, P (rank, channels, n), states (..., channels, n), with n half the order N. Both w and P are scaled by the step.

Gu, Goel and Re 2021 (S4, arXiv 2111.00396), appendix C.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops import cauchy


def half_step(w: Tensor, P: Tensor, h: Tensor) -> Tensor:
    """``(I + Delta A / 2) h``."""
    return h + (w * h - _outer(P, _inner(P, h))) / 2


def solve(w: Tensor, P: Tensor, h: Tensor) -> Tensor:
    """``(I - Delta A / 2)^-1 h``, by Woodbury's identity: a step is `half_step`, the input, and this."""
    inverse = 1 / (1 - w / 2)
    scaled = inverse * P
    small = 2 * torch.eye(P.shape[0], dtype=w.real.dtype, device=w.device) + _inner(P, scaled).permute(1, 2, 0)
    # Its symmetric part is at least 2: an inverse exists.
    right = torch.linalg.inv_ex(small).inverse @ _inner(P, inverse * h)[..., None]
    return inverse * h - _outer(scaled, right.squeeze(-1))


def generated(w: Tensor, P: Tensor, C: Tensor, B: Tensor, length: int) -> Tensor:
    r"""Kernels from their generating function at the roots of unity.

    .. math::
        \frac{2}{1 + z} C (s - \Delta A)^{-1} B, \qquad s = 2 \frac{1 - z}{1 + z} = 2 i \tan(\theta / 2)

    Args:
        C: (channels, n), truncated at `size(length)` steps, see `truncated`.
        B: (kernels, channels, n), scaled by Delta.

    Returns:
        (kernels, channels, length), real.
    """
    whole = size(length)
    rank = P.shape[0]
    place = torch.arange(whole // 2, device=w.device).to(w.real.dtype)
    # The tangent of an angle near a right one, from what is missing to it.
    near, far = torch.tan(place * (math.pi / whole)), torch.tan((whole // 2 - place) * (math.pi / whole))
    tangent = torch.where(place < whole // 4, near, 1 / far)
    left, right = torch.cat((C[None], torch.conj_physical(P))), torch.cat((P, B))
    table = cauchy(left[:, None] * right, torch.complex(torch.zeros_like(tangent), 2 * tangent), w)
    # Woodbury's identity, one column of P at a time; real parts of the pivots are at least 1.
    for _ in range(rank):
        pivot = 1 + table[1, 0]
        table = torch.cat((table[:1], table[2:]))[:, 1:] - (
            torch.cat((table[:1, 0], table[2:, 0]))[:, None] * (table[1, 1:] / pivot)
        )
    spectrum = table[0] * torch.complex(torch.ones_like(tangent), tangent)
    # At z = -1 s is infinite, and the limit C B / 2.
    last = (C * B).sum(-1, keepdim=True).real
    spectrum = torch.cat((spectrum, last.to(spectrum.dtype)), dim=-1)
    return torch.fft.irfft(spectrum, whole)[..., :length]


def size(length: int) -> int:
    """How many roots of unity a kernel of this length is made of: a power of two, at least 2."""
    return max(2, 1 << (length - 1).bit_length())


def powers(w: Tensor, P: Tensor, length: int) -> list[Tensor]:
    """A_bar to the powers 1, 2, 4, .. size(length), real matrices (channels, N, N) over real parts, then imaginary."""
    states = w.shape[1]
    basis = torch.eye(2 * states, dtype=w.real.dtype, device=w.device)[:, None]
    columns = _real(solve(w, P, half_step(w, P, _complex(basis).expand(-1, *w.shape))))
    stages = [columns.permute(1, 2, 0)]
    for _ in range(size(length).bit_length() - 1):
        stages.append(stages[-1] @ stages[-1])
    return stages


def truncated(C: Tensor, power: Tensor) -> Tensor:
    """``C (I - A_bar^S)``, given A_bar^S: C (..., channels, n)."""
    row = _real(torch.conj_physical(C))[..., None, :]
    return torch.conj_physical(_complex((row - row @ power).squeeze(-2)))


def advanced(h: Tensor, stages: list[Tensor], lengths: Tensor) -> Tensor:
    """``A_bar^length h``: h (rows, channels, n), and each row's own length, at most that of the stages."""
    x, lengths = _real(h)[..., None], lengths.to(h.device)[:, None, None, None]
    for bit, stage in enumerate(stages):
        x = torch.where((lengths >> bit) % 2 == 1, stage @ x, x)
    return _complex(x.squeeze(-1))


def pulled(stages: list[Tensor], B_bar: Tensor, values: Tensor) -> Tensor:
    """``sum_l A_bar^l B_bar values_l``: values (rows, channels, length) and B_bar (channels, n) to (rows, channels, n).

    In memory of order N sqrt(length): first over stretches of time, by the first powers' columns; then stretches are
    joined in pairs.
    """
    columns, bit = _real(B_bar)[..., None], 0
    while columns.shape[-1] ** 2 < values.shape[-1]:
        columns = torch.cat((columns, stages[bit] @ columns), dim=-1)
        bit += 1
    stretch = columns.shape[-1]
    whole = max(stretch, 1 << (values.shape[-1] - 1).bit_length())
    grid = F.pad(values, (0, whole - values.shape[-1])).unflatten(-1, (whole // stretch, stretch))
    sums = grid @ columns.mT
    while sums.shape[-2] > 1:
        sums = sums[..., 0::2, :] + sums[..., 1::2, :] @ stages[bit].mT
        bit += 1
    return _complex(sums.squeeze(-2))


def _real(h: Tensor) -> Tensor:
    return torch.cat((h.real, h.imag), dim=-1)


def _complex(x: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _inner(P: Tensor, h: Tensor) -> Tensor:
    """``P* h`` over whole pairs, real: h (..., channels, n) to (..., channels, rank)."""
    return 2 * (torch.conj_physical(P).transpose(0, 1) * h[..., None, :]).sum(-1).real


def _outer(P: Tensor, x: Tensor) -> Tensor:
    """``P x``: x (..., channels, rank) to (..., channels, n)."""
    return (P.transpose(0, 1) * x[..., None]).sum(-2)
