"""How long channels remember, and how large their states are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.evaluation.memory import memory_lengths, state_norms
from longscan.models import LanguageModel
from longscan.plots.memory import plot_memory
from longscan.tasks.induction_heads import InductionHeads

TASK = InductionHeads(length=8, vocab=7)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_config({"vocab_size": 7, "d_model": 8, "n_layer": 2, "mixer": "mamba"})


def test_a_constant_step_and_decay_say_the_memory(model: LanguageModel) -> None:
    mixer = model.backbone.blocks[0].mixer
    with torch.no_grad():
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.copy_(torch.full((16,), 0.02).expm1().log())
        mixer.A_log[:, 0] = torch.arange(1.0, 17.0).log()
        mixer.A_log[:, 1:] = 5.0
    first, second = memory_lengths(model, torch.randint(0, 7, (2, 12)))
    # dt is 0.02 and the smallest |A| is 1, 2, 3, ...
    torch.testing.assert_close(first, 50 / torch.arange(1.0, 17.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert second.shape == (16,)


def test_norms_are_those_of_the_states(model: LanguageModel) -> None:
    tokens = torch.randint(0, 7, (3, 20))
    norms = state_norms(model, tokens, [4, 11, 20])
    for row, length in enumerate([4, 11, 20]):
        _, state = model.backbone(tokens[:, :length], model.initial_state(3))
        for layer in range(2):
            expected = state.layers[layer].ssm.square().mean((0, 2)).sqrt().double()
            torch.testing.assert_close(norms[layer][row], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lengths", [[0, 3], [4, 4], [5, 21], [9, 3]])
def test_lengths_rise_within_the_tokens(model: LanguageModel, lengths: list[int]) -> None:
    with pytest.raises(ArgumentError, match="lengths must rise from at least 1 to at most 20"):
        state_norms(model, torch.zeros(1, 20, dtype=torch.int64), lengths)


def test_it_is_drawn(model: LanguageModel, tmp_path: Path) -> None:
    assert plot_memory(model, TASK, tmp_path / "memory.png").stat().st_size > 10_000
