r"""Mamba: a selective state space model (S6) between two projections, with a short convolution and a gate.

Gu and Dao 2023 (arXiv 2312.00752), algorithm 2 and figure 3, as in the released models. Per channel, with N states:

.. math::
    u, z &= W_{in} x, \qquad u \leftarrow \mathrm{silu}(\mathrm{conv}(u)), \qquad (r, B_t, C_t) = W_x u_t \\
    \Delta_t &= \mathrm{softplus}(W_\Delta r_t + b_\Delta) \\
    h_t &= e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \qquad y_t = C_t h_t + D u_t \\
    o_t &= W_{out} (y_t \cdot \mathrm{silu}(z_t))
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.linear import StepProjection, is_plain, product_and_bias
from longscan.nn.mamba_inner import mamba_inner
from longscan.nn.mixer import SequenceMixer, check_batch, check_sizes, keep_float32, no_weight_decay
from longscan.nn.recurrences import causal_conv1d, selective_scan
from longscan.nn.sequence_parallel import current_part
from longscan.nn.state import State
from longscan.ops import causal_conv1d_update, selective_state_update
from longscan.statespace import log_uniform_steps

A_INITS = ("s4d-real", "constant", "random", "s4d-lin")


@dataclasses.dataclass(frozen=True)
class MambaState(State):
    """The last inputs of the convolution (batch, d_conv - 1, d_inner), and the states (batch, d_inner, N)."""

    conv: Tensor
    ssm: Tensor


class Mamba(SequenceMixer):
    """A Mamba block, a drop-in layer: ``y, _ = Mamba(d_model=256)(x)``.

    dt, B and C all depend on the input; with fewer of them it is ``S6(..., selective=...)`` in the block "mamba".

    Args:
        d_model: width of input and output.
        d_state: real numbers of state per channel. A complex A has ``d_state / 2`` states, each for a conjugate pair,
            so that real and complex models of one ``d_state`` have the same size.
        d_conv: width of the convolution.
        expand: inner width over d_model.
        dt_rank: rank of the projection to dt; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: the bias of dt starts at steps drawn log-uniformly between the two, at least the
            floor.
        dt_init: "random" (uniform, +- dt_rank^-1/2 dt_scale) or "constant".
        dt_scale: see ``dt_init``.
        conv_bias, bias: whether the convolution and the two outer projections have biases.
        a_init: where A starts (the paper's table 8): "s4d-real" -(n + 1), "constant" -1/2, "random" -exp(N(0, 1)), or
            the complex "s4d-lin" -1/2 + n i. With a complex A the projections of B and C give the real and the
            imaginary part of each state side by side (n = 0 real, n = 0 imaginary, n = 1 real, ...).
        recompute: keep less for the backward pass: the convolution's output and dt are computed again there (section
            3.3.2 of the paper). Without effect on a complex A, inner norms, adapters and under torch.compile.
        selection_norm_eps: with a number, r, B and C each pass an RMS norm without weights, of this epsilon, as in
            Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355).

    Attributes:
        A_log, D and the bias of ``dt_proj`` stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: a size is below 1, ``a_init`` or ``dt_init`` is unknown, d_state is odd with a complex A, or an
            epsilon is none.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        a_init: str = "s4d-real",
        recompute: bool = False,
        selection_norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if a_init not in A_INITS:
            raise ArgumentError(f"a_init must be one of {', '.join(A_INITS)}; got {a_init!r}")
        if dt_init not in ("random", "constant"):
            raise ArgumentError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv)
        if not isinstance(expand, (int, float)) or not 1 <= d_model * expand < math.inf:
            raise ArgumentError(f"expand must be a number, and expand * d_model at least 1; got {expand!r}")
        if selection_norm_eps is not None and not selection_norm_eps > 0:
            raise ArgumentError(f"selection_norm_eps must be a positive number or None, got {selection_norm_eps!r}")
        self.selection_norm_eps = selection_norm_eps
        self.recompute = recompute
        self.is_complex = a_init == "s4d-lin"
        if self.is_complex and d_state % 2:
            raise ArgumentError(f"d_state must be even for a complex A (a_init {a_init!r}), got {d_state}")
        if dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ArgumentError(f'dt_rank must be "auto" or an integer of at least 1, got {dt_rank!r}')
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, dt_rank
        self.d_inner = int(expand * d_model)
        self.num_states = d_state // 2 if self.is_complex else d_state

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        # Holds weight and bias under the names of the released models; the operator does the work.
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = StepProjection(dt_rank, self.d_inner, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

        spread = dt_rank**-0.5 * dt_scale
        if dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            nn.init.constant_(self.dt_proj.weight, spread)
        steps = log_uniform_steps(self.d_inner, dt_min, dt_max, device).exp().clamp(min=dt_init_floor)
        # The inverse of softplus.
        self.dt_proj.bias = keep_float32(nn.Parameter(steps + torch.log(-torch.expm1(-steps))))
        # A model's own initialisation sets other biases to zero, but not this one.
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        self.A_log, self.A_imag = self._initial_A(a_init, device)
        self.D = no_weight_decay(keep_float32(nn.Parameter(torch.ones(self.d_inner, device=device))))

    def _initial_A(self, a_init: str, device: torch.device | str | None) -> tuple[nn.Parameter, nn.Parameter | None]:
        shape = (self.d_inner, self.num_states)
        n = torch.arange(self.num_states, dtype=torch.float32, device=device)
        if a_init == "s4d-real":
            logarithm = torch.log(n + 1).expand(shape).clone()
        elif a_init == "random":
            logarithm = torch.randn(shape, device=device)
        else:
            logarithm = torch.full(shape, math.log(0.5), device=device)
        imaginary = n.expand(shape).clone() if self.is_complex else None

        def parameter(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values)))

        return parameter(logarithm), None if imaginary is None else parameter(imaginary)

    @property
    def A(self) -> Tensor:
        """(d_inner, N) float32, negative, or complex64 with a negative real part."""
        real = -torch.exp(self.A_log)
        return real if self.A_imag is None else torch.complex(real, self.A_imag)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        self.check_input(x, state, cu_seqlens, MambaState)
        before = state if isinstance(state, MambaState) else None
        y, conv, ssm = self._whole(x, before, cu_seqlens) if self._is_plain() else self._parts(x, before, cu_seqlens)
        after = MambaState(conv.to(before.conv.dtype), ssm) if before is not None else None
        return self.out_proj(y), after

    def _is_plain(self) -> bool:
        """Whether the block is the one of the paper, its projections nothing but their weights.

        A compiler sees more of the parts, and puts together what it can.
        """
        projections = (self.in_proj, self.x_proj, self.dt_proj)
        return (
            not self.is_complex
            and self.selection_norm_eps is None
            and all(is_plain(layer, nn.Linear, StepProjection) for layer in projections)
            and self.dt_proj.bias is not None
            and self.x_proj.bias is None
            and not torch.compiler.is_compiling()
            # `vmap` takes operators, and no function with a backward pass of its own.
            and not torch._C._are_functorch_transforms_active()
            and current_part() is None
        )

    def _whole(self, x: Tensor, before: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return mamba_inner(
            x,
            (self.in_proj.weight, self.in_proj.bias),
            self._filter(),
            self.x_proj.weight,
            (self.dt_proj.weight, self.dt_proj.bias),
            self.A,
            self.D,
            None if before is None else before.conv,
            None if before is None else before.ssm,
            cu_seqlens=cu_seqlens,
            recompute=self.recompute,
        )

    def _parts(self, x: Tensor, before: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = causal_conv1d(
            u,
            *self._filter(),
            None if before is None else before.conv.to(u.dtype),
            activation="silu",
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        dt, B, C, dt_bias = self._select(u)
        y, ssm = selective_scan(
            u,
            dt,
            self.A,
            B,
            C,
            self.D,
            z,
            dt_bias,
            None if before is None else before.ssm,
            dt_softplus=True,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return y, conv, ssm

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, MambaState]:
        self.check_input(x.unsqueeze(1), state, None, MambaState)
        assert isinstance(state, MambaState)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = causal_conv1d_update(
            state.conv, u, *self._filter(), activation="silu", inplace=inplace and state.conv.dtype == u.dtype
        )
        dt, B, C, dt_bias = self._select(u)
        y, ssm = selective_state_update(
            state.ssm, u, dt, self.A, B, C, self.D, z, dt_bias, dt_softplus=True, inplace=inplace
        )
        return self.out_proj(y), MambaState(conv.to(state.conv.dtype), ssm)

    def _filter(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's (d_inner, d_conv) weight and its bias."""
        if not isinstance(self.conv1d, nn.Conv1d):
            raise ArgumentError(
                f"conv1d is a {type(self.conv1d).__name__}, expected nn.Conv1d: only its weights are read, what is put "
                "around it would be left out; adapters can go around in_proj, x_proj, dt_proj and out_proj"
            )
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The selection: dt before its bias and softplus (..., d_inner), B and C (..., N), and that bias."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.selection_norm_eps is not None:
            dt, B, C = (_rms_norm(part, self.selection_norm_eps) for part in (dt, B, C))
        dt, dt_bias = product_and_bias(self.dt_proj, dt)
        if self.is_complex:
            B, C = self._as_complex(B), self._as_complex(C)
        return dt, B, C, dt_bias

    @torch.no_grad()
    def step_sizes(self, x: Tensor) -> Tensor:
        """How far each channel lets each token move its state: dt, from x (batch, length, d_model) to (..., d_inner).

        Small: the token is passed over; large: the state forgets the past for it (Gu and Dao 2023, section 3.5.2).
        """
        u, _ = self.in_proj(x).chunk(2, dim=-1)
        u, _ = causal_conv1d(u, *self._filter(), activation="silu", return_final_state=True)
        dt, _, _, bias = self._select(u)
        return F.softplus(dt.float() if bias is None else dt.float() + bias.float())

    def _as_complex(self, pairs: Tensor) -> Tensor:
        wide = torch.promote_types(pairs.dtype, torch.float32)
        return torch.complex(*pairs.to(wide).unflatten(-1, (self.num_states, 2)).unbind(-1))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        check_batch(batch)
        device = self.A_log.device if device is None else device
        wide = torch.promote_types(self.A_log.dtype, torch.complex64) if self.is_complex else self.A_log.dtype
        return MambaState(
            conv=torch.zeros(
                batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype or self.conv1d.weight.dtype
            ),
            ssm=torch.zeros(batch, self.d_inner, self.num_states, device=device, dtype=wide),
        )

    def extra_repr(self) -> str:
        kind = "complex" if self.is_complex else "real"
        return f"{self.d_model}, d_state={self.d_state} ({kind}), d_conv={self.d_conv}, d_inner={self.d_inner}"


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """Without weights; squares are summed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, wide.shape[-1:], eps=eps).to(x.dtype)
