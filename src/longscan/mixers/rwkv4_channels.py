r"""RWKV-4's channel mixing: a feed-forward network of this token and the one before, behind a gate.

Peng et al. 2023 (arXiv 2305.13048), section 3.1.3. With :math:`\mu` a mix of this token and the one before (the token
shift):

.. math::
    r, k &= W_{r,k} (\mu_{r,k} \odot x_t + (1 - \mu_{r,k}) \odot x_{t-1}), \qquad
    y_t = \sigma(r_t) \odot W_v \max(k_t, 0)^2

It takes the place of a Transformer's feed-forward network, but remembers a token, so it is a mixer: a model whose
layers are time mixing and channel mixing in turn, ``mixer=("rwkv4", "rwkv4_channels")``, is the paper's with
``norm="layer"``, but for the layer norm of its embedding. The token shift is a convolution of two taps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, no_weight_decay
from longscan.nn.recurrences import causal_conv1d
from longscan.nn.state import State


@dataclasses.dataclass(frozen=True)
class RWKV4ChannelsState(State):
    """The last token, (batch, 1, d_model)."""

    last: Tensor


class RWKV4Channels(SequenceMixer):
    """RWKV-4's channel mixing: ``y, _ = RWKV4Channels(d_model=256)(x)``.

    Args:
        d_model: width of input and output.
        d_hidden: width of k; default: 4 d_model, as in the paper.
        depth: the place of the layer in its model, from 0 (first) to almost 1 (last), for where the shifts start, as in
            :class:`longscan.mixers.RWKV4`.

    Initialisation is that of the authors' code (RWKV-v4neo): receptance and value start at zero, so that a layer starts
    by adding nothing. Names of parameters are the code's.

    Raises:
        ArgumentError: a width is below 1, or depth outside 0 .. 1.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        depth: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        if min(d_model, d_hidden) < 1 or not 0 <= depth <= 1:
            raise ArgumentError(
                f"d_model and d_hidden must be at least 1, depth within 0 .. 1; got {d_model}, {d_hidden} and {depth}"
            )
        self.d_model, self.d_hidden = d_model, d_hidden
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        place = (torch.arange(d_model, device=device, dtype=torch.float32) / d_model) ** (1 - depth)
        mix = dtype or torch.get_default_dtype()
        self.time_mix_k = no_weight_decay(nn.Parameter(place.to(mix)))
        self.time_mix_r = no_weight_decay(nn.Parameter(place.to(mix, copy=True)))
        self.key = nn.Linear(d_model, d_hidden, bias=False, **factory)
        self.receptance = nn.Linear(d_model, d_model, bias=False, **factory)
        self.value = nn.Linear(d_hidden, d_model, bias=False, **factory)
        for layer in (self.receptance, self.value):
            nn.init.zeros_(layer.weight)
        # In float32: there is no decomposition in half precision.
        start = torch.empty(d_hidden, d_model, device=device, dtype=torch.float32)
        self.key.weight.detach().copy_(nn.init.orthogonal_(start, gain=max(1, d_hidden / d_model) ** 0.5))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4ChannelsState | None]:
        self.check_input(x, state, cu_seqlens, RWKV4ChannelsState)
        before = state.last.to(x.dtype) if isinstance(state, RWKV4ChannelsState) else None
        k, last = self._shifted(x, self.time_mix_k, before, cu_seqlens)
        r, _ = self._shifted(x, self.time_mix_r, before, cu_seqlens)
        y = torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())
        return y, RWKV4ChannelsState(last.to(state.last.dtype)) if isinstance(state, RWKV4ChannelsState) else None

    @staticmethod
    def _shifted(x: Tensor, mix: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """``mix x_t + (1 - mix) x_t-1`` and the last token of every sequence."""
        taps = torch.stack((1 - mix, mix), dim=1)
        shifted, last = causal_conv1d(x, taps, None, before, cu_seqlens=cu_seqlens, return_final_state=True)
        return shifted, last

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKV4ChannelsState:
        check_batch(batch)
        weight = self.key.weight
        return RWKV4ChannelsState(
            torch.zeros(batch, 1, self.d_model, device=device or weight.device, dtype=dtype or weight.dtype)
        )

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_hidden={self.d_hidden}"
