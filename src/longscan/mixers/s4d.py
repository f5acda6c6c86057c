r"""S4D: one time-invariant diagonal state space model per channel.

Gu, Gupta, Goel and Re 2022 (arXiv 2206.11893). With N complex states, each for a conjugate pair, and a step Delta per
channel:

.. math::
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad y_t = 2 \mathrm{Re}(C h_t) + D u_t
    \qquad\Longleftrightarrow\qquad
    y = K * u + D u, \quad K_l = 2 \mathrm{Re} \sum_n C_n \bar B_n \bar A_n^l

One system, three views: a convolution by FFT for whole sequences, a scan for packed ones, a recurrence for single
tokens.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.diagonal_ssm import DiagonalSSM
from longscan.nn.mixer import SequenceMixer, check_batch, check_sizes, keep_float32, no_weight_decay
from longscan.nn.state import State
from longscan.statespace import diagonal, discretise, log_uniform_steps
from longscan.statespace.discretisation import METHODS


@dataclasses.dataclass(frozen=True)
class S4DState(State):
    """The states (batch, d_model, d_state / 2), complex64."""

    ssm: Tensor


class S4D(SequenceMixer):
    """S4D with GELU and an output projection: ``y, _ = S4D(d_model=256)(x)``.

    Args:
        d_model: width; each channel has a system of its own.
        d_state: real numbers of state per channel, that is ``d_state / 2`` complex states.
        a_init: "s4d-legs", "s4d-inv", "s4d-lin", "s4d-real" or "dss", see :func:`longscan.statespace.diagonal`.
        discretisation: "zoh" or "bilinear".
        dt_min, dt_max: steps start log-uniformly between the two.
        glu: the output projection is gated (twice the width, then a GLU).
        bias: of the output projection.
        bare: y is the system's output itself, without GELU and projection: for inside a block (longscan.nn.blocks).

    Attributes:
        log_dt, A_log, A_imag, C and D stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: d_model is below 1, d_state is odd, or there is no such ``a_init`` or discretisation.
    """

    time_invariant = True
    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        a_init: str = "s4d-lin",
        discretisation: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: bool = True,
        bias: bool = True,
        bare: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state)
        if d_state % 2:
            raise ArgumentError(f"d_state must be even, two for each complex state; got {d_state}")
        if discretisation not in METHODS:
            raise ArgumentError(f"discretisation must be one of {', '.join(METHODS)}; got {discretisation!r}")
        self.d_model, self.d_state, self.num_states = d_model, d_state, d_state // 2
        self.discretisation, self.glu = discretisation, glu
        A = diagonal(a_init, self.num_states).to(device=device, dtype=torch.complex64).expand(d_model, -1)

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values.clone())))

        self.log_dt = system(log_uniform_steps(d_model, dt_min, dt_max, device))
        self.A_log = system(torch.log(-A.real))
        self.A_imag = system(A.imag)
        # Pairs of real numbers: optimisers and wrappers for distributed training treat them as any other tensor.
        self.C = system(torch.randn(d_model, self.num_states, 2, device=device) * math.sqrt(0.5))
        self.D = system(torch.randn(d_model, device=device))
        self.out_proj: nn.Linear | None = None
        if not bare:
            width = 2 * d_model if glu else d_model
            self.out_proj = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)

    def system(self) -> DiagonalSSM:
        """log A_bar, B_bar and C of the recurrence, each (d_model, N) complex, and D."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag)
        log_A_bar, B_bar = discretise(A, torch.exp(self.log_dt)[:, None], self.discretisation)
        return DiagonalSSM(log_A_bar, B_bar, torch.view_as_complex(self.C), self.D)

    def convolution_kernel(self, length: int) -> Tensor:
        """K of the equations above without the skip D: (d_model, length) float32."""
        if length < 1:
            raise ArgumentError(f"length must be at least 1, got {length}")
        return self.system().kernel(length)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S4DState | None]:
        self.check_input(x, state, cu_seqlens, S4DState)
        before = state.ssm if isinstance(state, S4DState) else None
        # Autocast is for matrix products: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, self.D.dtype)
            after: Tensor | None
            if cu_seqlens is None:
                y, after = self.system().convolve(x.to(wide), before)
            else:
                y, after = self.system().scan(x.to(wide), before, cu_seqlens)
        return self._project(y.to(x.dtype)), None if before is None or after is None else S4DState(after)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, S4DState]:
        self.check_input(x.unsqueeze(1), state, None, S4DState)
        assert isinstance(state, S4DState)
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, self.D.dtype))
            y, ssm = self.system().step(u, state.ssm, inplace=inplace)
        return self._project(y.to(x.dtype)), S4DState(ssm)

    def _project(self, y: Tensor) -> Tensor:
        if self.out_proj is None:
            return y
        y = self.out_proj(F.gelu(y))
        return F.glu(y, dim=-1) if self.glu else y

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        check_batch(batch)
        wide = torch.promote_types(self.D.dtype, torch.complex64)
        device = self.D.device if device is None else device
        return S4DState(torch.zeros(batch, self.d_model, self.num_states, device=device, dtype=wide))

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_state={self.d_state}, discretisation={self.discretisation!r}"
