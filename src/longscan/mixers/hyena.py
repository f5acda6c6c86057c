r"""Hyena: long convolutions and gates in turn, the filters written by a small network of the lag.

Poli et al. 2023 (arXiv 2302.10866), definition 3.1 and algorithms 1-3. Of order N:

.. math::
    (x^1, \dots, x^N, v) &= \mathrm{conv}(W_{in} u) \qquad\text{(short, causal, of each channel)} \\
    z^1 &= v, \qquad z^{n+1}_t = x^n_t \odot \Big(D^n \odot z^n_t + \sum_{l \le t} h^n_l \odot z^n_{t-l}\Big), \qquad
    y = W_{out}\, z^{N+1} \\
    h_l &= e^{-\alpha l / (L - 1)} \odot \mathrm{FFN}\big(l / (L - 1),\ \cos(\omega_k l),\ -\sin(\omega_k l)\big),
    \qquad \omega_k = 2 \pi f_k / L

The network's activations are sines. The rates alpha are spread evenly over the channels, so that the slowest window
has fallen to 1% at 1.5 L and the fastest at 0.3 L. L is ``max_length``: filters are written for lags below it and are
zero from there on.

A convolution whose kernel is no state space model has no state of constant size: the past itself has to be kept, as
attention keeps its keys and values, up to L - 1 tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.state import State
from longscan.ops import causal_conv1d, causal_conv1d_update, long_conv

# Of the windows: the value they have fallen to at these parts of max_length.
_TARGET, _FAST, _SLOW = 1e-2, 0.3, 1.5


@dataclasses.dataclass(frozen=True)
class _Taps:
    """Filters, their skips included, (lags, n_filters, d_model), lag 0 last; and which weights they are of."""

    values: Tensor
    weights: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Room:
    """Memory of the past, (batch, capacity, n_filters, d_model), and where its newest vectors end."""

    memory: Tensor
    end: int

    @classmethod
    def appended(cls, state: HyenaState, given: Tensor, most: int) -> tuple[Tensor, _Room]:
        """The past, of ``most`` tokens at most, with given (batch, n_filters, d_model) behind it; and its memory, which
        doubles when it is full."""
        before = state.past.shape[1]
        room = state.room
        if room is None or room.end == room.memory.shape[1]:
            kept = min(before, most - 1)
            memory = state.past.new_empty(len(given), max(64, 2 * kept), *given.shape[1:])
            memory[:, :kept] = state.past[:, before - kept :]
            room = cls(memory, kept)
        room.memory[:, room.end] = given
        end = room.end + 1
        return room.memory[:, end - min(before + 1, most) : end], cls(room.memory, end)


@dataclasses.dataclass(frozen=True)
class HyenaState(State):
    """Last inputs of the short convolution, (batch, d_conv - 1, (order + 1) d_model), and what each filter was given
    so far, (batch, tokens, n_filters, d_model): newest last, zero before a sequence's start, at most max_length - 1."""

    conv: Tensor
    past: Tensor
    #: What a step leaves for the next one to use, no part of the state and lost in a copy: the filters that it has
    #: computed, and the memory that the past is the end of, with room behind it.
    taps: _Taps | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    room: _Room | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def _cat(cls, states: Sequence[HyenaState]) -> HyenaState:
        longest = max(state.past.shape[1] for state in states)
        padded = [F.pad(state.past, (0, 0, 0, 0, longest - state.past.shape[1], 0)) for state in states]
        return cls(conv=torch.cat([state.conv for state in states]), past=torch.cat(padded))


class Hyena(SequenceMixer):
    """Hyena with implicit filters: ``y, _ = Hyena(d_model=256, max_length=2048)(x)``.

    A sequence is of any length, but no filter reaches further back than ``max_length``. The state grows by n_filters
    vectors a token up to that; :meth:`state_bytes` tells. A step takes a sum over all of the past. The filters that it
    needs stay with the state (once for all sequences, not counted) and are computed anew, to twice the lags, when the
    past outgrows them; where gradients are on, every time. A loop that gives its state away
    (``step(..., inplace=True)``) appends in place to memory that doubles when it is full.

    Args:
        d_model: width of input and output.
        max_length: L, the number of lags that filters have.
        order: N, gates; at least 1.
        filter_values: whether v passes a filter before its first gate, as in the paper's definition. The authors' code
            leaves this one out, so that order 2 has one long convolution.
        d_conv: width of the short convolution.
        d_features: features of the lag, odd and at least 3: its own size and (d_features - 1) / 2 frequencies.
        filter_width, filter_layers: width and hidden layers (at least 1) of the filters' network.
        frequency: of its sine activations at first (it is learned, one a unit).
        bias: whether the projections have biases.
        bare: one filter by itself, ``y = D x + h * x``: for inside a block (longscan.nn.blocks), which has gates,
            projections and a short convolution of its own. There is no order, filter_values, d_conv and bias then.

    Attributes:
        The filters' network, ``frequency`` and ``D`` stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: a size is below the least one, d_features is even, or there would be no filter (order 1 without
            filter_values).
    """

    undivided = "a filter reaches over all of the past, which no small state sums up"

    def __init__(
        self,
        d_model: int,
        *,
        max_length: int = 2048,
        order: int = 2,
        filter_values: bool = True,
        d_conv: int = 3,
        d_features: int = 5,
        filter_width: int = 64,
        filter_layers: int = 3,
        frequency: float = 10.0,
        bias: bool = True,
        bare: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, order, d_conv, filter_width, filter_layers) < 1 or max_length < 2:
            raise ArgumentError(
                "d_model, order, d_conv, filter_width and filter_layers must be at least 1, max_length at least 2; got "
                f"{d_model}, {order}, {d_conv}, {filter_width}, {filter_layers} and {max_length}"
            )
        if d_features < 3 or d_features % 2 == 0:
            raise ArgumentError(f"d_features must be odd and at least 3, got {d_features}")
        if order == 1 and not filter_values:
            raise ArgumentError("order 1 without filter_values has no filter at all")
        if bare:
            order, filter_values, d_conv = 1, True, 1
        self.d_model, self.max_length, self.order, self.d_conv = d_model, max_length, order, d_conv
        self.filter_values, self.d_features, self.bare = filter_values, d_features, bare
        self.n_filters = order if filter_values else order - 1
        if not bare:
            width = (order + 1) * d_model
            self.in_proj = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)
            # Holds the weights; the operator does the work.
            self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, device=device, dtype=dtype)
        widths = [d_features, *[filter_width] * filter_layers]
        layers = [nn.Linear(before, after, device=device) for before, after in itertools.pairwise(widths)]
        layers.append(nn.Linear(filter_width, self.n_filters * d_model, bias=False, device=device))
        self.filter_network = nn.ModuleList(layers)
        self.frequency = nn.Parameter(torch.full((filter_width,), frequency, device=device))
        self.D = nn.Parameter(torch.randn(self.n_filters, d_model, device=device))
        for parameter in (*self.filter_network.parameters(), self.frequency, self.D):
            no_weight_decay(keep_float32(parameter))
        if not bare:
            self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def filters(self, length: int) -> Tensor:
        """h of the equations above, without the skips D, for the first ``length`` lags: (n_filters, d_model, length).

        Raises:
            ArgumentError: length is less than 1 or beyond max_length.
        """
        if not 1 <= length <= self.max_length:
            raise ArgumentError(f"length must be in 1 .. {self.max_length} (max_length), got {length}")
        # Lags lose digits in anything less than float32.
        with torch.autocast(self.D.device.type, enabled=False):
            lags = torch.arange(length, device=self.D.device, dtype=self.D.dtype)[:, None]
            time = lags / (self.max_length - 1)
            bands = (self.d_features - 1) // 2
            # The first frequency is not quite 0, as in the authors' code: its sine would be no feature.
            frequencies = torch.linspace(1e-4, max(bands - 1, 1e-4), bands, device=lags.device, dtype=lags.dtype)
            angles = 2 * math.pi / self.max_length * lags * frequencies
            hidden = torch.cat((time, torch.cos(angles), -torch.sin(angles)), dim=1)
            *inner, last = self.filter_network
            for layer in inner:
                hidden = torch.sin(self.frequency * layer(hidden))
            rates = torch.linspace(1 / _SLOW, 1 / _FAST, self.d_model, device=lags.device, dtype=lags.dtype)
            window = torch.exp(math.log(_TARGET) * time * rates)
            taps: Tensor = last(hidden).unflatten(1, (self.n_filters, self.d_model)) * window[:, None]
            return taps.permute(1, 2, 0)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, HyenaState | None]:
        self.check_input(x, state, cu_seqlens, HyenaState)
        before = state if isinstance(state, HyenaState) else None
        gates, z, conv = self._enter(x, before, cu_seqlens)
        longest = x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
        known = 0 if before is None else before.past.shape[1]
        # One lag more than there are inputs: the operator keeps as many inputs as reach into the next call.
        filters = self.filters(min(known + longest + 1, self.max_length))
        kept = []
        for n in range(self.order):
            i = n - (self.order - self.n_filters)
            if i >= 0:
                past = None if before is None else before.past[:, :, i].to(z.dtype)
                z, last = long_conv(z, filters[i], self.D[i], past, cu_seqlens=cu_seqlens, return_final_state=True)
                kept.append(last)
            z = gates[n] * z if gates else z
        y = z if self.bare else self.out_proj(z)
        if before is None:
            return y, None
        return y, HyenaState(conv.to(before.conv.dtype), torch.stack(kept, dim=2).to(before.past.dtype))

    def _enter(
        self, x: Tensor, before: HyenaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """The gates and the values, each (batch, length, d_model), and the last inputs of the short convolution."""
        if self.bare:
            return (), x, x[:, :0] if before is None else before.conv
        u = self.in_proj(x)
        projected, conv = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None if before is None else before.conv.to(u.dtype),
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        *gates, z = projected.chunk(self.order + 1, dim=-1)
        return gates, z, conv

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, HyenaState]:
        self.check_input(x.unsqueeze(1), state, None, HyenaState)
        assert isinstance(state, HyenaState)
        gates: Sequence[Tensor] = ()
        z, conv = x, state.conv
        if not self.bare:
            u = self.in_proj(x)
            projected, conv = causal_conv1d_update(
                state.conv,
                u,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                inplace=inplace and state.conv.dtype == u.dtype,
            )
            *gates, z = projected.chunk(self.order + 1, dim=-1)
        reach = min(state.past.shape[1] + 1, self.max_length)
        kept = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self._kept(state, reach)
        taps = self._taps(reach) if kept is None else kept.values[-reach:]
        given = []
        for n in range(self.order):
            i = n - (self.order - self.n_filters)
            if i >= 0:
                given.append(z)
                z = _latest(state.past[:, state.past.shape[1] + 1 - reach :, i], z, taps[:, i])
            z = gates[n] * z if gates else z
        latest, room = torch.stack(given, dim=1).to(state.past.dtype), None
        if inplace and kept is not None:
            past, room = _Room.appended(state, latest, self.max_length - 1)
        else:
            past = torch.cat((state.past, latest[:, None]), dim=1)
            past = past[:, max(0, past.shape[1] - self.max_length + 1) :]
        after = HyenaState(conv.to(state.conv.dtype), past)
        if kept is not None:
            object.__setattr__(after, "taps", kept)
            object.__setattr__(after, "room", room)
        return z if self.bare else self.out_proj(z), after

    def _kept(self, state: HyenaState, reach: int) -> _Taps:
        """At least ``reach`` lags: those that came with the state, if they still serve, or twice as many."""
        parameters = (*self.filter_network.parameters(), self.frequency, self.D)
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
        kept = state.taps
        if kept is None or kept.weights != weights or kept.values.shape[0] < reach:
            kept = _Taps(self._taps(min(2 * reach, self.max_length)), weights)
        return kept

    def _taps(self, lags: int) -> Tensor:
        """(lags, n_filters, d_model), lag 0 last: in the order of the past, so that a step is one product and a sum."""
        skips = F.pad(self.D[..., None], (0, lags - 1))
        return (self.filters(lags) + skips).flip(2).permute(2, 0, 1).contiguous()

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HyenaState:
        check_batch(batch)
        weight = self.D if self.bare else self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        width = self.d_model if self.bare else (self.order + 1) * self.d_model
        return HyenaState(
            conv=torch.zeros(batch, self.d_conv - 1, width, device=device, dtype=dtype),
            past=torch.zeros(batch, 0, self.n_filters, self.d_model, device=device, dtype=dtype),
        )

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` tokens each: it grows up to max_length - 1."""
        state = self.initial_state(batch, device="meta")
        tokens = min(length, self.max_length - 1)
        return state.nbytes + batch * tokens * self.n_filters * self.d_model * state.past.element_size()

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_length={self.max_length}, order={self.order}, n_filters={self.n_filters}"


def _latest(past: Tensor, z: Tensor, taps: Tensor) -> Tensor:
    """One output of a long convolution: past (batch, reach - 1, d_model), z (batch, d_model), taps (reach, d_model)."""
    wide = torch.promote_types(z.dtype, taps.dtype)
    # An einsum would put the channels first: fifteen times slower.
    return ((past.to(wide) * taps[:-1]).sum(1) + taps[-1] * z.to(wide)).to(z.dtype)
