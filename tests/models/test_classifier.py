from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from longscan.errors import ArgumentError, CheckpointError, ConfigError
from longscan.models import Classifier, ClassifierConfig

SMALL = {"d_model": 8, "n_layer": 2, "n_outputs": 3, "mixer_options": {"d_state": 4}}
SHAPES = [
    {"vocab_size": 11, "pooling": pooling, "direction": direction, "norm": norm}
    for (pooling, direction), norm in zip(
        itertools.product(("mean", "last", "max", "none"), ("forward", "sum", "concat")),
        itertools.cycle(("rms", "layer", "batch")),
    )
] + [{"d_input": 2, "mixer": "s4d", "prenorm": False, "d_intermediate": 10, "direction": "concat"}]


def make(**options: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(**{**SMALL, **options}))


def inputs(model: Classifier, batch: int, length: int) -> torch.Tensor:
    config = model.config
    return torch.randint(11, (batch, length)) if config.vocab_size else torch.randn(batch, length, config.d_input)


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_what_fills_up_a_sequence_changes_nothing(options: dict[str, object]) -> None:
    model = make(**options).double().eval()
    x = inputs(model, 3, 9)
    x = x if model.config.vocab_size else x.double()
    lengths = torch.tensor([9, 4, 1])
    scores = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(x[row : row + 1, :length])
        if model.config.pooling == "none":
            assert not scores[row, length:].any()
            torch.testing.assert_close(scores[row : row + 1, :length], alone, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(scores[row : row + 1], alone, rtol=1e-9, atol=1e-9)
    full = torch.full((3,), 9)
    torch.testing.assert_close(model(x, full), model(x), rtol=1e-9, atol=1e-9)


def test_batch_norm_learns_of_places_that_count_only() -> None:
    model = make(d_input=2, mixer="lstm", mixer_options={}, norm="batch").train()
    x, lengths = torch.randn(2, 6, 2), torch.tensor([6, 3])
    other = x.clone()
    other[1, 3:] = 100.0
    torch.testing.assert_close(model(x, lengths), model(other, lengths))


def test_both_ends_are_seen_by_every_place() -> None:
    tokens = torch.randint(11, (1, 6))
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 11
    for direction in ("forward", "sum", "concat"):
        model = make(vocab_size=11, pooling="none", direction=direction).eval()
        first, again = model(tokens)[0, 0], model(changed)[0, 0]
        assert torch.allclose(first, again, atol=1e-6) == (direction == "forward")


def test_dropout_leaves_out_whole_channels_in_training_only() -> None:
    model = make(vocab_size=11, dropout=0.5)
    tokens = torch.randint(11, (2, 5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_learns_which_token_came_first() -> None:
    # The class is the first of five tokens: pooling the last place, the mixer has to carry it.
    torch.manual_seed(0)
    model = make(vocab_size=3, pooling="last", mixer="lstm", mixer_options={})
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        tokens = torch.randint(3, (64, 5))
        loss = torch.nn.functional.cross_entropy(model(tokens), tokens[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = torch.randint(3, (200, 5))
    assert (model(tokens).argmax(-1) == tokens[:, 0]).float().mean() > 0.9


def test_a_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = make(vocab_size=11, norm="batch", block="h3", mixer=("mamba", "s4d"), mixer_options={})
    model(torch.randint(11, (2, 5)))  # moves the statistics of the batch norms
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert again.config == model.config
    tokens = torch.randint(11, (2, 5))
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))
    mark = "_keep_float32"
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert getattr(one, mark, False) == getattr(other, mark, False)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("longscan-classifier", "longscan-sashimi"))
    with pytest.raises(CheckpointError, match="expected 'longscan-classifier'"):
        Classifier.from_pretrained(tmp_path)


def test_what_goes_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match="one of the two"):
        ClassifierConfig()
    with pytest.raises(ConfigError, match="pooling must be one of"):
        ClassifierConfig(vocab_size=3, pooling="first")
    with pytest.raises(ConfigError, match="dropout"):
        ClassifierConfig(vocab_size=3, dropout=1.0)
    with pytest.raises(ConfigError, match=r"'n_layers' \(did you mean 'n_layer'\?\)"):
        ClassifierConfig.from_dict({"n_layers": 3})
    model = make(vocab_size=11)
    with pytest.raises(ArgumentError, match="tokens"):
        model(torch.randn(2, 5, 8))
    with pytest.raises(ArgumentError, match=r"1 \.\. 5"):
        model(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([6, 1]))
    with pytest.raises(ArgumentError, match=r"\(2,\)"):
        model(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5]))
    with pytest.raises(ArgumentError, match=r"\(batch, length, 2\)"):
        make(d_input=2)(torch.randn(2, 5, 3))


@pytest.mark.parametrize("direction", ["forward", "concat"])
def test_each_of_a_pair_is_read_by_itself(direction: str) -> None:
    model = make(vocab_size=11, pair=True, direction=direction).double().eval()
    single = make(vocab_size=11, direction=direction, n_outputs=3).double().eval()
    single.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decoder")}, strict=False)
    single.decoder = torch.nn.Identity()
    tokens, lengths = torch.randint(11, (3, 2, 7)), torch.tensor([[7, 3], [2, 7], [5, 5]])
    a, b = (single(tokens[:, place], lengths[:, place]) for place in (0, 1))
    expected = model.decoder(torch.cat((a, b, a * b, a - b), dim=-1))
    scores = model(tokens.flatten(1), lengths)
    assert scores.shape == (3, 3)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    full = torch.full((3, 2), 7)
    torch.testing.assert_close(model(tokens.flatten(1)), model(tokens.flatten(1), full), rtol=1e-9, atol=1e-9)
    other = tokens.clone()
    other[0, 1, 3:] = 0
    torch.testing.assert_close(model(other.flatten(1), lengths), scores, rtol=1e-9, atol=1e-9)


def test_what_is_no_pair() -> None:
    model = make(vocab_size=11, pair=True)
    with pytest.raises(ArgumentError, match="pairs of sequences"):
        model(torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"lengths must be \(2, 2\)"):
        model(torch.zeros(2, 6, dtype=torch.int64), torch.tensor([3, 3]))
    with pytest.raises(ConfigError, match="pooling 'none'"):
        make(vocab_size=11, pair=True, pooling="none")
