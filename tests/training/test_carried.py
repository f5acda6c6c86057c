"""States that go from batch to batch: batches are one long sequence, and rows begin anew as often as they should."""

from __future__ import annotations

import pytest
import torch

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.training.carried import CarriedStates


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.from_config({"vocab_size": 7, "d_model": 16, "n_layer": 2, "mixer": mixer})


@pytest.mark.parametrize("mixer", ["mamba", "rwkv4", "lstm"])
def test_batches_are_pieces_of_one_sequence(mixer: str) -> None:
    model, generator = model_of(mixer), torch.Generator().manual_seed(0)
    # So many steps that, but for the first row, none begins anew.
    carried = CarriedStates(model, 3, 10**30, generator)
    tokens = torch.randint(0, 7, (3, 30))
    pieces = [carried.read(piece) for piece in tokens.split(10, dim=1)]
    whole = model.backbone(tokens)[0]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[1:], whole[1:], rtol=0, atol=1e-5)
    first = torch.cat([model.backbone(piece)[0][:1] for piece in tokens.split(10, dim=1)], dim=1)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[:1], first, rtol=0, atol=1e-5)
    carried.begin_anew()
    torch.testing.assert_close(carried.read(tokens), whole, rtol=0, atol=1e-5)


def test_gradients_stay_within_a_batch() -> None:
    carried = CarriedStates(model_of("mamba"), 2, 100, torch.Generator().manual_seed(0))
    for _ in range(3):
        carried.read(torch.randint(0, 7, (2, 5))).sum().backward()
    assert not any(tensor.requires_grad for tensor in carried.tensors)


def test_rows_begin_anew_less_and_less_often() -> None:
    carried = CarriedStates(model_of("mamba"), 3, 100, torch.Generator().manual_seed(0))
    assert carried._anew.tolist() == pytest.approx([1, 0.1, 0.01])


def test_a_memory_that_grows_is_not_carried() -> None:
    with pytest.raises(ConfigError, match="carry_state: the memory of one of the mixers grows"):
        CarriedStates(model_of("attention"), 2, 100, torch.Generator())
