"""LSTM and dilated RNN: against PyTorch's modules and against their recurrences written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.mixers import LSTM, DilatedRNN
from longscan.nn.recurrent import Recurrence, _lstm_steps


@pytest.mark.parametrize("bias", [True, False])
def test_an_lstm_is_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    mixer, theirs = LSTM(6, bias=bias), nn.LSTM(6, 6, bias=bias, batch_first=True)
    theirs.load_state_dict(mixer.recurrence.cell.state_dict())
    x = torch.randn(2, 9, 6)
    y, state = mixer(x, mixer.initial_state(2))
    expected, (h, c) = theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state.memory, torch.stack((h[0], c[0]), dim=1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_definition_of_an_lstm_is_the_kernel(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Recurrence("lstm", 5, 4, bias=bias).double()
    x, state = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    y, after = layer(x, state)
    weights = list(layer.cell.parameters())
    expected, h, c = _lstm_steps(x, [part[None] for part in state.unbind(1)], weights)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, torch.stack((h[0], c[0]), dim=1))


def test_forget_gates_start_open() -> None:
    cell = LSTM(4, forget_bias=2.0).recurrence.cell
    assert (cell.bias_ih_l0[4:8] + cell.bias_hh_l0[4:8] == 2).all()
    assert cell.weight_hh_l0.abs().max() <= 4**-0.5


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_rows_of_unlike_lengths(cell: str) -> None:
    """Each row stops at its own length; one of length 0 keeps its state."""
    torch.manual_seed(0)
    layer = Recurrence(cell, 3, 4).double()
    x, state = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, layer.parts, 4, dtype=torch.float64)
    lengths = torch.tensor([4, 0, 6, 1])
    y, after = layer(x, state, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = state[row : row + 1]
        if length:
            alone, own = layer(x[row : row + 1, :length], own)
            torch.testing.assert_close(y[row, :length], alone[0])
        torch.testing.assert_close(after[row], own[0])


def written_out(mixer: DilatedRNN, x: Tensor) -> Tensor:
    """Equations 2-5 and 8, one step and one layer at a time."""
    h = x
    for layer, dilation in zip(mixer.layers, mixer.dilations, strict=True):
        states = [torch.zeros(x.shape[0], layer.parts, mixer.d_hidden, dtype=x.dtype)] * dilation
        outputs = []
        for t in range(x.shape[1]):
            y, now = layer(h[:, t : t + 1], states[t])
            states.append(now)
            outputs.append(y)
        h = torch.cat(outputs, dim=1)
    if mixer.out_proj is None:
        return h
    width = mixer.dilations[0]
    matrices = mixer.out_proj.weight.unflatten(1, (width, mixer.d_hidden))
    sums = []
    for t in range(x.shape[1]):
        past = range(min(width, t + 1))
        sums.append(sum(h[:, t - j] @ matrices[:, j].T for j in past) + mixer.out_proj.bias)
    return torch.stack(sums, dim=1)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4), (2, 4), (3, 1, 5)])
@pytest.mark.parametrize("length", [1, 2, 8, 13])
def test_a_dilated_rnn_is_its_recurrence(cell: str, dilations: tuple[int, ...], length: int) -> None:
    torch.manual_seed(0)
    mixer = DilatedRNN(4, dilations=dilations, cell=cell).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], written_out(mixer, x))


def test_the_state_is_a_ring_of_every_layers_dilation() -> None:
    assert DilatedRNN(8, dilations=(1, 2, 4), cell="gru").state_bytes(3) == 3 * (1 + 2 + 4) * 8 * 4
    assert DilatedRNN(8, dilations=(2, 4), cell="lstm").state_bytes(3) == 3 * (2 * (2 + 4) + 1) * 8 * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dilations": ()}, "dilations"),
        ({"dilations": (1, 0)}, "dilations"),
        ({"cell": "qrnn"}, "cell must be one of lstm, gru, rnn"),
        ({"d_hidden": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        DilatedRNN(8, **options)  # type: ignore[arg-type]
