r"""LSTM: a nonlinear hidden state behind gates, walked step by step.

Hochreiter and Schmidhuber 1997 with the forget gate of Gers, Schmidhuber and Cummins 2000:

.. math::
    i, f, g, o &= W_x x_t + W_h h_{t-1} + b \\
    c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad h_t = \sigma(o) \odot \tanh(c_t)

Time cannot be cut into parallel pieces: every step waits for the one before. The kernels are PyTorch's (cuDNN's on
NVIDIA GPUs), in the weights' dtype, under autocast too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from longscan.nn.mixer import SequenceMixer, check_batch
from longscan.nn.packing import over_rows
from longscan.nn.recurrent import Recurrence
from longscan.nn.relay import relay
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State


@dataclasses.dataclass(frozen=True)
class LSTMState(State):
    """h and c, (batch, 2, d_hidden) float32."""

    memory: Tensor


class LSTM(SequenceMixer):
    """One layer of LSTM: ``y, _ = LSTM(d_model=256)(x)``.

    Args:
        d_model: width of input and output.
        d_hidden: width of the state; default: d_model, and then y is h itself. Of another width, h is projected.
        bias: whether gates have biases.
        forget_bias: where the forget gate's bias starts. Everything else starts uniform in +- d_hidden^-1/2.

    Raises:
        ArgumentError: a width is below 1.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        bias: bool = True,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_hidden = d_model, d_model if d_hidden is None else d_hidden
        self.recurrence = Recurrence(
            "lstm", d_model, self.d_hidden, bias=bias, forget_bias=forget_bias, device=device, dtype=dtype
        )
        self.out_proj: nn.Linear | None = None
        if self.d_hidden != d_model:
            self.out_proj = nn.Linear(self.d_hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LSTMState | None]:
        self.check_input(x, state, cu_seqlens, LSTMState)
        if current_part() is not None:
            return relay(self, x, cu_seqlens), None
        before = state if isinstance(state, LSTMState) else None
        if cu_seqlens is not None:
            return over_rows(self._walk, x, before, cu_seqlens)
        y, after = self._walk(x, before, None)
        return y, None if before is None else after

    def _walk(self, x: Tensor, before: LSTMState | None, lengths: Tensor | None) -> tuple[Tensor, LSTMState]:
        if before is None:
            before = self.initial_state(x.shape[0], x.device)
        y, memory = self.recurrence(x, before.memory, lengths)
        return y if self.out_proj is None else self.out_proj(y), LSTMState(memory)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LSTMState:
        check_batch(batch)
        weight = next(self.parameters())
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LSTMState(torch.zeros(batch, 2, self.d_hidden, device=device or weight.device, dtype=wide))

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_hidden={self.d_hidden}"
