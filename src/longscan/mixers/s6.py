r"""S6: the selective state space model by itself, without the block of Mamba around it.

Gu and Dao 2023 (arXiv 2312.00752), algorithm 2. Per channel, with N states; B, C and the step depend on the input:

.. math::
    (r, B_t, C_t) &= W_x u_t, \qquad \Delta_t = \mathrm{softplus}(W_\Delta r_t + b_\Delta) \\
    h_t &= e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \qquad y_t = C_t h_t + D u_t

It mixes no channels but through B, C and the step, and so wants a block around it (:mod:`longscan.nn.blocks`); in
Mamba's it is :class:`longscan.Mamba`, which is faster.

Any of B, C and the step may be the same for every input instead (the paper's table 7): B and C are then parameters of
each channel, as in S4D, and the step is softplus(b). With none that depends on the input, this is S4D with a real A.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.linear import StepProjection, product_and_bias
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.recurrences import selective_scan
from longscan.nn.state import State
from longscan.ops import selective_state_update
from longscan.statespace import log_uniform_steps

SELECTIVE = ("dt", "B", "C")


@dataclasses.dataclass(frozen=True)
class S6State(State):
    """The states (batch, d_model, N) float32."""

    ssm: Tensor


class S6(SequenceMixer):
    """The selective scan of an input with parameters made from it: ``y, _ = S6(d_model=256)(x)``.

    Args:
        d_model: width; each channel has states of its own.
        d_state: states per channel, N.
        dt_rank: rank of the projection to the steps; "auto" is ceil(d_model / 16).
        dt_min, dt_max: the bias of the steps starts at steps drawn log-uniformly between the two.
        selective: which of "dt", "B" and "C" depend on the input. Fixed ones start as S4D's do: B at 1, C drawn from
            N(0, 1).

    Attributes:
        A_log, D, the bias of the steps (of ``dt_proj``, or ``dt_bias`` where they are fixed) and fixed ``B`` and ``C``
        stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: d_model or d_state is below 1, or ``selective`` names something else.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        selective: Sequence[str] = SELECTIVE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, d_state) < 1:
            raise ArgumentError(f"d_model and d_state must be at least 1; got {d_model} and {d_state}")
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ArgumentError(f'dt_rank must be "auto" or an integer of at least 1, got {dt_rank!r}')
        if unknown := [part for part in selective if part not in SELECTIVE]:
            raise ArgumentError(f"selective takes parts of {', '.join(SELECTIVE)}; got {unknown[0]!r}")
        self.d_model, self.d_state, self.dt_rank = d_model, d_state, dt_rank
        self.selective = tuple(part for part in SELECTIVE if part in selective)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def system(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values)))

        self._rows = [dt_rank if part == "dt" else d_state for part in self.selective]
        self.x_proj = nn.Linear(d_model, sum(self._rows), bias=False, **factory) if self.selective else None
        self.dt_proj = StepProjection(dt_rank, d_model, **factory) if "dt" in self.selective else None
        if self.dt_proj is not None:
            nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        steps = log_uniform_steps(d_model, dt_min, dt_max, device).exp()
        # The inverse of softplus.
        dt_bias = system(steps + torch.log(-torch.expm1(-steps)))
        if self.dt_proj is None:
            self.dt_bias = dt_bias
        else:
            self.dt_proj.bias = dt_bias
            self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        states = (d_model, d_state)
        self.B = None if "B" in self.selective else system(torch.ones(states, device=device))
        self.C = None if "C" in self.selective else system(torch.randn(states, device=device))
        n = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = system(n.log().repeat(d_model, 1))
        self.D = system(torch.ones(d_model, device=device))

    @property
    def A(self) -> Tensor:
        """(d_model, N) float32, negative."""
        return -torch.exp(self.A_log)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S6State | None]:
        self.check_input(x, state, cu_seqlens, S6State)
        before = state.ssm if isinstance(state, S6State) else None
        dt, B, C, dt_bias = self._select(x)
        y, after = selective_scan(
            x.to(dt.dtype),
            dt,
            self.A,
            B,
            C,
            self.D,
            None,
            dt_bias,
            before,
            dt_softplus=True,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return y, None if before is None else S6State(after)

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, S6State]:
        self.check_input(x.unsqueeze(1), state, None, S6State)
        assert isinstance(state, S6State)
        dt, B, C, dt_bias = self._select(x)
        if self.B is not None:
            B = B.expand(x.shape[0], -1, -1)
        if self.C is not None:
            C = C.expand(x.shape[0], -1, -1)
        y, ssm = selective_state_update(
            state.ssm, x.to(dt.dtype), dt, self.A, B, C, self.D, None, dt_bias, dt_softplus=True, inplace=inplace
        )
        return y, S6State(ssm)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The steps before bias and softplus (..., d_model), B and C, and that bias; what is selected is (..., N), what
        is fixed (d_model, N)."""
        selected = () if self.x_proj is None else self.x_proj(u).split(self._rows, dim=-1)
        parts = dict(zip(self.selective, selected, strict=True))
        B = parts["B"] if self.B is None else self.B.to(u.dtype)
        C = parts["C"] if self.C is None else self.C.to(u.dtype)
        if self.dt_proj is None:
            return torch.zeros_like(u), B, C, self.dt_bias
        dt, dt_bias = product_and_bias(self.dt_proj, parts["dt"])
        return dt, B, C, dt_bias

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S6State:
        check_batch(batch)
        device = self.A_log.device if device is None else device
        return S6State(torch.zeros(batch, self.d_model, self.d_state, device=device, dtype=self.A_log.dtype))

    def extra_repr(self) -> str:
        parts = ", ".join(self.selective) or "nothing"
        return f"{self.d_model}, d_state={self.d_state}, dt_rank={self.dt_rank}, selective: {parts}"
