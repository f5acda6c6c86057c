r"""HiPPO's matrices as normal plus low rank, ``A = V (diag(w) - P P*) V*`` with V unitary.

Gu, Goel and Re 2021 (S4, arXiv 2111.00396, theorem 1). With P real and of one or two columns, A + P P^T is a multiple
of the identity plus a skew-symmetric matrix: normal, so that its eigenvectors are orthogonal, where those of A itself
are too ill-conditioned to use. Their product form with one P on both sides keeps A stable whatever P becomes in
training (Goel, Gu, Donahue and Re 2022, SaShiMi, arXiv 2202.09729, section 4.1).

===========  ====  ==========================================  =========
measure      rank  P                                           Re w
===========  ====  ==========================================  =========
``legs``     1     sqrt(n + 1/2)                               -1/2
``legt``     2     sqrt(2n + 1), even and odd n apart          0
``lagt``     1     sqrt(1/2)                                   -1/2
``fourier``  1     sqrt(2) times the basis at the present      0
===========  ====  ==========================================  =========
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.statespace.hippo import check_measure, fourier_now, transition


class NPLR(NamedTuple):
    """``A = V (diag(w) - P P*) V*`` and ``B``, complex128.

    Eigenvalues come in conjugate pairs: the first half of w, imaginary parts ascending from 0, then the conjugates of
    the first half in the same order; of an odd size the last is the one left over, which is real. Rows of P and B, and
    columns of V, are conjugates in the same manner, so that the first half stands for the whole.
    """

    #: (size,): eigenvalues of the normal part.
    w: Tensor
    #: (size, rank), in the basis of the eigenvectors.
    P: Tensor
    #: (size,), in that basis: V* times HiPPO's B.
    B: Tensor
    #: (size, size), unitary: eigenvectors are columns.
    V: Tensor


def nplr(measure: str, size: int) -> NPLR:
    """The normal-plus-low-rank form of :func:`longscan.statespace.transition`.

    Args:
        measure: "legs", "legt", "lagt" or "fourier".
        size: N, even for "fourier".

    Raises:
        ArgumentError: there is no such memory, or the measure is "lmu", whose basis is not normalised.
    """
    check_measure(measure, size)
    if measure == "lmu":
        raise ArgumentError("measure 'lmu' has no such form; 'legt' is the same memory in a normalised basis")
    A, B = transition(measure, size)
    P = _low_rank(measure, size)
    real = -0.5 if measure in ("legs", "lagt") else 0.0
    if measure == "fourier":
        # Written down, for the pair at frequency 0 has eigenvectors of any direction.
        pair = torch.tensor([1, -1j], dtype=torch.complex128) / math.sqrt(2)
        vectors = torch.kron(torch.eye(size // 2, dtype=torch.complex128), pair[:, None])
        frequencies = 2 * math.pi * torch.arange(size // 2, dtype=torch.float64)
    else:
        normal = A + P @ P.T
        skew = (normal - normal.T) / 2
        frequencies, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
        frequencies, vectors = frequencies[(size + 1) // 2 :], vectors[:, (size + 1) // 2 :]
    columns, imaginary = [vectors, vectors.conj()], [frequencies, -frequencies]
    if size % 2:
        columns.append(_null_vector(skew)[:, None].to(vectors.dtype))
        imaginary.append(torch.zeros(1, dtype=torch.float64))
    V, place = torch.cat(columns, dim=1), torch.cat(imaginary)
    w = torch.complex(torch.full_like(place, real), place)
    adjoint = V.mH
    return NPLR(w, adjoint @ P.to(V.dtype), adjoint @ B.to(V.dtype), V)


def _low_rank(measure: str, size: int) -> Tensor:
    """P in HiPPO's own basis, (size, rank)."""
    n = torch.arange(size, dtype=torch.float64)
    if measure == "legs":
        return torch.sqrt(n + 0.5)[:, None]
    if measure == "lagt":
        return torch.full((size, 1), math.sqrt(0.5), dtype=torch.float64)
    if measure == "fourier":
        return math.sqrt(2) * fourier_now(size)[:, None]
    return torch.sqrt(2 * n + 1)[:, None] * torch.stack((1 - n % 2, n % 2), dim=1)


def _null_vector(skew: Tensor) -> Tensor:
    """The real unit vector that a skew-symmetric matrix of odd size takes to 0."""
    return torch.linalg.svd(skew).Vh[-1]
