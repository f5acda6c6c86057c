"""The grid of block shapes by inner mixers is a configuration."""

from __future__ import annotations

import pytest
import torch

from longscan import LanguageModel, LanguageModelConfig
from longscan.errors import ConfigError
from longscan.mixers import S6, Mamba
from longscan.models.formats import write_config
from longscan.nn.blocks import MambaBlock


def test_s6_in_the_mamba_block_is_mamba() -> None:
    torch.manual_seed(0)
    whole = Mamba(8, d_state=4, dt_rank=2).double()
    built = MambaBlock(8, S6(16, d_state=4, dt_rank=2)).double()
    names = {"x_proj": "inner.x_proj", "dt_proj": "inner.dt_proj", "A_log": "inner.A_log", "D": "inner.D"}
    weights = {}
    for name, tensor in whole.state_dict().items():
        first, _, rest = name.partition(".")
        weights[".".join(filter(None, (names.get(first, first), rest)))] = tensor
    built.load_state_dict(weights)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    y, state = whole(x, whole.initial_state(2))
    again, nested = built(x, built.initial_state(2))
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)
    for one, other in zip(nested.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", ["plain", "ungated", "h3", "mamba"])
@pytest.mark.parametrize(
    ("mixer", "options"),
    [("s4d", {"bare": True, "d_state": 4}), ("s6", {"d_state": 4}), ("hyena", {"bare": True, "filter_width": 4})],
)
def test_the_grid_is_a_configuration(block: str, mixer: str, options: dict[str, object]) -> None:
    around = {} if block == "plain" else {"d_conv": 3}
    config = LanguageModelConfig(16, 2, 17, mixer, options, block=block, block_options=around)
    assert LanguageModelConfig.from_json(config.to_json()) == config
    model = LanguageModel(config)
    tokens = torch.randint(17, (2, 6))
    whole, _ = model(tokens)
    state = model.initial_state(2)
    for t in range(6):
        logits, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-5)
    model.loss(tokens, tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_a_block_does_not_know_is_said() -> None:
    with pytest.raises(ConfigError, match=r"block must be one of plain, ungated, h3, mamba; got 'mumba'"):
        LanguageModelConfig(block="mumba")
    with pytest.raises(ConfigError, match=r"no option 'dconv' \(did you mean 'd_conv'\?\)"):
        LanguageModelConfig(block="h3", block_options={"dconv": 3})
    with pytest.raises(ConfigError, match="'plain' has no option 'expand'"):
        LanguageModelConfig(block_options={"expand": 3})
    with pytest.raises(ConfigError, match="no blocks around mixers"):
        write_config(LanguageModelConfig(block="h3"), "mamba-ssm")


def test_a_mixer_inside_a_block_keeps_its_own_start() -> None:
    config = LanguageModelConfig(16, 8, 17, "s4d", {"d_state": 4}, block="mamba")
    torch.manual_seed(0)
    layer = LanguageModel(config).backbone.blocks[0].mixer
    # Uniform in +- 1/sqrt(inputs): only the block's own projection, back to the stream, is divided by sqrt(layers).
    assert layer.inner.out_proj.weight.abs().amax() > 0.9 * 32**-0.5
    assert layer.out_proj.weight.abs().amax() < 32**-0.5 / 2
