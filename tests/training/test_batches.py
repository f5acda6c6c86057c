"""Which tokens each step sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import DataError
from longscan.training.batches import Batches, permute


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(count), count, seed, epoch)) == list(range(count))


def test_permutations_differ_by_seed_and_epoch() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_permutation_is_the_same_on_every_machine() -> None:
    assert permute(np.arange(10), 10, 0).tolist() == [5, 0, 7, 8, 9, 4, 3, 6, 2, 1]


def test_an_epoch_visits_every_sequence_once() -> None:
    batches = Batches(np.arange(1003), batch_size=5, sequence_length=10)
    starts = np.concatenate([batches.positions(step) for step in range(20)])
    assert len(set(starts)) == 100
    assert len(set(starts % 10)) == 1
    tokens, targets = batches.batch(7)
    torch.testing.assert_close(tokens + 1, targets)
    assert tokens[:, 0].tolist() == batches.positions(7).tolist()


def test_ranks_share_a_batch() -> None:
    batches = Batches(np.arange(1000), batch_size=6, sequence_length=10, seed=3)
    whole, _ = batches.batch(4)
    parts = [batches.batch(4, slice(first, first + 2))[0] for first in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_carried_rows_read_on() -> None:
    batches = Batches(np.arange(400), batch_size=4, sequence_length=10, carry_state=True)
    first, _ = batches.batch(0)
    second, _ = batches.batch(1)
    assert first[:, 0].tolist() == [0, 100, 200, 300]
    torch.testing.assert_close(second, first + 10)
    assert [step for step in range(20) if batches.restarts(step)] == [0, 9, 18]
    torch.testing.assert_close(batches.batch(9)[0], first)


@pytest.mark.parametrize(("carry", "least"), [(False, 11), (True, 44)])
def test_too_short(carry: bool, least: int) -> None:
    Batches(np.arange(least), 4, 10, carry_state=carry).batch(3)
    with pytest.raises(DataError, match="fewer than one sequence"):
        Batches(np.arange(least - 1), 4, 10, carry_state=carry)


def test_small_integers_do_not_overflow() -> None:
    tokens, targets = Batches(np.full(100, 255, np.uint8), 2, 8).batch(0)
    assert tokens.dtype == targets.dtype == torch.int64
    assert int(targets.sum()) == 255 * 16
