"""Mamba-2: its definition step by step, Transformers' numbers for the same weights, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError
from longscan.mixers import Mamba2


def moved(mixer: Mamba2) -> Mamba2:
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_state_space_model_of_the_paper(groups: int) -> None:
    """Channel by channel and step by step, with a diagonal A that is a multiple of the identity (section 2.3)."""
    torch.manual_seed(0)
    mixer = moved(Mamba2(6, d_state=5, head_dim=3, n_groups=groups, dt_limit=(0.02, 0.08)).double())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    z, mixed, raw = mixer.in_proj(x).split([12, 12 + 10 * groups, 4], dim=-1)
    padded = F.pad(mixed, (0, 0, 3, 0))
    mixed = sum(padded[:, tap : tap + 9] * mixer.conv1d.weight[:, 0, tap] for tap in range(4)) + mixer.conv1d.bias
    u, B, C = F.silu(mixed).split([12, 5 * groups, 5 * groups], dim=-1)
    dt = F.softplus(raw + mixer.dt_bias).clamp(0.02, 0.08)
    y = torch.empty_like(u)
    for channel in range(12):
        head = channel // 3
        group = head // (4 // groups)
        own = slice(5 * group, 5 * group + 5)
        h = torch.zeros(2, 5, dtype=torch.float64)
        for t in range(9):
            step = dt[:, t, head, None]
            h = torch.exp(-step * mixer.A_log[head].exp()) * h + step * B[:, t, own] * u[:, t, channel, None]
            y[:, t, channel] = (C[:, t, own] * h).sum(1) + mixer.D[head] * u[:, t, channel]
    parts = (y * F.silu(z)).chunk(groups, dim=-1)
    normed = torch.cat([part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in parts], dim=-1)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(normed * mixer.norm.weight))


@pytest.mark.parametrize(("groups", "length"), [(1, 70), (2, 33)])
def test_transformers_gives_the_same_numbers(groups: int, length: int) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    torch.manual_seed(0)
    config = modeling.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=16, n_groups=groups, chunk_size=16, num_hidden_layers=1
    )
    theirs = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    ours = Mamba2(16, d_state=16, head_dim=8, n_groups=groups)
    theirs.load_state_dict(moved(ours).state_dict())
    x = torch.randn(2, length, 16)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_it_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(2048, head_dim=8)
    assert mixer.n_heads == 512
    A, steps = -mixer.A.detach(), F.softplus(mixer.dt_bias.detach())
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert abs(float(A.mean()) - 8.5) < 0.6
    assert 0.000999 < steps.min() < 0.0011
    assert 0.09 < steps.max() < 0.10001
    assert abs(float(steps.log().mean()) - (math.log(0.001) + math.log(0.1)) / 2) < 0.15
    assert bool((mixer.D == 1).all())


def test_what_decides_over_time_stays_float32() -> None:
    mixer = Mamba2(8, d_state=4, head_dim=4).to(torch.bfloat16)
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {torch.float32}
    assert mixer.norm.weight.dtype == torch.bfloat16
    state = mixer.initial_state(2)
    y, state = mixer(torch.randn(2, 5, 8, dtype=torch.bfloat16), state)
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert state.ssm.shape == (2, 4, 4, 4)
    assert mixer.state_bytes() == 4 * 4 * 4 * 4 + 3 * (16 + 8) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "must be at least 1; .* d_state 0"),
        ({"head_dim": 5}, r"head_dim must divide expand \* d_model = 16"),
        ({"head_dim": 4, "n_groups": 3}, "n_groups the heads; got head_dim 4, n_groups 3"),
        ({"a_range": (0.0, 1.0)}, r"a_range must be two positive numbers.*\(0\.0, 1\.0\)"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit must be two numbers"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Mamba2(8, **options)
