r"""RWKV-4: an average of all earlier values, weighted by their keys and fading at a rate of its own in every channel.

Peng et al. 2023 (arXiv 2305.13048), equations 11-16: its time mixing. With :math:`\mu` a mix of this token and the one
before (the token shift), w > 0 the decay and u the bonus of the present token:

.. math::
    r, k, v &= W_{r,k,v} (\mu_{r,k,v} \odot x_t + (1 - \mu_{r,k,v}) \odot x_{t-1}) \\
    \mathrm{wkv}_t &= \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t}
    {\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}}, \qquad
    y_t = W_o (\sigma(r_t) \odot \mathrm{wkv}_t)

Keys are exponents, so numerator and denominator are kept relative to e^m, with the running peak
:math:`m_t = \max(m_{t-1} - w, k_t)`: no exponential is ever above 1, and the sums never vanish.

The paper's block puts its channel mixing (:mod:`longscan.mixers.rwkv4_channels`), behind this layer, and layer norms in
front of both: ``LanguageModelConfig(mixer=("rwkv4", "rwkv4_channels"), norm="layer")``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.packing import over_rows
from longscan.nn.sequence_parallel import Leaving, SequencePart, current_part
from longscan.nn.state import State
from longscan.ops import linear_scan

# The peak of an empty past: far below any key, and finite, so that differences of peaks are numbers.
_NOTHING = -1e38

# Steps of a stretch of the running peak.
_STRETCH = 16


@dataclasses.dataclass(frozen=True)
class RWKV4State(State):
    """The last token (batch, d_model), and numerator, denominator and the log of their scale, (batch, 3, d_model)."""

    last: Tensor
    wkv: Tensor


class RWKV4(SequenceMixer):
    """RWKV-4's time mixing: ``y, _ = RWKV4(d_model=256)(x)``.

    The two sums are linear scans. The peak is found level by level: within stretches of 16 steps side by side, then
    over the stretches as if they were steps, so that the operations in a row grow with the logarithm of the length.

    Args:
        d_model: width.
        depth: the place of the layer in its model, from 0 (first) to almost 1 (last). The authors start decays and
            shifts accordingly: early layers forget faster and look further back at the token before. The models of
            this package fill it in.

    Initialisation is that of the authors' code (RWKV-v4neo): keys, receptance and output start at zero, so that a layer
    starts by adding nothing. The paper's text gives the receptance's mix as a product with 0.5, the code, followed
    here, as a power of 0.5. Names of parameters are the code's.

    Attributes:
        time_decay (log w) and time_first (u) stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: d_model is below 1, or depth outside 0 .. 1.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        depth: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or not 0 <= depth <= 1:
            raise ArgumentError(f"d_model must be at least 1 and depth within 0 .. 1; got {d_model} and {depth}")
        self.d_model = d_model
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channel = torch.arange(d_model, device=device, dtype=torch.float32)
        ramp = channel / max(d_model - 1, 1)
        zigzag = ((channel + 1) % 3 - 1) * 0.5
        self.time_decay = no_weight_decay(keep_float32(nn.Parameter(-5 + 8 * ramp ** (0.7 + 1.3 * depth))))
        self.time_first = no_weight_decay(keep_float32(nn.Parameter(math.log(0.3) + zigzag)))
        place, mix = (channel / d_model) ** (1 - depth), dtype or torch.get_default_dtype()
        self.time_mix_k = no_weight_decay(nn.Parameter(place.to(mix)))
        self.time_mix_v = no_weight_decay(nn.Parameter((place + 0.3 * depth).to(mix)))
        self.time_mix_r = no_weight_decay(nn.Parameter((place**0.5).to(mix)))
        self.key = nn.Linear(d_model, d_model, bias=False, **factory)
        self.value = nn.Linear(d_model, d_model, bias=False, **factory)
        self.receptance = nn.Linear(d_model, d_model, bias=False, **factory)
        self.output = nn.Linear(d_model, d_model, bias=False, **factory)
        for layer in (self.key, self.receptance, self.output):
            nn.init.zeros_(layer.weight)
        # In float32: there is no decomposition in half precision.
        start = nn.init.orthogonal_(torch.empty(d_model, d_model, device=device, dtype=torch.float32))
        self.value.weight.detach().copy_(start)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, RWKV4State | None]:
        self.check_input(x, state, cu_seqlens, RWKV4State)
        before = state if isinstance(state, RWKV4State) else None
        part = current_part()
        if part is not None:
            before, cu_seqlens = self._enter(part, x, cu_seqlens)
        if cu_seqlens is not None:
            y, after = over_rows(self._mix, x, before, cu_seqlens)
        else:
            y, after = self._mix(x, before, None)
        return y, None if state is None else after

    def _enter(self, part: SequencePart, x: Tensor, cu_seqlens: Tensor | None) -> tuple[RWKV4State, Tensor | None]:
        """The state of every row of this process's part x, and its own offsets."""
        segments = part.segments(x, cu_seqlens)
        fresh = self.initial_state(x.shape[0], x.device, x.dtype)
        last = part.border(x, 1, segments).squeeze(1)
        # The last sequence, from an empty sum; of the token before it only where it began in an earlier part.
        own = fresh if segments.last else RWKV4State(last, fresh.wkv)
        _, after = self._mix(x[:, segments.last :], own, None)

        def join(earlier: Leaving, later: Leaving, steps: int) -> Leaving:
            return (_in_a_row(earlier[0], later[0], steps * torch.exp(self.time_decay.to(fresh.wkv))),)

        (wkv,) = part.entering((after.wkv,), join, (fresh.wkv,), segments)
        return RWKV4State(segments.rows_of(last, fresh.last), segments.rows_of(wkv, fresh.wkv)), segments.cu_seqlens

    def _mix(self, x: Tensor, before: RWKV4State | None, lengths: Tensor | None) -> tuple[Tensor, RWKV4State]:
        """x (batch, length, d_model) to y and the state after each row's length (None: all of it)."""
        if before is None:
            before = self.initial_state(x.shape[0], x.device, x.dtype)
        shifted = torch.cat((before.last[:, None].to(x.dtype), x[:, :-1]), dim=1)
        k = self.key(shifted.lerp(x, self.time_mix_k.to(x.dtype)))
        v = self.value(shifted.lerp(x, self.time_mix_v.to(x.dtype)))
        r = self.receptance(shifted.lerp(x, self.time_mix_r.to(x.dtype)))
        wide = before.wkv.dtype
        wkv, *sums = weighted_average(
            torch.exp(self.time_decay.to(wide)), self.time_first.to(wide), k.to(wide), v.to(wide), before.wkv
        )
        y = self.output(torch.sigmoid(r) * wkv.to(r.dtype))
        rows: Any = slice(None)
        ends: Any = -1
        if lengths is not None:
            rows, ends = torch.arange(x.shape[0], device=x.device), (lengths - 1).to(x.device)
        after = torch.stack([part[rows, ends] for part in sums], dim=1)
        return y, RWKV4State(x[rows, ends].to(before.last.dtype), after)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKV4State:
        check_batch(batch)
        device = self.key.weight.device if device is None else device
        last = torch.zeros(batch, self.d_model, device=device, dtype=dtype or self.key.weight.dtype)
        wkv = torch.zeros(batch, 3, self.d_model, device=device, dtype=self.time_decay.dtype)
        wkv[:, 2] = _NOTHING
        return RWKV4State(last, wkv)

    def extra_repr(self) -> str:
        return f"{self.d_model}"


def weighted_average(w: Tensor, u: Tensor, k: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, ...]:
    """The wkv of the module's docstring.

    Args:
        w, u: (channels,), w positive.
        k, v: (batch, length, channels).
        before: (batch, 3, channels): numerator, denominator, peak.

    Returns:
        wkv, and after every step numerator, denominator and peak, each (batch, length, channels).
    """
    # The peak only sets the scale of both sums, so it is a constant to the gradient.
    with torch.no_grad():
        peak = _running_peak(w, k, before[:, 2])
        peak_before = torch.cat((before[:, None, 2], peak[:, :-1]), dim=1)
        highest = torch.maximum(peak_before, u + k)
    weight = torch.exp(k - peak)
    # The peaks' difference first: w may be less than a peak's last digit.
    fade = torch.exp((peak_before - peak) - w)
    past, present = torch.exp(peak_before - highest), torch.exp(u + k - highest)
    sums, averages = [], []
    for start, term, now in ((before[:, 0], weight * v, present * v), (before[:, 1], weight, present)):
        total = linear_scan(fade, term, start)
        assert isinstance(total, Tensor)
        sums.append(total)
        averages.append(torch.addcmul(now, past, torch.cat((start[:, None], total[:, :-1]), dim=1)))
    return averages[0] / averages[1], *sums, peak


def _in_a_row(earlier: Tensor, later: Tensor, fall: Tensor) -> Tensor:
    """The sums (batch, 3, channels) after two stretches, of those of each; the peak falls by ``fall`` in the later."""
    # Peaks only set the scale of the sums, but how far the earlier one falls is w's, and has a gradient.
    old, new = earlier[:, 2].detach(), later[:, 2].detach()
    peak = torch.maximum(old - fall.detach(), new)
    past, present = torch.exp((old - peak) - fall), torch.exp(new - peak)
    sums = past[:, None] * earlier[:, :2] + present[:, None] * later[:, :2]
    return torch.cat((sums, peak[:, None]), dim=1)


def _running_peak(w: Tensor, k: Tensor, first: Tensor) -> Tensor:
    """``m_t = max(m_{t-1} - w, k_t)`` of k (batch, length, channels) from ``first`` (batch, channels)."""
    batch, length, channels = k.shape
    inner = min(length, _STRETCH)
    outer = -(-length // inner)
    grid = F.pad(k, (0, 0, 0, outer * inner - length), value=_NOTHING).unflatten(1, (outer, inner))
    within = [grid[:, :, 0]]
    for step in range(1, inner):
        within.append(torch.maximum(within[-1] - w, grid[:, :, step]))
    entering = first[:, None]
    if outer > 1:
        # From stretch to stretch it is the same recurrence, with w times as large.
        entering = torch.cat((entering, _running_peak(inner * w, within[-1][:, :-1], first)), dim=1)
    fall = w * torch.arange(1, inner + 1, device=k.device, dtype=k.dtype)[:, None]
    peak = torch.maximum(torch.stack(within, 2), entering[:, :, None] - fall)
    return peak.reshape(batch, outer * inner, channels)[:, :length]
