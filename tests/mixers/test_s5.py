"""S5 against the dense system that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError
from longscan.mixers import S5
from longscan.statespace import transition


def dense(mixer: S5, u: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """The paper's recurrence with all conjugate pairs written out, in steps: u (length, d_model)."""
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag)
    A, dt = torch.cat((A, A.conj())), mixer.log_dt.exp().repeat(2)
    B, C = torch.view_as_complex(mixer.B), torch.view_as_complex(C)
    B, C = torch.cat((B, B.conj())), torch.cat((C, C.conj()), 1)
    if mixer.discretisation == "zoh":
        A_bar, scale = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        A_bar, scale = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    h, outputs = torch.zeros_like(A), []
    for step in u:
        h = A_bar * h + scale * (B @ step.to(B.dtype))
        outputs.append(C @ h)
    y = torch.stack(outputs)
    assert float(y.imag.detach().abs().max()) < 1e-10
    return y.real


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_the_dense_system(discretisation: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    mixer = S5(3, d_state=8, blocks=2, discretisation=discretisation, bidirectional=bidirectional).double()
    x = torch.randn(1, 11, 3, dtype=torch.float64)
    y = dense(mixer, x[0], mixer.C[0]) + mixer.D * x[0]
    if bidirectional:
        y = y + dense(mixer, x[0].flip(0), mixer.C[1]).flip(0)
    y = F.gelu(y)
    y = y * torch.sigmoid(mixer.gate(y))
    torch.testing.assert_close(mixer(x)[0][0], y, rtol=1e-9, atol=1e-10)


def test_it_starts_as_the_normal_part_of_hippo() -> None:
    """All pairs together have the eigenvalues of A + P P^T / 1 of HiPPO-LegS, J times over."""
    mixer = S5(2, d_state=12, blocks=2)
    A, _ = transition("legs", 6)
    P = torch.sqrt(torch.arange(6, dtype=torch.float64) + 0.5)
    expected = torch.linalg.eigvals(A + P[:, None] * P).imag.sort().values
    half = mixer.A_imag.view(2, 3)
    for block in half.double():
        torch.testing.assert_close(torch.cat((block, -block)).sort().values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer.A_log, torch.full((6,), 0.5).log())


def test_a_bidirectional_mixer_sees_the_future_of_its_own_sequence_only() -> None:
    mixer = S5(3, d_state=4, bidirectional=True).double()
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    packed, _ = mixer(x, cu_seqlens=torch.tensor([0, 4, 9]))
    separate = torch.cat((mixer(x[:, :4])[0], mixer(x[:, 4:])[0]), 1)
    torch.testing.assert_close(packed, separate)
    changed = x.clone()
    changed[0, 3] += 1
    assert not torch.equal(mixer(changed, cu_seqlens=torch.tensor([0, 4, 9]))[0][0, 0], packed[0, 0])


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="multiple of twice the blocks"):
        S5(4, d_state=6, blocks=2)
    with pytest.raises(ArgumentError, match="discretisation must be one of"):
        S5(4, discretisation="euler")
    with pytest.raises(ArgumentError, match="it has no state to carry"):
        S5(4, bidirectional=True).initial_state(1)
    with pytest.raises(ArgumentError, match="S5 mixes channels"):
        S5(4).convolution_kernel(3)
