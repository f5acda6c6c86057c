"""Linear attention: against its formula over all pairs of times, and its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError
from longscan.mixers import LinearAttention


def test_it_is_attention_with_positive_features() -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(12, n_heads=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in mixer.in_proj(x).chunk(3, dim=-1))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)).tril()
    y = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y.transpose(1, 2).flatten(2)))


def test_the_state_is_one_matrix_a_head() -> None:
    mixer = LinearAttention(128).to(torch.bfloat16)
    assert (mixer.n_heads, mixer.head_dim) == (2, 64)
    state = mixer.initial_state(3)
    assert state.memory.shape == (3, 2, 64, 65)
    assert state.memory.dtype == torch.float32
    assert mixer.state_bytes(3, 10**6) == 3 * 128 * 65 * 4


@torch.no_grad()
def test_a_million_steps() -> None:
    """Sums of 2^20 terms in float32 are those of float64, and the state stays as large as they are."""
    torch.manual_seed(0)
    mixer = LinearAttention(2)
    exact = LinearAttention(2).double()
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 2**20, 2)
    y, state = mixer(x, mixer.initial_state(1))
    torch.testing.assert_close(y.double(), exact(x.double())[0], rtol=0, atol=1e-5)
    assert 2**18 < state.memory[..., -1].amax() < 2**24


@pytest.mark.parametrize("options", [{"n_heads": 3}, {"n_heads": 0}, {"eps": 0.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        LinearAttention(8, **options)  # type: ignore[arg-type]
