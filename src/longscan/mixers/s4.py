r"""S4: one time-invariant state space model per channel, its A normal plus low rank.

Gu, Goel and Re 2021 (arXiv 2111.00396), with the signs of Goel et al. 2022 (SaShiMi, arXiv 2202.09729), which keep A
stable: :math:`A = \mathrm{diag}(w) - P P^*`. With N states in conjugate pairs and a step Delta per channel, discretised
by the bilinear rule,

.. math::
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad y_t = C h_t + D u_t
    \qquad\Longleftrightarrow\qquad
    y = K * u + D u, \quad K_l = C \bar A^l \bar B

The kernel's values at the roots of unity, z^S = 1, are (lemmas C.2 to C.4, with s = 2 (1 - z) / (1 + z))

.. math::
    \hat K(z) = \sum_{l < S} K_l z^l = \tilde C (I - \bar A z)^{-1} \bar B
    = \frac{2}{1 + z}\, \tilde C (s - \Delta A)^{-1} \Delta B, \qquad \tilde C = C (I - \bar A^S)

where Woodbury's identity leaves Cauchy products of C~ and P* with B and P. An inverse FFT gives K.

One system, two views: convolution for whole sequences, recurrence for single tokens, in order of N operations.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn import dplr
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.packing import over_rows
from longscan.nn.recurrences import time_invariant
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.ops import long_conv
from longscan.statespace import log_uniform_steps, nplr

# The least decay of a normal part: LegT's and Fourier's have none, and its logarithm is what is trained.
_LEAST_DECAY = 1e-4


@dataclasses.dataclass(frozen=True)
class S4State(State):
    """The states (batch, d_model, d_state / 2), complex64."""

    ssm: Tensor


class S4(SequenceMixer):
    """S4 with GELU and an output projection: ``y, _ = S4(d_model=256)(x)``.

    Args:
        d_model: width; each channel has a system of its own.
        d_state: N, real numbers of state per channel, that is ``N / 2`` conjugate pairs.
        measure: "legs", "legt", "lagt" or "fourier": the memory that A and B start as, see
            :func:`longscan.statespace.nplr`. Decays start at 1e-4 at least.
        dt_min, dt_max: steps start log-uniformly between the two.
        bidirectional: a second kernel, with a C of its own, reads the sequence from its end:
            ``y_t = sum_l K_l u_{t-l} + K'_l u_{t+l}``. Whole sequences only: there is no state and no step.
        glu: the output projection is gated (twice the width, then a GLU).
        bias: of the output projection.
        bare: y is the system's output itself, without GELU and projection: for inside a block (longscan.nn.blocks).

    Attributes:
        log_dt, A_log, A_imag, P, B, C and D stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: d_model is below 1, d_state is odd or below 2, or there is no such measure.
    """

    time_invariant = True
    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        measure: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bidirectional: bool = False,
        glu: bool = True,
        bias: bool = True,
        bare: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_state < 2 or d_state % 2:
            raise ArgumentError(
                f"d_model must be at least 1 and d_state even and at least 2; got {d_model} and {d_state}"
            )
        self.d_model, self.d_state, self.num_states = d_model, d_state, d_state // 2
        self.measure, self.bidirectional, self.glu = measure, bidirectional, glu
        self.undivided = "a bidirectional S4 reads the future too" if bidirectional else None
        w, P, B, _ = nplr(measure, d_state)

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values.to(device=device, dtype=torch.float32))))

        def each(values: Tensor) -> Tensor:
            """One of each conjugate pair, for every channel."""
            return values[..., : self.num_states].expand(d_model, *values.shape[:-1], -1).clone()

        self.log_dt = system(log_uniform_steps(d_model, dt_min, dt_max, device))
        self.A_log = system(torch.log((-each(w).real).clamp(min=_LEAST_DECAY)))
        self.A_imag = system(each(w).imag)
        # Pairs of real numbers: optimisers and wrappers for distributed training treat them as any other tensor.
        self.P = system(torch.view_as_real(each(P.mT)))  # (d_model, rank, N / 2, 2)
        self.B = system(torch.view_as_real(each(B)))
        self.C = system(torch.randn(1 + bidirectional, d_model, self.num_states, 2) * math.sqrt(0.5))
        self.D = system(torch.randn(d_model))
        self.out_proj: nn.Linear | None = None
        if not bare:
            width = 2 * d_model if glu else d_model
            self.out_proj = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Delta w (d_model, N / 2), sqrt(Delta) P (rank, d_model, N / 2) and Delta B (d_model, N / 2), complex."""
        dt = torch.exp(self.log_dt)[:, None]
        w = dt * torch.complex(-torch.exp(self.A_log), self.A_imag)
        P = torch.sqrt(dt) * torch.view_as_complex(self.P).transpose(0, 1)
        return w, P, dt * torch.view_as_complex(self.B)

    def convolution_kernel(self, length: int) -> Tensor:
        """K of the equations above without the skip D: (d_model, length) float32.

        In memory of order N + length a channel, and N^2 for each power of A_bar up to the length.

        Raises:
            ArgumentError: length below 1, or the mixer is bidirectional and has two kernels.
        """
        if length < 1:
            raise ArgumentError(f"length must be at least 1, got {length}")
        self._check_causal("a causal kernel")
        return self._kernels(length)[0]

    def _kernels(self, length: int) -> Tensor:
        """(1 or 2, d_model, length): that of each direction."""
        w, P, B = self.system()
        C = dplr.truncated(torch.view_as_complex(self.C), dplr.powers(w, P, length)[-1])
        return torch.cat([dplr.generated(w, P, own, B[None], length) for own in C])

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4State | None]:
        self.check_input(x, state, cu_seqlens, S4State)
        after: S4State | None = None
        # Autocast is for matrix products: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, self.D.dtype))
            part = current_part()
            if part is not None:
                before, offsets = time_invariant(part, u, cu_seqlens, self._leave, self._advance)
                y, _ = self._from(u, S4State(before), offsets)
            elif state is None:
                y = self._convolve(u, cu_seqlens)
            else:
                self._check_causal("a state")
                assert isinstance(state, S4State)
                y, after = self._from(u, state, cu_seqlens)
        return self._project(y.to(x.dtype)), after

    def _convolve(self, u: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """u (batch, length, d_model) from no past."""
        kernels = self._kernels(u.shape[1])
        y = long_conv(u, kernels[0], self.D, cu_seqlens=cu_seqlens)
        assert isinstance(y, Tensor)
        if self.bidirectional:
            ends = None if cu_seqlens is None else (u.shape[1] - cu_seqlens).flip(0)
            back = long_conv(u.flip(1), kernels[1], cu_seqlens=ends)
            assert isinstance(back, Tensor)
            y = y + back.flip(1)
        return y

    def _from(self, u: Tensor, state: S4State, cu_seqlens: Tensor | None) -> tuple[Tensor, S4State | None]:
        if cu_seqlens is None:
            return self._continue(u, state, torch.full((u.shape[0],), u.shape[1]))
        return over_rows(self._continue, u, state, cu_seqlens)

    def _leave(self, u: Tensor) -> Tensor:
        """The states after u (batch, length, d_model), from an empty past."""
        w, P, B = self.system()
        return dplr.pulled(dplr.powers(w, P, u.shape[1]), dplr.solve(w, P, B), u.flip(1).transpose(1, 2))

    def _advance(self, states: Tensor, steps: int) -> Tensor:
        w, P, _ = self.system()
        return dplr.advanced(states, dplr.powers(w, P, steps), torch.full((states.shape[0],), steps))

    def _continue(self, u: Tensor, state: S4State, lengths: Tensor) -> tuple[Tensor, S4State]:
        """u (rows, longest, d_model) from a state, and the state of each row after its own length."""
        h, longest = state.ssm, u.shape[1]
        w, P, B = self.system()
        C, stages = torch.view_as_complex(self.C)[0], dplr.powers(w, P, longest)
        # After l steps the old state gives C A_bar^(l + 1) h: a kernel with (I + Delta A / 2) h for Delta B.
        sources = torch.cat((B[None], dplr.half_step(w, P, h)))
        kernel, *response = dplr.generated(w, P, dplr.truncated(C, stages[-1]), sources, longest).split([1, h.shape[0]])
        y = long_conv(u, kernel[0], self.D)
        assert isinstance(y, Tensor)
        # Time runs backwards from each row's own end.
        place = lengths.to(u.device)[:, None] - 1 - torch.arange(longest, device=u.device)
        values = u.gather(1, place.clamp(min=0)[..., None].expand_as(u)) * (place >= 0)[..., None]
        after = dplr.advanced(h, stages, lengths) + dplr.pulled(stages, dplr.solve(w, P, B), values.transpose(1, 2))
        return y + response[0].transpose(1, 2), S4State(after)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, S4State]:
        self._check_causal("a step")
        self.check_input(x.unsqueeze(1), state, None, S4State)
        assert isinstance(state, S4State)
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, self.D.dtype))
            w, P, B = self.system()
            h = dplr.solve(w, P, dplr.half_step(w, P, state.ssm) + B * u[..., None])
            y = 2 * (torch.view_as_complex(self.C)[0] * h).sum(-1).real + self.D * u
        return self._project(y.to(x.dtype)), S4State(h)

    def _project(self, y: Tensor) -> Tensor:
        if self.out_proj is None:
            return y
        y = self.out_proj(F.gelu(y))
        return F.glu(y, dim=-1) if self.glu else y

    def _check_causal(self, what: str) -> None:
        if self.bidirectional:
            raise ArgumentError(
                f"a bidirectional S4 has no use for {what}: it reads the future too, so it takes whole sequences only; "
                "use bidirectional=False to stream"
            )

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4State:
        check_batch(batch)
        self._check_causal("a state")
        wide = torch.promote_types(self.D.dtype, torch.complex64)
        device = self.D.device if device is None else device
        return S4State(torch.zeros(batch, self.d_model, self.num_states, device=device, dtype=wide))

    def extra_repr(self) -> str:
        kind = ", bidirectional" if self.bidirectional else ""
        return f"{self.d_model}, d_state={self.d_state}, measure={self.measure!r}{kind}"
