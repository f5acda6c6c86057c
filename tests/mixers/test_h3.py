"""H3 against its two state space models walked step by step, as the paper writes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import H3


def naive(mixer: H3, x: Tensor) -> Tensor:
    """Shift SSM with its matrices, diagonal SSM with both halves of every conjugate pair, heads one by one."""
    batch, length, d_model = x.shape
    N, dim = mixer.d_shift, mixer.head_dim
    q, k, v = mixer.in_proj(x).split(d_model, dim=-1)
    A, B = torch.zeros(N, N, dtype=x.dtype), torch.zeros(N, dtype=x.dtype)
    A[range(1, N), range(N - 1)] = 1
    B[0] = 1
    log_A_bar, B_bar, C, D = mixer.system()
    A_bar = torch.cat((log_A_bar.exp(), log_A_bar.exp().conj()), 1)
    B_bar, C = (torch.cat((part, part.conj()), 1) for part in (B_bar, C))
    outputs = []
    shifted = torch.zeros(batch, d_model, N, dtype=x.dtype)
    memory = torch.zeros(batch, mixer.n_heads, dim, dim, A_bar.shape[1], dtype=torch.complex128)
    for t in range(length):
        shifted = shifted @ A.T + k[:, t, :, None] * B
        key = (shifted * mixer.shift_C).sum(-1) + mixer.shift_D * k[:, t]
        heads = []
        for h in range(mixer.n_heads):
            own = slice(h * dim, (h + 1) * dim)
            outer = key[:, own, None] * v[:, t, None, own]
            memory[:, h] = A_bar[h] * memory[:, h] + B_bar[h] * outer[..., None]
            S = (C[h] * memory[:, h]).sum(-1).real + D[h] * outer
            heads.append(torch.einsum("bkv,bk->bv", S, q[:, t, own]))
        outputs.append(torch.cat(heads, -1))
    return mixer.out_proj(torch.stack(outputs, 1))


@pytest.mark.parametrize("head_dim", [1, 3, 6])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@torch.no_grad()
def test_it_is_its_definition(head_dim: int, discretisation: str) -> None:
    torch.manual_seed(0)
    mixer = H3(6, head_dim=head_dim, d_state=8, d_shift=5, discretisation=discretisation).double()
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], naive(mixer, x), rtol=1e-9, atol=1e-9)


def test_the_skip_is_a_tap_of_the_shift() -> None:
    mixer = H3(2, d_state=2, d_shift=3).double()
    assert mixer.shift_kernel().shape == (2, 3)
    torch.testing.assert_close(mixer.shift_kernel()[:, 0], mixer.shift_C[:, 0] + mixer.shift_D)
    torch.testing.assert_close(mixer.shift_kernel()[:, 1:], mixer.shift_C[:, 1:])


@pytest.mark.parametrize("head_dim", [1, 4])
def test_state_does_not_grow(head_dim: int) -> None:
    mixer = H3(8, head_dim=head_dim, d_state=6, d_shift=4)
    assert mixer.state_bytes(2, 10_000) == mixer.state_bytes(2) == 2 * (3 * 8 * 4 + 8 * head_dim * 3 * 8)


def test_float32_is_near_float64_over_a_long_sequence() -> None:
    torch.manual_seed(0)
    mixer = H3(4, head_dim=2)
    x = torch.randn(1, 2048, 4)
    y = mixer(x)[0]
    exact = mixer.double()(x.double())[0]
    assert (y - exact).abs().max() < 1e-4 * exact.abs().max()


def test_options_that_make_no_sense() -> None:
    for options in ({"head_dim": 3}, {"head_dim": 0}, {"d_state": 3}, {"d_shift": 0}, {"discretisation": "euler"}):
        with pytest.raises(ArgumentError):
            H3(8, **options)  # type: ignore[arg-type]


def test_parameters_of_the_systems_are_not_decayed_and_stay_float32() -> None:
    mixer = H3(4).to(torch.bfloat16)
    for name in ("shift_C", "shift_D", "log_dt", "A_log", "A_imag", "C", "D"):
        parameter = getattr(mixer, name)
        assert parameter._no_weight_decay
        assert parameter.dtype == torch.float32
