r"""LSSL: a time-invariant state space model per channel with a dense A, as a recurrence and as a convolution.

Gu, Johnson, Goel, Saab, Dao, Rudra and Re 2021 (arXiv 2110.13985), section 3. Every channel has the continuous system
A, B at a step Delta of its own, discretised by the generalised bilinear transform:

.. math::
    h_t = \bar A h_{t-1} + \bar B u_t, \qquad y_t = C h_t + D u_t
    \qquad\Longleftrightarrow\qquad
    y = K * u + D u, \quad K_l = C \bar A^l \bar B

The paper's kernel comes from the Krylov matrix :math:`(\bar B, \bar A \bar B, \dots, \bar A^{L-1} \bar B)`: of order
N^2 L operations and N L numbers a channel, which is what S4 was made to avoid. Here it is cut in two, with T about the
root of L and both factors doubled in length with each squaring of A_bar:

.. math::
    K_{jT + i} = (C \bar A^{jT})\, (\bar A^i \bar B), \qquad i < T

so that N L operations and N sqrt(L) numbers a channel are left, beside N^2 sqrt(L) and N^3 log L for the powers.
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

    Raises:
        ArgumentError: a size is below 1, or there is no such measure or discretisation.
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
        A_bar, B_bar = self.system()
        return _kernels(A_bar, self.C, B_bar[..., None], length)[:, 0]

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
            return _pulled(*self.system(), u.flip(1))

    def _advance(self, states: Tensor, steps: int) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return _advance(self.system()[0], states, steps, steps)

    def _convolve(self, x: Tensor, before: LSSLState | None, lengths: Tensor | None) -> tuple[Tensor, LSSLState]:
        # Autocast is for matrix products of activations: the system itself is computed in float32.
        with torch.autocast(x.device.type, enabled=False):
            y, after = self._run(x.to(self.C.dtype), before, lengths)
        return self._project(y.to(x.dtype)), after

    def _run(self, u: Tensor, before: LSSLState | None, lengths: Tensor | None) -> tuple[Tensor, LSSLState]:
        """y before GELU and projection, and the state, of which nothing is computed where none came in."""
        A_bar, B_bar = self.system()
        length, sources = u.shape[1], B_bar[..., None]
        if before is not None:
            # At step l the old state has gone through A_bar l + 1 times: its part of y is a kernel too.
            sources = torch.cat((sources, torch.einsum("dnm,bdm->dnb", A_bar, before.ssm)), dim=-1)
        kernel, *response = _kernels(A_bar, self.C, sources, length).unbind(1)
        y = long_conv(u, kernel, self.D)
        assert isinstance(y, Tensor)
        if before is None:
            return y, self.initial_state(u.shape[0], u.device)
        # Each row's inputs, the last first.
        backwards = u.flip(1) if lengths is None else _from_the_end(u, lengths.to(u.device))
        steps = length if lengths is None else lengths.to(u.device)
        ssm = _pulled(A_bar, B_bar, backwards) + _advance(A_bar, before.ssm, steps, length)
        return y + torch.stack(response).transpose(1, 2), LSSLState(ssm)

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


def _stretch(length: int) -> int:
    """The T of the module's docstring: a power of 2, and at least the root of the length."""
    return int(2 ** ((length - 1).bit_length() + 1 >> 1))


def _krylov(A: Tensor, X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``A^i X``, i < count: A (channels, N, N) and X (channels, N, k) to (channels, N, count, k). And the power of A
    that goes on from there, if the count is a power of 2."""
    found, k = X, X.shape[-1]
    while found.shape[-1] < count * k:
        found = torch.cat((found, A @ found[..., : count * k - found.shape[-1]]), dim=-1)
        A = A @ A
    return found.unflatten(-1, (count, k)), A


def _kernels(A: Tensor, C: Tensor, X: Tensor, length: int) -> Tensor:
    """``C A^l X``, l < length: A (channels, N, N), C (channels, N), X (channels, N, k) to (channels, k, length)."""
    size = _stretch(length)
    columns, power = _krylov(A, X, size)
    rows, _ = _krylov(power.mT, C[..., None], -(-length // size))
    found = rows.squeeze(-1).mT @ columns.flatten(2)  # (channels, stretches, size k)
    return found.unflatten(2, (size, -1)).permute(0, 3, 1, 2).flatten(2)[..., :length]


def _pulled(A: Tensor, B: Tensor, u: Tensor) -> Tensor:
    """``sum_l A^l B u_l`` of u (rows, length, channels): (rows, channels, N)."""
    size = _stretch(u.shape[1])
    columns, A = _krylov(A, B[..., None], size)
    stretches = F.pad(u, (0, 0, 0, -u.shape[1] % size)).unflatten(1, (-1, size)).permute(3, 2, 1, 0)
    found = columns.squeeze(-1) @ stretches.flatten(2)
    found = found.unflatten(2, (-1, u.shape[0]))  # (channels, N, stretches, rows)
    # Neighbours are joined until one is left.
    while found.shape[2] > 1:
        found = F.pad(found, (0, 0, 0, found.shape[2] % 2))
        later = (A @ found[:, :, 1::2].flatten(2)).unflatten(2, (-1, u.shape[0]))
        found, A = found[:, :, ::2] + later, A @ A
    return found[:, :, 0].permute(2, 0, 1)


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
