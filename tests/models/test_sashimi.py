from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longscan.errors import ArgumentError, ConfigError
from longscan.models import Sashimi, SashimiConfig
from longscan.nn import State

SHAPES = {
    "s4d": {"mixer": "s4d", "mixer_options": {"d_state": 4}},
    "mamba": {"mixer": "mamba", "mixer_options": {"d_state": 4}, "pool": (3,), "mlp_expand": 0, "norm": "rms"},
    "h3": {"mixer": ("s6", "attention"), "block": "h3", "pool": (2, 2, 2)},
    "centre": {"mixer": "lstm", "pool": ()},
    "mixed": {"mixer": "s4d", "centre": {"mixer": "mamba", "mlp_expand": 0}},
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def make(shape: str) -> Sashimi:
    torch.manual_seed(0)
    values = {"d_model": 4, "n_layer": 2, "pool": (2, 3), "vocab_size": 9, **SHAPES[shape]}
    return Sashimi(SashimiConfig.from_dict(values)).double()


@shapes
@pytest.mark.parametrize("sizes", [(1,) * 14, (5, 1, 8), (14,), (2, 12)])
def test_whole_is_cut_anywhere(shape: str, sizes: tuple[int, ...]) -> None:
    model = make(shape)
    samples = torch.randint(9, (2, 14))
    whole, nothing = model(samples)
    assert nothing is None
    state: State | None = model.initial_state(2)
    outputs = []
    for piece in samples.split(list(sizes), dim=1):
        scores, state = model(piece, state)
        outputs.append(scores)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-9)


@shapes
def test_the_future_cannot_alter_the_past(shape: str) -> None:
    model = make(shape)
    samples = torch.randint(9, (1, 14))
    whole, _ = model(samples)
    for place in range(14):
        changed = samples.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 9
        scores, _ = model(changed)
        torch.testing.assert_close(scores[:, :place], whole[:, :place], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(scores[:, place], whole[:, place])


def test_inner_stages_reach_the_output() -> None:
    model = make("s4d")
    samples = torch.randint(9, (2, 14))
    model.loss(samples, samples).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.net.inner.inner.parameters())


def test_generation_is_of_the_whole_models_scores(tmp_path: Path) -> None:
    model = make("mamba")
    prompt = torch.randint(9, (2, 4))
    made = model.generate(prompt, 10, temperature=0)
    scores, _ = model(torch.cat((prompt, made), dim=1))
    assert torch.equal(scores[:, 3:-1].argmax(-1), made)
    assert torch.equal(model.generate(prompt, 10, seed=1), model.generate(prompt, 10, seed=1))
    assert model.generate(prompt, 0).shape == (2, 0)
    model.float().save_pretrained(tmp_path)
    again = Sashimi.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(prompt)[0], model(prompt)[0])


def test_a_state_can_be_selected_and_saved(tmp_path: Path) -> None:
    model = make("s4d")
    samples = torch.randint(9, (3, 5))
    _, state = model(samples, model.initial_state(3))
    assert state is not None
    state.save(tmp_path / "state.safetensors")
    chosen = State.load(tmp_path / "state.safetensors").select([2])
    more = torch.randint(9, (3, 4))
    torch.testing.assert_close(model(more[2:], chosen)[0], model(more, state)[0][2:])


def test_what_goes_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="pool"):
        SashimiConfig(pool=(1,))
    with pytest.raises(ConfigError, match="norm"):
        SashimiConfig(norm="batch")
    model = make("s4d")
    with pytest.raises(ArgumentError, match="samples"):
        model(torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match=r"0 \.\. 8"):
        model(torch.full((1, 2), 9))
    with pytest.raises(ArgumentError, match="2 sequences, the input has 1"):
        model(torch.zeros(1, 2, dtype=torch.int64), model.initial_state(2))
    with pytest.raises(ArgumentError, match="temperature"):
        model.generate(torch.zeros(1, 2, dtype=torch.int64), 2, temperature=-1)


def test_what_is_told_while_it_goes_on() -> None:
    told: list[int] = []
    make("mamba").generate(torch.randint(9, (1, 3)), 4, seed=0, begun=told.append)
    assert told == [0, 1, 2, 3]


def test_another_centre() -> None:
    values = {"d_model": 4, "n_layer": 2, "pool": (2,), "vocab_size": 9, "mixer": "s4d"}
    centre = {"mixer": "mamba", "mlp_expand": 0, "n_layer": 3}
    model = Sashimi(SashimiConfig.from_dict({**values, "centre": centre}))
    assert [type(mixer).__name__ for mixer in model.net.inner.mixers] == ["Mamba"] * 3
    assert [type(mixer).__name__ for mixer in model.net.down.mixers + model.net.up.mixers] == ["S4D"] * 4
    assert SashimiConfig.from_json(model.config.to_json()) == model.config
    plain = Sashimi(SashimiConfig.from_dict({**values, "centre": {}}))
    assert [type(mixer).__name__ for mixer in plain.net.inner.mixers] == ["S4D"] * 2
    for wrong, word in (
        ({"pool": [2]}, "centre: unknown key 'pool'; allowed: n_layer, mixer"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1"),
        ({"mixer": "mambo"}, "did you mean 'mamba'"),
        ([1], "centre must be a mapping, got list"),
    ):
        with pytest.raises(ConfigError, match=word):
            SashimiConfig.from_dict({**values, "centre": wrong})
