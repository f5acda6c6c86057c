"""Configurations: JSON and back, and errors that say what was meant."""

from __future__ import annotations

import json

import pytest
import torch

from longscan.errors import ConfigError
from longscan.mixers import RWKV4, RWKV4Channels
from longscan.models import PRESETS, LanguageModel, LanguageModelConfig

MIXED = LanguageModelConfig(
    d_model=16,
    n_layer=3,
    vocab_size=11,
    mixer=("mamba", "attention"),
    mixer_options={"attention": {"n_heads": 2}},
    d_intermediate=24,
)


@pytest.mark.parametrize("config", [LanguageModelConfig(), MIXED, *map(LanguageModelConfig.preset, PRESETS)])
def test_round_trip(config: LanguageModelConfig) -> None:
    assert LanguageModelConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["d_model"] == config.d_model


def test_mixers_cycle_over_layers() -> None:
    assert [MIXED.mixer_of(layer) for layer in range(3)] == ["mamba", "attention", "mamba"]
    assert MIXED.options_of("attention") == {"n_heads": 2}
    assert MIXED.options_of("mamba") == {}


def test_layers_that_start_by_their_place_are_told() -> None:
    """RWKV-4's blocks are two layers each."""
    config = LanguageModelConfig(8, 4, 11, ("rwkv4", "rwkv4_channels"), {"rwkv4_channels": {"depth": 0.25}})
    mixers = [block.mixer for block in LanguageModel(config).backbone.blocks]
    for mixer, expected in zip(
        mixers,
        (RWKV4(8, depth=0), RWKV4Channels(8, depth=0.25), RWKV4(8, depth=0.5), RWKV4Channels(8, depth=0.25)),
        strict=True,
    ):
        starts = [name for name, _ in expected.named_parameters() if name.startswith("time_")]
        assert starts
        for name in starts:
            assert torch.equal(mixer.get_parameter(name), expected.get_parameter(name))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"d_modell": 3}, r"'d_modell' \(did you mean 'd_model'\?\); allowed: d_model, n_layer"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1, got 0"),
        ({"n_layer": True}, "n_layer"),
        ({"d_model": "wide"}, "d_model must be an integer"),
        ({"norm_eps": 0}, "norm_eps must be a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm": "batch"}, "norm must be one of rms, layer; got 'batch'"),
        ({"prenorm": 1}, "prenorm must be true or false"),
        ({"mlp": "swish"}, "mlp must be one of gated, relu, gelu, gelu_tanh; got 'swish'"),
        ({"positions": ["learned"]}, "positions must be one of none, sinusoidal, learned"),
        ({"positions": "learned"}, "max_positions must be the longest sequence's tokens with learned positions"),
        ({"max_positions": 9}, "0 with others; got 9 with positions 'none'"),
        ({"tie_embeddings": "yes"}, "tie_embeddings must be true or false"),
        ({"mixer": "mambo"}, r"'mambo' is not registered \(did you mean 'mamba'\?\); known: mamba"),
        ({"mixer": []}, "mixer must be a name"),
        ({"mixer": 3}, "mixer must be a name"),
        ({"mixer_options": {"d_stat": 3}}, r"'mamba' has no option 'd_stat' \(did you mean 'd_state'\?\)"),
        ({"mixer_options": {"device": "cpu"}}, "no option 'device'"),
        ({"mixer_options": 3}, "mixer_options must be a mapping"),
        ({"mixer": ["mamba", "s4d"], "mixer_options": {"d_state": 3}}, r"like \{'mamba': \{\.\.\.\}\}"),
        ({"mixer": ["mamba", "s4d"], "mixer_options": {"s4d": {"d_conv": 3}}}, "'s4d' has no option 'd_conv'"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LanguageModelConfig.from_dict(values)


def test_json_that_is_none() -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        LanguageModelConfig.from_json("{")
    with pytest.raises(ConfigError, match="mapping"):
        LanguageModelConfig.from_json("[]")


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mamba-130m", 129),
        ("mamba-370m", 372),
        ("mamba-790m", 793),
        ("mamba-1.4b", 1372),
        ("mamba-2.8b", 2768),
        ("transformer++-125m", 124),
        ("transformer++-350m", 360),
    ],
)
def test_presets_have_their_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LanguageModel.from_config(name)
    assert round(model.num_parameters() / 1e6) == millions


def test_preset_names() -> None:
    assert LanguageModelConfig.preset("mamba-130m", n_layer=2).n_layer == 2
    with pytest.raises(ConfigError, match=r"did you mean 'mamba-130m'"):
        LanguageModelConfig.preset("mamba-130")
    with pytest.raises(ConfigError, match="n_layers"):
        LanguageModelConfig.preset("mamba-130m", n_layers=2)


def test_padding() -> None:
    assert LanguageModelConfig(vocab_size=50277).padded_vocab_size == 50280
    assert LanguageModelConfig(vocab_size=256).padded_vocab_size == 256
