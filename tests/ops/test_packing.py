"""Packed sequences as padded batches, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import ArgumentError
from longscan.ops.packing import back_in_one_row, in_rows


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
def test_there_and_back(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.randn(1, sum(lengths), 3, requires_grad=True)
    batches = [(rows, rows.take(packed)) for rows in in_rows(offsets, sum(lengths))]
    assert torch.equal(back_in_one_row(batches), packed)
    seen = sorted(int(sequence) for rows, _ in batches for sequence in rows.sequences)
    assert seen == [i for i, length in enumerate(lengths) if length]
    for rows, padded in batches:
        longest = padded.shape[1]
        # At most half of a row is padding.
        assert all(longest < 2 * length for length in rows.lengths.tolist())
        for row, sequence in enumerate(rows.sequences.tolist()):
            start, end = offsets[sequence], offsets[sequence + 1]
            assert torch.equal(padded[row, : end - start], packed[0, start:end])
            assert rows.real[row].sum() == rows.lengths[row] == end - start
    (gradient,) = torch.autograd.grad(back_in_one_row(batches).sum(), packed)
    assert torch.equal(gradient, torch.ones_like(packed))


@pytest.mark.parametrize("offsets", [[1, 5], [0, 4], [0, 3, 2, 5]])
def test_offsets_that_make_no_sense(offsets: list[int]) -> None:
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        in_rows(torch.tensor(offsets), 5)
