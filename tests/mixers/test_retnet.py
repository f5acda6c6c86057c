"""RetNet: the parallel form of the paper, decays, rotation and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError
from longscan.mixers import RetNet


@pytest.mark.parametrize("gamma", ["powers", "paper"])
def test_it_is_its_parallel_form(gamma: str) -> None:
    """Equation 5 and 8 with complex rotations, as the paper derives them: features in pairs are complex numbers."""
    torch.manual_seed(0)
    mixer = RetNet(12, n_heads=3, gamma=gamma).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v, gate = mixer.in_proj(x).split([12, 12, 24, 24], dim=-1)
    q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in (q, k, v))
    n = torch.arange(9.0, dtype=torch.float64)
    turn = torch.polar(torch.ones(9, 2, dtype=torch.float64), n[:, None] * 10000.0 ** -(torch.arange(2) / 2).double())
    q, k = (torch.complex(*part.chunk(2, dim=-1)) * turn for part in (q, k))
    heads = torch.arange(3.0).double()
    decay = 1 - 2 ** (-5 - heads)
    if gamma == "paper":
        decay = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), 3).double().exp()
    D = (decay[:, None, None] ** (n[:, None] - n)).tril()
    y = (((q / 2) @ k.conj().transpose(-1, -2)).real * D) @ v
    y = F.group_norm(y.transpose(1, 2).flatten(0, 1).flatten(1), 3, eps=1e-6).unflatten(0, (2, 9))
    # `rotate` computes its angles in float32.
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(F.silu(gate) * y), rtol=1e-5, atol=1e-6)


def test_positions_are_relative() -> None:
    """What a state remembers does not depend on how long ago its stream began."""
    torch.manual_seed(0)
    mixer = RetNet(8, n_heads=2)
    x = torch.randn(1, 6, 8)
    fresh = mixer.initial_state(1)
    late = type(fresh)(fresh.memory, fresh.lengths + 1000)
    torch.testing.assert_close(mixer(x, late)[0], mixer(x, fresh)[0], rtol=1e-3, atol=1e-4)
    assert mixer(x, late)[1].lengths.tolist() == [1006]


@torch.no_grad()
def test_a_million_steps() -> None:
    """gamma^-n, which quotients of decays would be made of, is e^33000 by then. What is left is the last stretch's."""
    torch.manual_seed(0)
    mixer = RetNet(2, n_heads=1, expand=1)
    x = torch.randn(1, 2**20, 2)
    y, state = mixer(x, mixer.initial_state(1))
    alone, own = mixer(x[:, -4096:], mixer.initial_state(1))
    torch.testing.assert_close(y[:, -512:], alone[:, -512:], rtol=0, atol=1e-4)
    # Of keys that have turned on, the state is another one, but as large.
    torch.testing.assert_close(state.memory.norm(), own.memory.norm(), rtol=1e-4, atol=0)
    assert state.lengths.tolist() == [2**20]


def test_scales_of_a_head_are_normalised_away() -> None:
    """So the paper's normalisations of decays and states change nothing."""
    mixer = RetNet(8, n_heads=2, norm_eps=1e-20).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    before, _ = mixer(x)
    with torch.no_grad():
        mixer.in_proj.weight[:8] *= 5
    torch.testing.assert_close(mixer(x)[0], before)


def test_decays_stay_exact_in_low_precision() -> None:
    mixer = RetNet(64, n_heads=8).to(torch.bfloat16)
    decays = mixer.log_decay(torch.device("cpu")).exp()
    torch.testing.assert_close(decays, 1 - 2 ** (-5 - torch.arange(8.0)), rtol=0, atol=1e-7)


def test_it_starts_as_the_authors_code() -> None:
    torch.manual_seed(0)
    mixer = RetNet(128, n_heads=1)
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes == {"in_proj.weight": (128 * 6, 128), "out_proj.weight": (128, 256)}
    parts = mixer.in_proj.weight.split([128, 128, 256, 256])
    for part in parts:
        bound = 2**-2.5 * math.sqrt(6 / sum(part.shape))
        assert 0.95 * bound < part.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"n_heads": 8}, "even parts"),
        ({"expand": 0}, "expand"),
        ({"gamma": "none"}, "gamma must be one of powers, paper"),
        ({"norm_eps": 0}, "norm_eps"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        RetNet(8, **options)  # type: ignore[arg-type]
