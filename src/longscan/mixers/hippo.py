r"""HiPPO-RNN: a gated recurrent network whose memory is the projection of its own signal onto polynomials.

Gu, Dao, Ermon, Rudra and Re 2020 (arXiv 2008.07669), section 4 and appendix F, in the order of the authors' code:

.. math::
    u_t &= W_u [x_t, h_{t-1}] + b_u, \qquad m_t = \bar A_t m_{t-1} + \bar B_t u_t \\
    g_t &= \sigma(W_g [x_t, m_t] + b_g), \qquad h_t = (1 - g_t) \odot h_{t-1} + g_t \odot \tanh(W_h [x_t, m_t] + b_h)

With LegS the system is ``m' = (A m + B u) / t``: step t of the sequence is a step of 1 / t, so that all of the past is
remembered evenly, whatever its length, and there is no time scale to choose. Other measures have a window.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32
from longscan.nn.packing import over_rows
from longscan.nn.relay import relay
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.statespace import discretise_dense, transition
from longscan.statespace.discretisation import ALPHAS

# The explicit Euler step is left out: it explodes while t is below the order.
METHODS = ("bilinear", "backward_euler")


@dataclasses.dataclass(frozen=True)
class HiPPOState(State):
    """m (batch, d_memory, order) and h (batch, d_hidden), float32, and the tokens that came before, (batch,) int64."""

    memory: Tensor
    hidden: Tensor
    lengths: Tensor


class HiPPO(SequenceMixer):
    """One layer of HiPPO-RNN: ``y, _ = HiPPO(d_model=256)(x)``.

    Args:
        d_model: width of input and output.
        d_hidden: width of h; default: d_model, and then y is h itself. Of another width, h is projected.
        d_memory: signals that are remembered; the paper has one.
        order: N, coefficients per signal; default: d_hidden, as in the paper.
        measure: "legs", or with a window "legt", "lagt" or "fourier" (even order), see
            :func:`longscan.statespace.transition`.
        window: for all but "legs": the window's length (time constant, of "lagt") in steps.
        discretisation: "bilinear", as in the paper's experiments, or "backward_euler".

    Attributes:
        A, B: (order, order) and (order,), float32 buffers. Not trained.
    """

    undivided = None
    A: Tensor
    B: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        d_memory: int = 1,
        order: int | None = None,
        measure: str = "legs",
        window: float | None = None,
        discretisation: str = "bilinear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = d_model if d_hidden is None else d_hidden
        order = d_hidden if order is None else order
        if min(d_model, d_hidden, d_memory, order) < 1:
            raise ArgumentError(
                "d_model, d_hidden, d_memory and order must be at least 1; got "
                f"{d_model}, {d_hidden}, {d_memory} and {order}"
            )
        if (window is None) != (measure == "legs") or (window is not None and not window > 0):
            raise ArgumentError(
                f"window must be a positive number of steps, and None for 'legs'; got {window!r} for {measure!r}"
            )
        if discretisation not in METHODS:
            raise ArgumentError(f"discretisation must be one of {', '.join(METHODS)}; got {discretisation!r}")
        self.d_model, self.d_hidden, self.d_memory, self.order = d_model, d_hidden, d_memory, order
        self.measure, self.window, self.discretisation = measure, window, discretisation
        # x's parts of u, g and h, then h's of u, and m's of g and h.
        self.in_proj = nn.Linear(d_model, d_memory + 2 * d_hidden, device=device, dtype=dtype)
        self.encoder = nn.Linear(d_hidden, d_memory, bias=False, device=device, dtype=dtype)
        self.memory_proj = nn.Linear(d_memory * order, 2 * d_hidden, bias=False, device=device, dtype=dtype)
        self.out_proj = None if d_hidden == d_model else nn.Linear(d_hidden, d_model, device=device, dtype=dtype)
        A, B = transition(measure, order)
        if window is not None:
            A, B = discretise_dense(A, B, 1 / window, discretisation)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("A", keep_float32(A.to(device=device, dtype=wide)))
        self.register_buffer("B", keep_float32(B.to(device=device, dtype=wide)))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, HiPPOState | None]:
        self.check_input(x, state, cu_seqlens, HiPPOState)
        if current_part() is not None:
            return relay(self, x, cu_seqlens), None
        before = state if isinstance(state, HiPPOState) else None
        if cu_seqlens is not None:
            return over_rows(self._walk, x, before, cu_seqlens)
        y, after = self._walk(x, before, None)
        return y, None if before is None else after

    def _walk(self, x: Tensor, before: HiPPOState | None, lengths: Tensor | None) -> tuple[Tensor, HiPPOState]:
        """Step by step, in float32 from the projection of x on."""
        # A fresh batch has one clock for all its rows, and so one matrix a step.
        clock = torch.zeros(1, device=x.device, dtype=torch.int64) if before is None else before.lengths
        if before is None:
            before = self.initial_state(x.shape[0], x.device)
        memory, hidden = before.memory, before.hidden
        projected = self.in_proj(x)
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            wide = memory.dtype
            W_u, W_m = (layer.weight.to(wide).T for layer in (self.encoder, self.memory_proj))
            going = None if lengths is None else lengths.to(x.device)[:, None]
            for place, own in enumerate(projected.to(wide).unbind(1)):
                u, gate, new = own.split([self.d_memory, self.d_hidden, self.d_hidden], dim=-1)
                now = self.remember(memory, u + hidden @ W_u, clock + place)
                more_gate, more_new = (now.flatten(-2) @ W_m).chunk(2, dim=-1)
                h = torch.lerp(hidden, torch.tanh(new + more_new), torch.sigmoid(gate + more_gate))
                outputs.append(h)
                if going is not None:
                    now = torch.where(going[..., None] > place, now, memory)
                    h = torch.where(going > place, h, hidden)
                memory, hidden = now, h
            y = torch.stack(outputs, dim=1).to(x.dtype)
        steps = x.shape[1] if lengths is None else lengths.to(x.device)
        after = HiPPOState(memory, hidden, before.lengths + steps)
        return y if self.out_proj is None else self.out_proj(y), after

    def remember(self, memory: Tensor, u: Tensor, clock: Tensor) -> Tensor:
        """One step of the memory: m_t of m_t-1 (batch, d_memory, order) and u_t (batch, d_memory).

        ``clock`` (batch,), or (1,) for all rows, is the number of steps before this one.
        """
        if self.measure != "legs":
            return memory @ self.A.T + u[..., None] * self.B
        # (1 - a A / t) m_t = (1 + (1 - a) A / t) m_t-1 + B u_t / t, of which A is lower triangular.
        alpha = ALPHAS[self.discretisation]
        rate = 1 / (clock + 1).to(memory.dtype)[:, None, None]
        right = memory + rate * ((1 - alpha) * (memory @ self.A.T) + u[..., None] * self.B)
        left = torch.eye(self.order, dtype=memory.dtype, device=memory.device) - alpha * rate * self.A
        if len(left) < len(right):
            flat = torch.linalg.solve_triangular(left[0], right.flatten(0, 1).T, upper=False)
            return flat.T.view_as(right)
        return torch.linalg.solve_triangular(left, right.mT, upper=False).mT

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HiPPOState:
        check_batch(batch)
        device, wide = self.A.device if device is None else device, self.A.dtype
        return HiPPOState(
            memory=torch.zeros(batch, self.d_memory, self.order, device=device, dtype=wide),
            hidden=torch.zeros(batch, self.d_hidden, device=device, dtype=wide),
            lengths=torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def extra_repr(self) -> str:
        return f"{self.d_model}, d_hidden={self.d_hidden}, order={self.order}, measure={self.measure!r}"
