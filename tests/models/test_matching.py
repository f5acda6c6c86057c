"""Widths that give models of about one number of parameters."""

from __future__ import annotations

import pytest

from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models.matching import contestant, match, parameters


@pytest.mark.parametrize("name", ["s4d", "retnet", "attention", "lstm", "h3/s4d", "mamba/s6", "ungated/s6"])
def test_widths_match_parameters(name: str) -> None:
    shape = LanguageModelConfig(64, 2, 256, d_intermediate=96)
    target = parameters(shape)
    assert target == LanguageModel(shape).num_parameters()
    matched = match(contestant(name, shape), target)
    assert abs(parameters(matched) / target - 1) < 0.06
    assert matched.d_intermediate == 4 * round(1.5 * matched.d_model / 4)
    # No neighbour comes nearer.
    for step in (-4, 4):
        width = matched.d_model + step
        other = LanguageModelConfig.from_dict(
            {**matched.to_dict(), "d_model": width, "d_intermediate": 4 * round(1.5 * width / 4)}
        )
        assert abs(parameters(other) - target) >= abs(parameters(matched) - target)


def test_widths_are_of_the_multiple_that_was_asked_for() -> None:
    matched = match(LanguageModelConfig(64, 2, 256, "attention", {"n_heads": 3}), 50_000, multiple=32)
    assert matched.d_model % 96 == 0


def test_no_width_at_all() -> None:
    with pytest.raises(ArgumentError, match="no width of 'attention' gives a model"):
        match(LanguageModelConfig(4, 1, 16, "attention", {"head_dim": 3}), 1000)
