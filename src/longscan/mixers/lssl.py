r"""LSSL: a time-invariant state space model per channel with a dense A, as a recurrence and as a convolution.

Gu, Johnson, Goel, Saab, Dao, Rudra and Re 2021 (arXiv 2110.13985), section 3. Every channel has the continuous system
A, B at a step Delta of its own, discretised by the generalised bilinear transform:

.. math::
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad y_t = C h_t + D u_t
    \qquad\Longleftrightarrow\qquad
    y = K * u + D u, \quad K_l = C \bar A^l \bar B

The kernel comes from the Krylov matrix :math:`(\bar B, \bar A \bar B, \bar A^2 \bar B, \dots)`, doubled in length with
each squaring of A_bar: of order N^2 L operations and N L numbers a channel, which is what S4 was made to avoid.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.packing import over_rows
from longscan.nn.recurrences import time_invariant
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.ops import long_conv
from longscan.statespace import discretise_dense, log_uniform_steps, transition


@dataclasses.dataclass(frozen=True)
class LSSLState(State):
    """The states (batch, d_model, d_state), float32."""

    ssm: Tensor


class LSSL(SequenceMixer):
    """LSSL with GELU and an output projection: ``y, _ = LSSL(d_model=64)(x)``.

    Args:
        d_model: width; each channel has a system of its own.
        d_state: N, numbers of state per channel.
        measure: where A and B start, see :func:`longscan.statespace.transition`.
        fixed: A, B and the steps stay where they start (the paper's LSSL-f): A_bar and B_bar are then buffers, and a
            step of the recurrence costs N^2 a channel, where it else discretises first, at N^3.
        discretisation, alpha: as for :func:`longscan.statespace.discretise_dense`.
        dt_min, dt_max: steps start log-uniformly between the two.
        bias: of the output projection.

    Attributes:
        A, B, which all channels share, log_dt, C and D stay float32 when the module is converted to bfloat16 or
        float16. Training may move A to where the system grows; nothing here forbids it.
    """

    time_invariant = True
    undivided = None
    A_bar: Tensor
    B_bar: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        measure: str = "legs",
        fixed: bool = False,
        discretisation: str = "bilinear",
        alpha: float | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ArgumentError(f"d_model must be at least 1, got {d_model}")
        self.d_model, self.d_state, self.fixed = d_model, d_state, fixed
        self.discretisation, self.alpha = discretisation, alpha
        # PyTorch's dense solvers may wait for the GPU.
        self.capturable = fixed
        A, B = transition(measure, d_state)
        log_dt = log_uniform_steps(d_model, dt_min, dt_max, device)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values.to(device=device, dtype=wide))))

        if fixed:
            dt = torch.exp(log_dt.to(A))
            for name, part in zip(("A_bar", "B_bar"), self._discretise(A, B, dt), strict=True):
                self.register_buffer(name, keep_float32(part.to(device=device, dtype=wide)))
        else:
            self._discretise(A, B, torch.tensor(dt_min))  # says what is wrong with the method now, not later
            self.A, self.B, self.log_dt = system(A), system(B), system(log_dt)
        self.C = system(torch.randn(d_model, d_state, device=device) / math.sqrt(d_state))
        self.D = system(torch.randn(d_model, device=device))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def _discretise(self, A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        return discretise_dense(A, B, dt, self.discretisation, alpha=self.alpha)

    def system(self) -> tuple[Tensor, Tensor]:
        """A_bar (d_model, d_state, d_state) and B_bar (d_model, d_state)."""
        return (self.A_bar, self.B_bar) if self.fixed else self._discretise(self.A, self.B, torch.exp(self.log_dt))

    def convolution_kernel(self, length: int) -> Tensor:
        """K of the equations above, without the skip D: (d_model, length) float32."""
        if length < 1:
            raise ArgumentError(f"length must be at least 1, got {length}")
        return torch.einsum("dn,dnl->dl", self.C, _krylov(*self.system(), length))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LSSLState | None]:
        self.check_input(x, state, cu_seqlens, LSSLState)
        before = state if isinstance(state, LSSLState) else None
        part = current_part()
        if part is not None:
            entering, cu_seqlens = time_invariant(part, x, cu_seqlens, self._leave, self._advance)
            before = LSSLState(entering)
        if cu_seqlens is not None:
            y, after = over_rows(self._convolve, x, before, cu_seqlens)
            return y, None if state is None else after
        y, after = self._convolve(x, before, None)
        return y, None if state is None else after

    def _leave(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(self.C.dtype)
            return torch.einsum("dnl,bld->bdn", _krylov(*self.system(), u.shape[1]), u.flip(1))

    def _advance(self, states: Tensor, steps: int) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return _advance(self.system()[0], states, steps, steps)

    def _convolve(self, x: Tensor, before: LSSLState | None, lengths: Tensor | None) -> tuple[Tensor, LSSLState]:
        # Autocast is for matrix products of activations: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(self.C.dtype)
            length = u.shape[1]
            A_bar, B_bar = self.system()
            krylov = _krylov(A_bar, B_bar, length)
            y = long_conv(u, torch.einsum("dn,dnl->dl", self.C, krylov), self.D)
            assert isinstance(y, Tensor)
            # Each row's inputs, the last first: what the columns of the Krylov matrix multiply.
            backwards = u.flip(1) if lengths is None else _from_the_end(u, lengths.to(u.device))
            ssm = torch.einsum("dnl,bld->bdn", krylov, backwards)
            if before is not None:
                # At step l the old state has gone through A_bar l + 1 times: C A_bar^l is a Krylov matrix too.
                first = torch.einsum("dnm,bdm->bdn", A_bar, before.ssm)
                y = y + torch.einsum("dnl,bdn->bld", _krylov(A_bar.mT, self.C, length), first)
                steps = length if lengths is None else lengths.to(u.device)
                ssm = ssm + _advance(A_bar, before.ssm, steps, length)
        return self._project(y.to(x.dtype)), LSSLState(ssm)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, LSSLState]:
        self.check_input(x.unsqueeze(1), state, None, LSSLState)
        assert isinstance(state, LSSLState)
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(self.C.dtype)
            A_bar, B_bar = self.system()
            ssm = torch.einsum("dnm,bdm->bdn", A_bar, state.ssm) + B_bar * u[..., None]
            y = (ssm * self.C).sum(-1) + self.D * u
        return self._project(y.to(x.dtype)), LSSLState(ssm)

    def _project(self, y: Tensor) -> Tensor:
        return self.out_proj(F.gelu(y))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LSSLState:
        check_batch(batch)
        device = self.C.device if device is None else device
        return LSSLState(torch.zeros(batch, self.d_model, self.d_state, device=device, dtype=self.C.dtype))

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, fixed={self.fixed}, discretisation={self.discretisation!r}"


def _krylov(A: Tensor, B: Tensor, length: int) -> Tensor:
    """The columns ``A^l B``, l < length: A (channels, N, N) and B (channels, N) to (channels, N, length)."""
    columns = B[..., None]
    while columns.shape[-1] < length:
        columns = torch.cat((columns, A @ columns[..., : length - columns.shape[-1]]), dim=-1)
        A = A @ A
    return columns


def _advance(A: Tensor, state: Tensor, steps: int | Tensor, longest: int) -> Tensor:
    """``A^steps state``, for all rows or each its own number of steps, at most ``longest``, by its binary digits."""
    for digit in range(longest.bit_length()):
        moved, taken = torch.einsum("dnm,bdm->bdn", A, state), steps >> digit & 1
        if isinstance(taken, Tensor):
            state = torch.where(taken.bool()[:, None, None], moved, state)
        elif taken:
            state = moved
        A = A @ A
    return state


def _from_the_end(u: Tensor, lengths: Tensor) -> Tensor:
    """Each row (rows, length, d_model) backwards from its own end, then zeros."""
    place = lengths[:, None] - 1 - torch.arange(u.shape[1], device=u.device)
    own = u.gather(1, place.clamp(min=0)[..., None].expand_as(u))
    return torch.where((place >= 0)[..., None], own, 0)
