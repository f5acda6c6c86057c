r"""Mamba-2: a selective state space model whose A is one number a head, so that it is attention with a decay (SSD).

Dao and Gu 2024 (arXiv 2405.21060), sections 5-7, figure 6 (right), as in the released models. Per head, with head_dim
channels u, and B and C of N numbers each, shared by the heads of a group:

.. math::
    z, (u, B, C), r &= W_{in} x, \qquad (u, B, C) \leftarrow \mathrm{silu}(\mathrm{conv}(u, B, C)) \\
    \Delta_t &= \mathrm{softplus}(r_t + b_\Delta), \qquad A = -e^{A_{log}} \\
    h_t &= e^{\Delta_t A} h_{t-1} + B_t\, (\Delta_t u_t)^\top, \qquad y_t = h_t^\top C_t + D u_t \\
    o_t &= W_{out}\, \mathrm{RMSNorm}(y_t \odot \mathrm{silu}(z_t))

which is `decay_attention` with q = C, k = B, v = Delta u and the log-decay Delta A: over chunks of time it is products
of matrices (section 6), one step at a time a recurrence.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, keep_float32, no_weight_decay
from longscan.nn.recurrences import causal_conv1d, decay_attention
from longscan.nn.state import State
from longscan.ops import causal_conv1d_update, decay_attention_update
from longscan.statespace import log_uniform_steps


@dataclasses.dataclass(frozen=True)
class Mamba2State(State):
    """Last inputs of the convolution (batch, d_conv - 1, d_inner + 2 groups N); states (batch, heads, N, head_dim)."""

    conv: Tensor
    ssm: Tensor


class GatedRMSNorm(nn.Module):
    """RMS norm of x silu(z) over each of ``groups`` parts of the channels, with a weight a channel; float32 inside."""

    def __init__(self, channels: int, groups: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = no_weight_decay(nn.Parameter(torch.ones(channels, **factory)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (..., channels) to the same shape, in z's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        gated = (x.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.to(wide)).to(z.dtype)


class Mamba2(SequenceMixer):
    """A Mamba-2 block, a drop-in layer: ``y, _ = Mamba2(d_model=256)(x)``.

    Parameters have the names and shapes of mamba_ssm's ``Mamba2``, and of Transformers' ``Mamba2Mixer``.

    Args:
        d_model: width of input and output.
        d_state: N, the size of B and C; each channel has as many numbers of state.
        d_conv: width of the convolution.
        expand: inner width over d_model.
        head_dim: channels of a head; default: 64, or the inner width where that is less.
        n_groups: how many B and C there are, each for as many neighbouring heads; also groups of the norm.
        a_range: -A starts uniformly between the two.
        dt_min, dt_max, dt_init_floor: the bias of dt starts at steps drawn log-uniformly between the two, at least the
            floor.
        dt_limit: dt is clamped between the two.
        conv_bias, bias: whether the convolution and the two outer projections have biases.
        norm_eps: of the gated RMS norm.

    Attributes:
        A_log, D and dt_bias, (heads,), stay float32 when the module is converted to bfloat16 or float16.

    Raises:
        ArgumentError: a size is below 1, head_dim does not divide the inner width, n_groups not the heads, or a range
            is none.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int | None = None,
        n_groups: int = 1,
        a_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        head_dim = min(64, d_inner) if head_dim is None else head_dim
        if min(d_model, d_state, d_conv, d_inner, head_dim, n_groups) < 1:
            raise ArgumentError(
                "d_model, d_state, d_conv, expand * d_model, head_dim and n_groups must be at least 1; got d_model "
                f"{d_model}, d_state {d_state}, d_conv {d_conv}, expand {expand}, head_dim {head_dim}, n_groups "
                f"{n_groups}"
            )
        if d_inner % head_dim or d_inner // head_dim % n_groups:
            raise ArgumentError(
                f"head_dim must divide expand * d_model = {d_inner}, and n_groups the heads; got head_dim {head_dim}, "
                f"n_groups {n_groups}"
            )
        if not 0 < a_range[0] <= a_range[1]:
            raise ArgumentError(f"a_range must be two positive numbers, the smaller first; got {a_range!r}")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ArgumentError(f"dt_limit must be two numbers of at least 0, the smaller first; got {dt_limit!r}")
        if not norm_eps > 0:
            raise ArgumentError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.head_dim, self.n_heads, self.n_groups = head_dim, d_inner // head_dim, n_groups
        self.dt_limit = tuple(dt_limit)
        self.d_mixed = d_inner + 2 * n_groups * d_state

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, d_inner + self.d_mixed + self.n_heads, bias=bias, **factory)
        # Holds weight and bias under the names of the released models; the operator does the work.
        self.conv1d = nn.Conv1d(self.d_mixed, self.d_mixed, d_conv, groups=self.d_mixed, bias=conv_bias, **factory)
        self.norm = GatedRMSNorm(d_inner, n_groups, norm_eps, **factory)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)

        def parameter(values: Tensor) -> nn.Parameter:
            return no_weight_decay(keep_float32(nn.Parameter(values)))

        steps = log_uniform_steps(self.n_heads, dt_min, dt_max, device).exp().clamp(min=dt_init_floor)
        # The inverse of softplus.
        self.dt_bias = parameter(steps + torch.log(-torch.expm1(-steps)))
        self.A_log = parameter(torch.empty(self.n_heads, device=device).uniform_(*a_range).log())
        self.D = parameter(torch.ones(self.n_heads, device=device))

    @property
    def A(self) -> Tensor:
        """(heads,) float32, negative."""
        return -torch.exp(self.A_log)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State | None]:
        self.check_input(x, state, cu_seqlens, Mamba2State)
        before = state if isinstance(state, Mamba2State) else None
        z, mixed, dt = self._project(x)
        mixed, conv = causal_conv1d(
            mixed,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None if before is None else before.conv.to(mixed.dtype),
            activation="silu",
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        u, q, k, v, log_decay = self._select(mixed, dt)
        y, ssm = decay_attention(
            q,
            k,
            v,
            log_decay,
            None if before is None else before.ssm,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        after = Mamba2State(conv.to(before.conv.dtype), ssm) if before is not None else None
        return self._merge(y, u, z), after

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, Mamba2State]:
        self.check_input(x.unsqueeze(1), state, None, Mamba2State)
        assert isinstance(state, Mamba2State)
        z, mixed, dt = self._project(x)
        mixed, conv = causal_conv1d_update(
            state.conv,
            mixed,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            inplace=inplace and state.conv.dtype == mixed.dtype,
        )
        u, *qkv_and_decay = self._select(mixed, dt)
        y, ssm = decay_attention_update(state.ssm, *qkv_and_decay, inplace=inplace)
        return self._merge(y, u, z), Mamba2State(conv.to(state.conv.dtype), ssm)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., d_model) to z (..., d_inner), u, B and C side by side, and dt before bias and softplus."""
        z, mixed, dt = self.in_proj(x).split([self.d_inner, self.d_mixed, self.n_heads], dim=-1)
        return z, mixed, dt

    def _select(self, mixed: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """u (..., heads, head_dim), and q, k, v and the log-decay (..., heads) of the decay attention."""
        shared = self.n_groups * self.d_state
        u, B, C = mixed.split([self.d_inner, shared, shared], dim=-1)
        u = u.unflatten(-1, (self.n_heads, self.head_dim))
        B, C = (part.unflatten(-1, (self.n_groups, self.d_state)) for part in (B, C))
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias).clamp(*self.dt_limit)
        return u, C, B, (u * dt[..., None]).to(u.dtype), dt * self.A

    def _merge(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        y = (y + self.D[:, None] * u).flatten(-2)
        return self.out_proj(self.norm(y, z))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mamba2State:
        check_batch(batch)
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        return Mamba2State(
            conv=torch.zeros(batch, self.d_conv - 1, self.d_mixed, device=device, dtype=dtype or weight.dtype),
            ssm=torch.zeros(batch, self.n_heads, self.d_state, self.head_dim, device=device, dtype=self.A_log.dtype),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, n_heads={self.n_heads}, "
            f"head_dim={self.head_dim}, n_groups={self.n_groups}"
        )
