"""Attention: against its formula, positions, and a cache that grows in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import Attention
from longscan.mixers.attention import AttentionState
from longscan.nn import rotate


def test_it_is_its_formula() -> None:
    torch.manual_seed(0)
    mixer = Attention(12, n_heads=3, n_kv_heads=1).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in mixer.in_proj(x).split([12, 4, 4], dim=-1))
    positions = torch.arange(5)[None]
    scores = rotate(q, positions) @ rotate(k, positions).transpose(-1, -2) / 2
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = mixer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_positions_are_relative() -> None:
    q, k = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)
    here, later = (
        rotate(q, p) @ rotate(k, p).transpose(-1, -2) for p in (torch.arange(6)[None], torch.arange(6)[None] + 50)
    )
    torch.testing.assert_close(here, later, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_grows_in_stretches_and_is_reused() -> None:
    mixer = Attention(8, n_heads=2)
    state, addresses = mixer.initial_state(2), set()
    for _ in range(200):
        _, state = mixer.step(torch.randn(2, 8), state, inplace=True)
        assert isinstance(state, AttentionState)
        addresses.add(state.keys.data_ptr())
    assert state.used == 200
    assert state.lengths.tolist() == [200, 200]
    assert len(addresses) <= 5
    assert state.nbytes <= 1.6 * mixer.state_bytes(2, 200)


@torch.no_grad()
def test_ragged_states_join() -> None:
    mixer = Attention(8, n_heads=2)
    pasts = [torch.randn(1, length, 8) for length in (3, 1, 6)]
    states = [mixer(past, mixer.initial_state(1))[1] for past in pasts]
    joined = AttentionState.cat([state for state in states if state is not None])
    x = torch.randn(3, 2, 8)
    y, _ = mixer(x, joined)
    for row, past in enumerate(pasts):
        whole, _ = mixer(torch.cat([past, x[row : row + 1]], dim=1))
        torch.testing.assert_close(y[row : row + 1], whole[:, -2:])


@pytest.mark.parametrize(
    "options",
    [{"n_heads": 3}, {"n_heads": 4, "n_kv_heads": 3}, {"n_heads": 8}, {"n_heads": 2, "head_dim": 3}, {"n_heads": 0}],
)
def test_options_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ArgumentError):
        Attention(8, **options)


def test_a_prompt_into_an_empty_state_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    attend = Attention._attend

    def spy(self: Attention, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        masks.append(visible is not None)
        return attend(self, queries, keys, values, visible)

    monkeypatch.setattr(Attention, "_attend", spy)
    mixer, x = Attention(8, n_heads=2), torch.randn(2, 6, 8)
    whole, _ = mixer(x)
    first, state = mixer(x[:, :4], mixer.initial_state(2))
    second, _ = mixer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert masks == [False, False, True]
