r"""Time-invariant diagonal state space models, as mixers use them: by convolution, by scan, and step by step.

.. math::
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad y_t = 2 \mathrm{Re}(C h_t) + D u_t

Gu, Gupta, Goel and Re 2022 (arXiv 2206.11893). A system serves one channel, or several channels in a row that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longscan.nn.recurrences import selective_scan, time_invariant
from longscan.nn.sequence_parallel import current_part
from longscan.ops import long_conv, selective_state_update, vandermonde, vandermonde_transpose


class DiagonalSSM(NamedTuple):
    """Systems with N complex states each, every one for a conjugate pair.

    Attributes:
        log_A_bar, B_bar, C: (systems, N) complex.
        D: (systems,) real.
    """

    log_A_bar: Tensor
    B_bar: Tensor
    C: Tensor
    D: Tensor

    def kernel(self, length: int) -> Tensor:
        """``2 Re sum_n C_n B_bar_n A_bar_n^l`` for l < length, (systems, length): the convolution without the skip."""
        return vandermonde(self.C * self.B_bar, self.log_A_bar, length)

    def convolve(self, u: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Whole sequences by FFT, and what the state before them still gives out.

        Args:
            u: (batch, length, channels), float32 or float64; each system serves channels / systems channels in a row.
            before: states (batch, channels, N) complex; None: there are none, and none come back.
        """
        y = long_conv(u, self.kernel(u.shape[1]), self.D)
        assert isinstance(y, Tensor)
        part = current_part()
        if part is not None:
            before, _ = time_invariant(part, u, None, self.leave, self.advance)
            return y + self._fading(before, u.shape[1]), None
        if before is None:
            return y, None
        return y + self._fading(before, u.shape[1]), self.advance(before, u.shape[1]) + self.leave(u)

    def leave(self, u: Tensor) -> Tensor:
        """The states (batch, channels, N) after u (batch, length, channels), from an empty past."""
        rows = u.unflatten(2, (self.log_A_bar.shape[0], -1)).permute(0, 3, 2, 1).flatten(0, 1)
        return self._per_sequence(self.B_bar * vandermonde_transpose(rows.flip(-1), self.log_A_bar), u.shape[0])

    def advance(self, states: Tensor, steps: int) -> Tensor:
        """What becomes of states (batch, channels, N) over so many steps without input."""
        return self._per_sequence(torch.exp(steps * self.log_A_bar) * self._per_system(states), states.shape[0])

    def _fading(self, states: Tensor, length: int) -> Tensor:
        """What states before the first step still give out: (batch, length, channels)."""
        # At step l they have decayed by A_bar^(l + 1).
        weights = self.C * torch.exp(self.log_A_bar) * self._per_system(states)
        fading = vandermonde(weights, self.log_A_bar, length)
        return fading.unflatten(0, (states.shape[0], -1)).permute(0, 3, 2, 1).flatten(2)

    def _per_system(self, states: Tensor) -> Tensor:
        """Channels that share a system become rows of a batch: (batch, channels, N) to (rows, systems, N)."""
        return states.unflatten(1, (self.log_A_bar.shape[0], -1)).transpose(1, 2).flatten(0, 1)

    def _per_sequence(self, states: Tensor, batch: int) -> Tensor:
        return states.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)

    def scan(self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Packed sequences u (1, length, channels): the selective scan with a step of 1 and constant B and C."""
        log_A_bar, B_bar, C, D = self._per_channel(u.shape[2])
        ones = torch.ones((), dtype=u.dtype, device=u.device).expand_as(u)
        y, after = selective_scan(
            u, ones, log_A_bar, B_bar, C, D, initial_state=before, cu_seqlens=cu_seqlens, return_final_state=True
        )
        return y, after

    def step(self, u: Tensor, before: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
        """One token: u (batch, channels) and states (batch, channels, N) to y and the next states."""
        log_A_bar, B_bar, C, D = self._per_channel(u.shape[1])
        B_bar, C = (part.expand(u.shape[0], -1, -1) for part in (B_bar, C))
        return selective_state_update(before, u, torch.ones_like(u), log_A_bar, B_bar, C, D, inplace=inplace)

    def _per_channel(self, channels: int) -> DiagonalSSM:
        share = channels // self.log_A_bar.shape[0]
        return self if share == 1 else DiagonalSSM(*(part.repeat_interleave(share, 0) for part in self))
