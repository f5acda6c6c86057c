r"""Dilated RNN: a stack of recurrent layers that skip over time, each further than the one below.

Chang et al. 2017 (arXiv 1710.02224), equations 2-5 and 8. With f any recurrent cell and s the dilation of a layer:

.. math::
    h_t^{(l)} = f\big(h_t^{(l-1)}, h_{t-s^{(l)}}^{(l)}\big), \qquad h^{(0)} = x, \qquad
    y_t = \sum_{j=0}^{s^{(1)} - 1} W_j\, h_{t-j}^{(L)}

A layer of dilation s is s recurrences side by side, each over every s-th step: there are s times fewer steps to wait
for. The last sum, a convolution, is there when the first dilation is above 1, where steps would otherwise not meet;
with a first dilation of 1, y is the last layer's h.

The whole stack is one mixer here, in one residual block. The paper has no residual connections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch
from longscan.nn.packing import over_rows
from longscan.nn.recurrent import Recurrence
from longscan.nn.relay import relay
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State


@dataclasses.dataclass(frozen=True)
class DilatedRNNState(State):
    """Per layer the states of its last s steps, that of the next step first: (batch, s, 1 or 2, d_hidden) float32.

    ``recent`` are the last layer's outputs of the last s^(1) - 1 steps, oldest first, (batch, s^(1) - 1, d_hidden), or
    None where s^(1) is 1.
    """

    memories: tuple[Tensor, ...]
    recent: Tensor | None = None


class DilatedRNN(SequenceMixer):
    """A stack of dilated recurrent layers: ``y, _ = DilatedRNN(d_model=64, dilations=(1, 2, 4, 8))(x)``.

    The state holds d_hidden numbers (twice that for an LSTM) per layer and step of its dilation.

    Args:
        d_model: width of input and output.
        dilations: of the layers, first to last; the paper doubles: 1, 2, 4, ... up to 256 in its experiments.
        cell: "lstm" (on CPUs twice as fast as "gru"), "gru" or "rnn" (tanh).
        d_hidden: width of every layer; default: d_model. Of another width, the output is projected.
        bias: whether there are biases.

    Raises:
        ArgumentError: a width or a dilation is below 1, there are no dilations, or the cell is unknown.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8),
        cell: str = "lstm",
        d_hidden: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dilations = tuple(dilations)
        if not dilations or any(not isinstance(dilation, int) or dilation < 1 for dilation in dilations):
            raise ArgumentError(f"dilations must be integers of at least 1, one a layer; got {dilations!r}")
        self.d_model, self.d_hidden = d_model, d_model if d_hidden is None else d_hidden
        self.dilations, self.cell = dilations, cell
        self.layers = nn.ModuleList(
            Recurrence(cell, self.d_hidden if layer else d_model, self.d_hidden, bias=bias, device=device, dtype=dtype)
            for layer in range(len(dilations))
        )
        self.out_proj: nn.Linear | None = None
        if dilations[0] > 1 or self.d_hidden != d_model:
            self.out_proj = nn.Linear(dilations[0] * self.d_hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DilatedRNNState | None]:
        self.check_input(x, state, cu_seqlens, DilatedRNNState)
        if current_part() is not None:
            return relay(self, x, cu_seqlens), None
        before = state if isinstance(state, DilatedRNNState) else None
        if cu_seqlens is not None:
            return over_rows(self._walk, x, before, cu_seqlens)
        y, after = self._walk(x, before, None)
        return y, None if before is None else after

    def _walk(
        self, x: Tensor, before: DilatedRNNState | None, lengths: Tensor | None
    ) -> tuple[Tensor, DilatedRNNState]:
        if before is None:
            before = self.initial_state(x.shape[0], x.device, x.dtype)
        memories = []
        h = x
        for layer, dilation, memory in zip(self.layers, self.dilations, before.memories, strict=True):
            h, memory = _dilated(layer, dilation, h, memory, lengths)
            memories.append(memory)
        if before.recent is None:
            return h if self.out_proj is None else self.out_proj(h), DilatedRNNState(tuple(memories))
        assert self.out_proj is not None
        # The last layer's outputs, with those that came before the first step in front.
        h = torch.cat((before.recent.to(h.dtype), h), dim=1)
        width, length = self.dilations[0], x.shape[1]
        if lengths is None:
            recent = h[:, length:]
        else:
            ends = lengths.to(x.device)[:, None] + torch.arange(width - 1, device=x.device)
            recent = h.gather(1, ends[..., None].expand(-1, -1, self.d_hidden))
        together = torch.cat([h[:, width - 1 - j : width - 1 - j + length] for j in range(width)], dim=-1)
        return self.out_proj(together), DilatedRNNState(tuple(memories), recent.to(before.recent.dtype))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DilatedRNNState:
        check_batch(batch)
        weight = next(self.parameters())
        device = weight.device if device is None else device
        wide = torch.promote_types(weight.dtype, torch.float32)
        parts, before = 2 if self.cell == "lstm" else 1, self.dilations[0] - 1
        memories = tuple(
            torch.zeros(batch, dilation, parts, self.d_hidden, device=device, dtype=wide) for dilation in self.dilations
        )
        if not before:
            return DilatedRNNState(memories)
        recent = torch.zeros(batch, before, self.d_hidden, device=device, dtype=dtype or weight.dtype)
        return DilatedRNNState(memories, recent)

    def extra_repr(self) -> str:
        return f"{self.d_model}, dilations={self.dilations}, cell={self.cell!r}, d_hidden={self.d_hidden}"


def _dilated(
    layer: nn.Module, dilation: int, x: Tensor, memory: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One layer over x (batch, length, width) as recurrences over every ``dilation``-th step.

    Returns the hidden states (batch, length, d_hidden), and the memory (batch, dilation, parts, d_hidden) after each
    row's length, that of the next step first.
    """
    batch, length, _ = x.shape
    steps = -(-length // dilation)
    x = F.pad(x, (0, 0, 0, steps * dilation - length)).unflatten(1, (steps, dilation)).transpose(1, 2)
    if lengths is None:
        # The first phases have one step more than the others.
        more = length - (steps - 1) * dilation
        y, first = layer(x[:, :more].flatten(0, 1), memory[:, :more].flatten(0, 1))
        y, first = y.unflatten(0, (batch, more)), first.unflatten(0, (batch, more))
        rest = memory[:, more:]
        if more < dilation:
            less = y.new_zeros(batch, dilation - more, steps, y.shape[-1])
            if steps > 1:
                y_rest, rest = layer(x[:, more:, :-1].flatten(0, 1), rest.flatten(0, 1))
                less = F.pad(y_rest, (0, 0, 0, 1)).unflatten(0, (batch, dilation - more))
                rest = rest.unflatten(0, (batch, dilation - more))
            y = torch.cat((y, less), dim=1)
        # The next step's phase comes first.
        after = torch.cat((rest, first), dim=1)
    else:
        phases = torch.arange(dilation)
        counts = (lengths[:, None] - phases + dilation - 1).div(dilation, rounding_mode="floor").clamp(min=0)
        y, after = layer(x.flatten(0, 1), memory.flatten(0, 1), counts.flatten())
        y, after = y.unflatten(0, (batch, dilation)), after.unflatten(0, (batch, dilation))
        turned = ((lengths[:, None] + phases) % dilation).to(x.device)
        after = after.gather(1, turned[..., None, None].expand_as(after))
    return y.transpose(1, 2).flatten(1, 2)[:, :length], after
