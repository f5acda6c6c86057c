r"""HiPPO-RNN: a gated recurrent network whose memory is the projection of its own signal onto polynomials.

Gu, Dao, Ermon, Rudra and Re 2020 (arXiv 2008.07669), section 4 and appendix F, in the order of the authors' code:

.. math::
    u_t &= W_u [x_t, h_{t-1}] + b_u, \qquad m_t = \bar A_t m_{t-1} + \bar B_t u_t \\
    g_t &= \sigma(W_g [x_t, m_t] + b_g), \qquad h_t = (1 - g_t) \odot h_{t-1} + g_t \odot \tanh(W_h [x_t, m_t] + b_h)

With LegS the system is ``m' = (A m + B u) / t``: step t of the sequence is a step of 1 / t, so that all of the past is
remembered evenly, whatever its length, and there is no time scale to choose. Other measures have a window.

The matrices of many steps are made at once. The walk is then products and gates, and what it keeps for its gradient is
h and m of every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longscan.errors import ArgumentError
from longscan.nn.legs import BlockStep, DenseStep, legs_steps, numbers
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32
from longscan.nn.packing import after_own_length, over_rows
from longscan.nn.relay import relay
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.nn.walk import Tensors, walk
from longscan.statespace import discretise_dense, transition
from longscan.statespace.discretisation import ALPHAS

# The explicit Euler step is left out: it explodes while t is below the order.
METHODS = ("bilinear", "backward_euler")

# Of the matrices of many steps: numbers that are held at a time.
_NUMBERS = 2**22


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

    Raises:
        ArgumentError: a size is below 1, there is no such measure or discretisation, or the window is not one (LegS has
            none).
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
        elif clock.device.type == "cpu" and not torch.compiler.is_compiling() and (clock == clock[0]).all():
            clock = clock[:1]
        projected = self.in_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = before.memory.dtype
            hidden, memory = _Walk.apply(
                projected.to(wide),
                before.memory,
                before.hidden,
                self.encoder.weight.to(wide).T,
                self.memory_proj.weight.to(wide).T,
                self.A,
                self.B,
                clock,
                ALPHAS[self.discretisation] if self.measure == "legs" else None,
            )
        steps = x.shape[1] if lengths is None else lengths.to(x.device)
        after = HiPPOState(
            after_own_length(memory, before.memory, lengths),
            after_own_length(hidden, before.hidden, lengths),
            before.lengths + steps,
        )
        y = hidden.to(x.dtype)
        return y if self.out_proj is None else self.out_proj(y), after

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, HiPPOState]:
        self.check_input(x.unsqueeze(1), state, None, HiPPOState)
        assert isinstance(state, HiPPOState)
        own = self.in_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = state.memory.dtype
            u, gates = own.to(wide).split([self.d_memory, 2 * self.d_hidden], dim=1)
            u = torch.addmm(u, state.hidden, self.encoder.weight.to(wide).T)
            memory = self.remember(state.memory, u, state.lengths)
            hidden = _gated(state.hidden, memory, gates, self.memory_proj.weight.to(wide).T)
        y = hidden.to(x.dtype)
        return y if self.out_proj is None else self.out_proj(y), HiPPOState(memory, hidden, state.lengths + 1)

    def remember(self, memory: Tensor, u: Tensor, clock: Tensor) -> Tensor:
        """One step of the memory: m_t of m_t-1 (batch, d_memory, order) and u_t (batch, d_memory).

        ``clock`` (batch,), or (1,) for all rows, is the number of steps before this one.
        """
        if self.measure != "legs":
            return DenseStep(self.A.T, self.B).ahead(memory, u)
        (step,) = legs_steps(self.order, clock, 1, ALPHAS[self.discretisation], memory.dtype)
        return step.ahead(memory, u)

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


def _gated(hidden: Tensor, memory: Tensor, gates: Tensor, W_m: Tensor) -> Tensor:
    """The next h (batch, d_hidden), of the last one, m (batch, d_memory, order) and x's part of g and the new h."""
    gate, new = torch.addmm(gates, memory.flatten(1), W_m).chunk(2, dim=1)
    return torch.lerp(hidden, torch.tanh(new), torch.sigmoid(gate))


def _steps(A: Tensor, B: Tensor, clock: Tensor, steps: int, alpha: float | None) -> Sequence[DenseStep | BlockStep]:
    """Those after ``clock`` (batch or 1,): of A and B themselves where alpha is None, else of LegS."""
    return [DenseStep(A.T, B)] * steps if alpha is None else legs_steps(len(B), clock, steps, alpha, B.dtype)


class _Walk(torch.autograd.Function):
    """The recurrence, with a gradient that takes those of the weights from all steps at once."""

    @staticmethod
    def forward(
        projected: Tensor,
        memory: Tensor,
        hidden: Tensor,
        W_u: Tensor,
        W_m: Tensor,
        A: Tensor,
        B: Tensor,
        clock: Tensor,
        alpha: float | None,
    ) -> tuple[Tensor, Tensor]:
        """h (batch, length, d_hidden) and m (batch, length, d_memory, order) after every step."""
        (hiddens, memories), _ = walk(
            _forward,
            (projected.transpose(0, 1),),
            (memory, hidden, clock),
            (W_u, W_m, A, B),
            alpha,
            steps=max(1, _NUMBERS // (len(clock) * numbers(len(B)))),
        )
        return hiddens.transpose(0, 1), memories.transpose(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.alpha = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhiddens: Tensor, dmemories: Tensor) -> tuple[Tensor | None, ...]:
        projected, memory, hidden, W_u, W_m, A, B, clock, hiddens, memories = ctx.saved_tensors
        before = torch.cat((hidden[:, None], hiddens[:, :-1]), dim=1)
        gate, new = (projected[..., memory.shape[1] :] + memories.flatten(2) @ W_m).chunk(2, dim=-1)
        gate, new = torch.sigmoid(gate), torch.tanh(new)
        kept = 1 - gate
        slopes = torch.cat(((new - before) * gate * kept, gate * (1 - new.square())), dim=-1)
        (found,), (dmemory, dhidden, _) = walk(
            _backward,
            tuple(part.transpose(0, 1) for part in (dhiddens, dmemories.flatten(2), slopes, kept)),
            (torch.zeros_like(memory), torch.zeros_like(hidden), clock + projected.shape[1]),
            (W_u.T, W_m.T, A, B),
            ctx.alpha,
            steps=max(1, _NUMBERS // (len(clock) * numbers(len(B)))),
            reverse=True,
        )
        dprojected = found.transpose(0, 1)
        du, dgates = dprojected.flatten(0, 1).tensor_split([memory.shape[1]], dim=1)
        weights = before.flatten(0, 1).T @ du, memories.flatten(2).flatten(0, 1).T @ dgates
        return dprojected, dmemory, dhidden, *weights, None, None, None, None


def _forward(sequences: Tensors, carried: Tensors, constants: Tensors, alpha: float | None) -> tuple[Tensors, Tensors]:
    """x's parts of u and the gates, (length, batch, ...), to h and m after every step."""
    (projected,), (memory, hidden, clock), (W_u, W_m, A, B) = sequences, carried, constants
    hiddens, memories = [], []
    for step, own in zip(_steps(A, B, clock, len(projected), alpha), projected.unbind(0), strict=True):
        u, gates = own.tensor_split([memory.shape[1]], dim=1)
        u = torch.addmm(u, hidden, W_u)
        memory = step.ahead(memory, u)
        hidden = _gated(hidden, memory, gates, W_m)
        memories.append(memory)
        hiddens.append(hidden)
    return (torch.stack(hiddens), torch.stack(memories)), (memory, hidden, clock + len(projected))


def _backward(sequences: Tensors, carried: Tensors, constants: Tensors, alpha: float | None) -> tuple[Tensors, Tensors]:
    """Gradients of h and m and the slopes and shares of the gates, (length, batch, ...), to those of x's parts."""
    (dmemory, dhidden, clock), (W_u, W_m, A, B) = carried, constants
    clock = clock - len(sequences[0])
    parts = list(zip(*(sequence.unbind(0) for sequence in sequences), strict=True))
    found = []
    steps = _steps(A, B, clock, len(parts), alpha)
    for step, (from_h, from_m, slope, keep) in zip(reversed(steps), reversed(parts), strict=True):
        dhidden = dhidden + from_h
        dgates = torch.cat((dhidden, dhidden), dim=1) * slope
        dmemory = dmemory + torch.addmm(from_m, dgates, W_m).view_as(dmemory)
        dmemory, du = step.back(dmemory)
        found.append(torch.cat((du, dgates), dim=1))
        dhidden = torch.addmm(dhidden * keep, du, W_u)
    return (torch.stack(found).flip(0),), (dmemory, dhidden, clock)
