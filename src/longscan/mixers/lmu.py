r"""LMU: a delay network of order N, which holds a window of the past as Legendre polynomials, and a hidden layer on it.

Voelker, Kajic and Eliasmith 2019 (Legendre Memory Units, NeurIPS), equations 1 to 7. A and B of
``transition("lmu", N)`` over a window of theta steps, discretised, drive the memory m; h is a nonlinear state:

.. math::
    u_t &= E_x x_t + E_h h_{t-1} + E_m m_{t-1} \\
    m_t &= \bar A m_{t-1} + \bar B u_t \\
    h_t &= \tanh(W_x x_t + W_h h_{t-1} + W_m m_t)

That is one matrix for (h, m) and, of every step, what x gives, computed beforehand. The walk is then a product and a
tanh a step, and its gradient another product.

The parallel form (Chilkuri and Eliasmith 2021, Parallelizing Legendre Memory Unit Training, ICML, equations 18 to 20)
drops E_h, E_m and W_h. The memory is then linear and time-invariant, and all its steps are computed together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32
from longscan.nn.packing import after_own_length, over_rows
from longscan.nn.recurrences import time_invariant
from longscan.nn.relay import relay
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.nn.walk import Tensors, walk
from longscan.statespace import discretise_dense, transition

METHODS = ("zoh", "bilinear", "backward_euler")

# Steps of a memory that are one matrix product.
_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class LMUState(State):
    """m (batch, d_memory, order) and h (batch, d_hidden), float32; the parallel form has no h."""

    memory: Tensor
    hidden: Tensor | None


class LMU(SequenceMixer):
    """One layer of Legendre memory units: ``y, _ = LMU(d_model=256, theta=512)(x)``.

    Args:
        d_model: width of input and output.
        d_memory: signals that are remembered, each in a memory of its own; the 2019 paper has one.
        order: N, coefficients per signal.
        theta: length of the window in steps.
        d_hidden: width of h; default: d_model, and then y is h itself. Of another width, h is projected.
        parallel: the form without feedback into u and h, which is not walked step by step.
        bias: of u (parallel form) and h; the 2019 paper has none.
        discretisation: "zoh", "bilinear" or "backward_euler".

    Attributes:
        drift, B_bar: A_bar - 1 (order, order) and B_bar (order,), float32 buffers: not trained, as in both papers. Of a
            long window A_bar is nearly 1, and rounded to float32 would have lost what makes it forget.

    Raises:
        ArgumentError: a size is below 1, theta is not positive, or there is no such discretisation.
    """

    undivided = None
    drift: Tensor
    B_bar: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        d_memory: int = 1,
        order: int = 64,
        theta: float = 256.0,
        d_hidden: int | None = None,
        parallel: bool = False,
        bias: bool = False,
        discretisation: str = "zoh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = d_model if d_hidden is None else d_hidden
        if min(d_model, d_memory, order, d_hidden) < 1:
            raise ArgumentError(
                "d_model, d_memory, order and d_hidden must be at least 1; got "
                f"{d_model}, {d_memory}, {order} and {d_hidden}"
            )
        if not theta > 0:
            raise ArgumentError(f"theta must be a positive number of steps, got {theta!r}")
        if discretisation not in METHODS:
            raise ArgumentError(f"discretisation must be one of {', '.join(METHODS)}; got {discretisation!r}")
        self.d_model, self.d_memory, self.order, self.d_hidden = d_model, d_memory, order, d_hidden
        self.theta, self.parallel = theta, parallel
        self.in_proj = nn.Linear(d_model, d_memory + d_hidden, bias=bias, device=device, dtype=dtype)
        self.memory_proj = nn.Linear(d_memory * order, d_hidden, bias=False, device=device, dtype=dtype)
        encoder, kernel = self.in_proj.weight.detach().split([d_memory, d_hidden])
        nn.init.uniform_(encoder, -math.sqrt(3 / d_model), math.sqrt(3 / d_model))
        nn.init.xavier_normal_(kernel)
        nn.init.xavier_normal_(self.memory_proj.weight)
        if not parallel:
            # u and h of (h, m): rows of E_h, E_m, and of W_h.
            self.encoder = nn.Linear(d_hidden + d_memory * order, d_memory, bias=False, device=device, dtype=dtype)
            self.hidden_proj = nn.Linear(d_hidden, d_hidden, bias=False, device=device, dtype=dtype)
            nn.init.zeros_(self.encoder.weight)
            nn.init.xavier_normal_(self.hidden_proj.weight)
        self.out_proj: nn.Linear | None = None
        if d_hidden != d_model:
            self.out_proj = nn.Linear(d_hidden, d_model, bias=bias, device=device, dtype=dtype)
        A, B = transition("lmu", order)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        A_bar, B_bar = discretise_dense(A, B, 1 / theta, discretisation)
        for name, matrix in (("drift", A_bar - torch.eye(order, dtype=A_bar.dtype)), ("B_bar", B_bar)):
            self.register_buffer(name, keep_float32(matrix.to(device=device, dtype=wide)))

    @property
    def A_bar(self) -> Tensor:
        """(order, order)."""
        return self.drift + torch.eye(self.order, dtype=self.drift.dtype, device=self.drift.device)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LMUState | None]:
        self.check_input(x, state, cu_seqlens, LMUState)
        before = state if isinstance(state, LMUState) else None
        part = current_part()
        if part is not None:
            if not self.parallel:
                return relay(self, x, cu_seqlens), None
            entering, cu_seqlens = time_invariant(part, x, cu_seqlens, self._leave, self._advance)
            before = LMUState(entering, None)
        if cu_seqlens is not None:
            y, after = over_rows(self._run, x, before, cu_seqlens)
        else:
            y, after = self._run(x, before, None)
        return y, None if state is None else after

    def _leave(self, x: Tensor) -> Tensor:
        return self.remember(self.in_proj(x)[..., : self.d_memory])[:, -1]

    def _advance(self, memory: Tensor, steps: int) -> Tensor:
        return memory @ torch.linalg.matrix_power(self.A_bar, steps).T

    def _run(self, x: Tensor, before: LMUState | None, lengths: Tensor | None) -> tuple[Tensor, LMUState]:
        if before is None:
            before = self.initial_state(x.shape[0], x.device)
        u, own = self.in_proj(x).split([self.d_memory, self.d_hidden], dim=-1)
        if self.parallel:
            memory = self.remember(u, before.memory)
            y = torch.tanh(own + self.memory_proj(memory.flatten(-2).to(own.dtype)))
            after = LMUState(after_own_length(memory, before.memory, lengths), None)
        else:
            y, after = self._walk(u, own, before, lengths)
        y = y.to(x.dtype)
        return y if self.out_proj is None else self.out_proj(y), after

    def _walk(self, u: Tensor, own: Tensor, before: LMUState, lengths: Tensor | None) -> tuple[Tensor, LMUState]:
        """The recurrence, in float32: u (batch, length, d_memory) and own (batch, length, d_hidden) are x's parts."""
        assert before.hidden is not None
        with torch.autocast(u.device.type, enabled=False):
            wide = before.memory.dtype
            encoder, W_h, W_m = (
                layer.weight.to(wide).T for layer in (self.encoder, self.hidden_proj, self.memory_proj)
            )
            # m of (h, m): what E_h and E_m write, and A_bar.
            fade = torch.kron(torch.eye(self.d_memory, dtype=wide, device=u.device), self.A_bar).T
            to_memory = (encoder[..., None] * self.B_bar).flatten(1) + F.pad(fade, (0, 0, self.d_hidden, 0))
            to_hidden = to_memory @ W_m + F.pad(W_h, (0, 0, 0, fade.shape[0]))
            written = (u.to(wide)[..., None] * self.B_bar).flatten(2)
            states = _Walk.apply(
                torch.cat((own.to(wide) + written @ W_m, written), dim=2),
                torch.cat((before.hidden, before.memory.flatten(1)), dim=1),
                torch.cat((to_hidden, to_memory), dim=1),
                self.d_hidden,
            )
            hidden, memory = states.split([self.d_hidden, fade.shape[0]], dim=2)
            memory = memory.unflatten(2, (self.d_memory, self.order))
        after = LMUState(
            after_own_length(memory, before.memory, lengths), after_own_length(hidden, before.hidden, lengths)
        )
        return hidden, after

    def remember(self, u: Tensor, memory: Tensor | None = None) -> Tensor:
        """The delay network alone: the memory after every step.

        Within a stretch of steps the memory is one matrix product with the impulse response; stretches are joined by
        powers of A_bar.

        Args:
            u: (batch, length, d_memory), the signals.
            memory: (batch, d_memory, order); None: zeros.

        Returns:
            (batch, length, d_memory, order), float32 (float64 of a float64 mixer). The signal s steps ago is about
            ``reconstruct(m, "lmu", s / theta)``, of :mod:`longscan.statespace.reconstruction`.
        """
        with torch.autocast(u.device.type, enabled=False):
            length, size = u.shape[1], min(_CHUNK, u.shape[1])
            signal = F.pad(u.to(self.B_bar.dtype), (0, 0, 0, -length % size)).unflatten(1, (-1, size)).transpose(2, 3)
            # (size + 1, order, order), and the response j steps after an impulse, (size, order)
            drifts = _drifts(self.drift, size)
            powers = drifts + torch.eye(self.order, dtype=drifts.dtype, device=u.device)
            response = powers[:-1] @ self.B_bar
            lag = torch.arange(size, device=u.device)
            lag = lag - lag[:, None]
            toeplitz = torch.where((lag >= 0)[..., None], response[lag.clamp(min=0)], 0)  # (from, to, order)
            local = (signal @ toeplitz.flatten(1)).unflatten(
                -1, (size, self.order)
            )  # (batch, stretches, d_memory, ...)
            state = local.new_zeros(local.shape[0], self.d_memory, self.order) if memory is None else memory
            starts = []
            for end in local[..., -1, :].unbind(1):
                starts.append(state)
                state = state + torch.addmm(end.flatten(0, 1), state.flatten(0, 1), drifts[-1].T).view_as(state)
            fade = powers[1:].permute(2, 0, 1).flatten(1)  # (order, size * order)
            carried = (torch.stack(starts, dim=1) @ fade).view_as(local)
            return (local + carried).transpose(2, 3).flatten(1, 2)[:, :length]

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LMUState:
        check_batch(batch)
        device = self.B_bar.device if device is None else device
        wide = self.B_bar.dtype
        memory = torch.zeros(batch, self.d_memory, self.order, device=device, dtype=wide)
        return LMUState(memory, None if self.parallel else torch.zeros(batch, self.d_hidden, device=device, dtype=wide))

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, d_memory={self.d_memory}, order={self.order}, theta={self.theta}"
        return f"{sizes}, parallel={self.parallel}"


def _drifts(drift: Tensor, highest: int) -> Tensor:
    """A^0 - 1 .. A^highest - 1, (highest + 1, N, N), of A - 1, by doubling: ``A B - 1 = a + b + a b`` of a = A - 1."""
    drifts = torch.stack((torch.zeros_like(drift), drift))
    while len(drifts) <= highest:
        last = drifts[-1]
        drifts = torch.cat((drifts, drifts[1:] + last + drifts[1:] @ last))
    return drifts[: highest + 1]


class _Walk(torch.autograd.Function):
    """``s_t = f(s_{t-1} W + i_t)``, where f is tanh on the first ``squashed`` numbers and nothing on the others.

    PyTorch's own gradient would add to that of W at every step.
    """

    @staticmethod
    def forward(inputs: Tensor, start: Tensor, W: Tensor, squashed: int) -> Tensor:
        """inputs (batch, length, n), start (batch, n) and W (n, n) to all states, (batch, length, n)."""
        (states,), _ = walk(_forward, (inputs.transpose(0, 1),), (start,), (W,), squashed)
        return states.transpose(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, start, W, ctx.squashed = inputs
        ctx.save_for_backward(start, W, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstates: Tensor) -> tuple[Tensor | None, ...]:
        start, W, states = ctx.saved_tensors
        slopes = F.pad(1 - states[..., : ctx.squashed].square(), (0, states.shape[2] - ctx.squashed), value=1.0)
        sequences = (dstates.transpose(0, 1), slopes.transpose(0, 1))
        (found,), (dinput,) = walk(_backward, sequences, (torch.zeros_like(start),), (W.T,), reverse=True)
        dinputs = found.transpose(0, 1)
        before = torch.cat((start[:, None], states[:, :-1]), dim=1)
        return dinputs, dinput @ W.T, before.flatten(0, 1).T @ dinputs.flatten(0, 1), None


# Both in place, so that a step is little more than its two kernels.
def _forward(sequences: Tensors, carried: Tensors, constants: Tensors, squashed: int) -> tuple[Tensors, Tensors]:
    """Inputs (length, batch, n) to states."""
    (inputs,), (state,), (W,) = sequences, carried, constants
    states = inputs.clone(memory_format=torch.contiguous_format)
    for t in range(len(states)):
        state = states[t].addmm_(state, W)
        state[:, :squashed].tanh_()
    return (states,), (state,)


def _backward(sequences: Tensors, carried: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
    """Gradients of states, and the slopes of what made them, both (length, batch, n), to gradients of inputs."""
    (dstates, slopes), (dinput,), (W_T,) = sequences, carried, constants
    found = dstates.clone(memory_format=torch.contiguous_format)
    for t in reversed(range(len(found))):
        dinput = found[t].addmm_(dinput, W_T).mul_(slopes[t])
    return (found,), (dinput,)
