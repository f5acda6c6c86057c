"""PyTorch's recurrent kernels behind one interface."""

from __future__ import annotations

import pytest
import torch

from longscan.nn import recurrent
from longscan.nn.recurrent import CELLS, Recurrence


@pytest.mark.parametrize("lengths", [None, [11, 0, 4, 8]], ids=["whole", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_long_sequences_are_walked_in_pieces(
    cell: str, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = Recurrence(cell, 3, 5)
    x, state = torch.randn(4, 11, 3), torch.randn(4, layer.parts, 5)
    given = None if lengths is None else torch.tensor(lengths)
    counts = torch.tensor([11] * 4 if lengths is None else lengths)
    y, after = layer(x, state, given)
    monkeypatch.setattr(recurrent, "_LONGEST", 4)
    pieces, after_pieces = layer(x, state, given)
    inside = torch.arange(11) < counts[:, None]
    torch.testing.assert_close(pieces[inside], y[inside])
    torch.testing.assert_close(after_pieces, after)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
def test_more_steps_than_cudnn_takes(cell: str) -> None:
    layer = Recurrence(cell, 2, 4, device="cuda")
    x = torch.randn(1, 70000, 2, device="cuda")
    y, _ = layer(x, torch.zeros(1, layer.parts, 4, device="cuda"))
    assert torch.isfinite(y).all()
