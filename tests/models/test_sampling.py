"""The choice of a token: each filter by itself, all of them by frequency."""

from __future__ import annotations

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.models.sampling import Draws, Sampling, seeds_of_rows

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def kept(**options: float) -> list[int]:
    return Sampling(**options).probabilities(LOGITS)[0].nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_filters() -> None:
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=1) == [0]
    assert kept(top_k=3) in ([0, 1, 2], [0, 1, 3])
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(top_p=0.76) == [0, 1, 2]
    assert kept(min_p=0.4) == [0, 1]
    assert kept(min_p=1.0) == [0]
    # Top-p counts within what top-k has left: there the first has 2/3.
    assert kept(top_k=2, top_p=0.6) == [0]


def test_temperature() -> None:
    flat, sharp = (Sampling(temperature=t).probabilities(LOGITS)[0, 0].item() for t in (2.0, 0.5))
    assert flat < 0.5 < sharp
    uniform = torch.tensor([0.999])
    assert Sampling(temperature=0).choose(LOGITS, uniform).item() == 0
    assert Sampling(temperature=1e-30).choose(LOGITS, uniform).item() == 0


def test_frequencies_are_the_probabilities() -> None:
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    chosen = Sampling().choose(LOGITS.expand(1000, -1), uniform)
    counts = torch.bincount(chosen, minlength=4) / 1000
    torch.testing.assert_close(counts, LOGITS[0].exp(), rtol=0.01, atol=0.002)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_an_impossible_token_is_never_chosen(uniform: float) -> None:
    logits = torch.full((1, 50_000), -40.0)
    logits[0, 7], logits[0, :5] = 0.0, float("-inf")
    sampling = Sampling(top_k=1)
    assert sampling.choose(logits, torch.tensor([uniform], dtype=torch.float64)).item() == 7


def test_repetition_penalty() -> None:
    logits = torch.tensor([[1.0, 0.9, -0.5, -0.4]])
    seen = torch.tensor([[True, False, False, True]])
    penalised = Sampling(temperature=0, repetition_penalty=2.0)
    assert penalised.choose(logits, torch.zeros(1), seen).item() == 1
    assert penalised.choose(logits[:, 2:], torch.zeros(1), seen[:, 2:]).item() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
)
def test_ranges(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_a_row_draws_by_its_own_seed() -> None:
    both, alone = Draws([3, 4]), Draws([4])
    drawn = [both.draw([0, 1])[1].item() for _ in range(300)]
    assert drawn == [alone.draw([0]).item() for _ in range(300)]
    assert len(set(drawn)) == 300


def test_seeds() -> None:
    assert seeds_of_rows(5, 3) == [5, 6, 7]
    assert seeds_of_rows([9, 1], 2) == [9, 1]
    assert len(set(seeds_of_rows(None, 3))) == 3
    with pytest.raises(ArgumentError, match="2 for 3 prompts"):
        seeds_of_rows([1, 2], 3)
    for seed in (2**64, 1.5, [0.5]):
        with pytest.raises(ArgumentError, match="seed must be"):
            seeds_of_rows(seed, 1)  # type: ignore[arg-type]
