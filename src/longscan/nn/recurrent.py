"""PyTorch's recurrent kernels (cuDNN's on NVIDIA GPUs) with their state as one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from longscan.errors import ArgumentError

#: Kind of cell -> PyTorch's name of it.
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN_TANH"}

_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

# Steps of one call: cuDNN takes fewer than 65,536.
_LONGEST = 32768


class Recurrence(nn.Module):
    """One layer of LSTM, GRU or tanh RNN.

    Args:
        cell: "lstm", "gru" or "rnn".
        d_input, d_hidden: widths of what comes in, and of the hidden state, which is what comes out.
        bias: whether there are biases.
        forget_bias: where the bias of an LSTM's forget gate starts (Gers et al. 2000).
    """

    def __init__(
        self,
        cell: str,
        d_input: int,
        d_hidden: int,
        *,
        bias: bool = True,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ArgumentError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}")
        if min(d_input, d_hidden) < 1:
            raise ArgumentError(f"widths must be at least 1, got {d_input} and {d_hidden}")
        self.kind, self.d_hidden = cell, d_hidden
        #: Vectors of state: an LSTM has its cell beside the hidden state.
        self.parts = 2 if cell == "lstm" else 1
        # Holds the weights, in one piece on NVIDIA GPUs, as cuDNN wants them. The class is the base of nn.LSTM and its
        # kin, which torch.compile would not look into.
        self.cell = nn.RNNBase(CELLS[cell], d_input, d_hidden, bias=bias, batch_first=True, device=device, dtype=dtype)
        if cell == "lstm" and bias:
            for name, value in (("bias_ih_l0", forget_bias), ("bias_hh_l0", 0.0)):
                getattr(self.cell, name).detach()[d_hidden : 2 * d_hidden].fill_(value)

    def forward(self, x: Tensor, state: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Walk a batch of sequences.

        Args:
            x: (batch, length, d_input).
            state: (batch, parts, d_hidden).
            lengths: (batch,) int64 on the CPU, how much of each row counts; None: all of it. May be 0.

        Returns:
            The hidden states (batch, length, d_hidden) in x's dtype, and the state after each row's length.
        """
        if x.shape[1] <= _LONGEST:
            return self._walk(x, state, lengths)
        outputs = []
        for piece in x.split(_LONGEST, dim=1):
            y, state = self._walk(piece, state, None if lengths is None else lengths.clamp(max=piece.shape[1]))
            outputs.append(y)
            lengths = None if lengths is None else (lengths - piece.shape[1]).clamp(min=0)
        return torch.cat(outputs, dim=1), state

    def _walk(self, x: Tensor, state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = [getattr(self.cell, name) for name in _NAMES[: 4 if self.cell.bias else 2]]
        # cuDNN's and PyTorch's kernels want one dtype, the weights'.
        with torch.autocast(x.device.type, enabled=False):
            own = x.to(weights[0].dtype)
            first = [part.contiguous().unsqueeze(0) for part in state.to(own.dtype).unbind(1)]
            if lengths is None:
                y, *last = self._kernel((own,), first, weights, (True,))
            else:
                # No kernel takes a row of no steps: it walks one, and keeps its state.
                packed = pack_padded_sequence(own, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
                order, back = packed.sorted_indices, packed.unsorted_indices
                assert order is not None
                assert back is not None
                data, *last = self._kernel(
                    (packed.data, packed.batch_sizes), [part[:, order] for part in first], weights, ()
                )
                y, _ = pad_packed_sequence(
                    PackedSequence(data, packed.batch_sizes, order, back), batch_first=True, total_length=x.shape[1]
                )
                walked = (lengths > 0).to(x.device)[None, :, None]
                last = [torch.where(walked, new[:, back], old) for new, old in zip(last, first, strict=True)]
        return y.to(x.dtype), torch.stack([part[0] for part in last], dim=1).to(state.dtype)

    def _kernel(
        self, data: tuple[Tensor, ...], first: list[Tensor], weights: list[Tensor], layout: tuple[bool, ...]
    ) -> tuple[Tensor, ...]:
        if self.kind == "lstm" and torch.compiler.is_compiling():
            # PyTorch's kernels break the compiler: oneDNN's workspace is None, and cuDNN's states get a wrong shape.
            return _lstm_steps(data[0], first, weights)
        # Arguments that follow the weights: has_biases, layers, dropout, train, bidirectional, and batch_first.
        # cuDNN has a backward pass in training mode alone; nothing else depends on it here.
        trains = self.training or torch.is_grad_enabled()
        options = (self.cell.bias, 1, 0.0, trains, False, *layout)
        kernel: Any = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}[self.kind]
        result: tuple[Tensor, ...] = kernel(*data, first if self.kind == "lstm" else first[0], weights, *options)
        return result


def _lstm_steps(x: Tensor, first: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM as it is defined, x (batch, length, d_input): what the kernels compute."""
    biases: list[Tensor | None] = [*weights[2:]] or [None, None]
    inputs = F.linear(x, weights[0], biases[0]).unbind(1)
    (h, c), outputs = (part[0] for part in first), []
    for now in inputs:
        i, f, g, o = (now + F.linear(h, weights[1], biases[1])).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, dim=1), h[None], c[None]
