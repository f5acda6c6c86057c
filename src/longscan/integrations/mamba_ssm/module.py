r"""`mamba_ssm.modules.mamba_simple.Mamba`: their module over our operators.

The equations stand in :mod:`longscan.mixers.mamba`; what is different here is the interface: states live in a cache
that is updated in place, and the convolution's state is (batch, channels, d_conv).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan import ops
from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.conv import causal_conv1d_update
from longscan.integrations.mamba_ssm.layouts import channels_last
from longscan.integrations.mamba_ssm.step import selective_state_update


class Mamba(nn.Module):
    """A Mamba block with mamba-ssm's constructor, parameters, cache and step.

    Args:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: width of the convolution, any.
        expand: inner width over d_model.
        dt_rank: rank of the projection to dt; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: bounds of the steps that the bias of dt starts at.
        dt_init: "random" or "constant".
        dt_scale: scale of the projection's initial weights.
        conv_bias, bias: whether the convolution and the two outer projections have biases.
        use_fast_path: kept as an attribute; there is one path.
        layer_idx: the layer's key in a cache.

    Raises:
        ArgumentError: a word for `dt_rank` or `dt_init` that is not known.
    """

    def __init__(
        self,
        d_model: int,
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
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ArgumentError(f'dt_rank: got {dt_rank!r}, allowed are "auto" and an integer')
        if dt_init not in ("random", "constant"):
            raise ArgumentError(f'dt_init: got {dt_init!r}, allowed are "random" and "constant"')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = dt_rank if isinstance(dt_rank, int) else math.ceil(d_model / 16)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

        # Drawn in the order of the original, so that one seed gives one model in both.
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        else:
            nn.init.constant_(self.dt_proj.weight, spread)
        lowest, highest = math.log(dt_min), math.log(dt_max)
        steps = torch.exp(torch.rand(self.d_inner, **factory) * (highest - lowest) + lowest).clamp(min=dt_init_floor)
        with torch.no_grad():
            # The inverse of softplus.
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        n = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(torch.log(n).expand(self.d_inner, -1).contiguous())
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D = nn.Parameter(torch.ones(self.d_inner, device=device))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mix along the sequence.

        Args:
            hidden_states: (batch, length, d_model).
            inference_params: None, or a cache (`InferenceParams`). At `seqlen_offset` 0 the sequence starts afresh and
                leaves its states in the cache, later it goes on from them, by any number of tokens.

        Returns:
            (batch, length, d_model).
        """
        if inference_params is None:
            return self._mix(hidden_states, None, None, goes_on=False)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        goes_on = inference_params.seqlen_offset > 0
        if goes_on and hidden_states.shape[1] == 1:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        return self._mix(hidden_states, conv_state, ssm_state, goes_on=goes_on)

    def _mix(
        self, hidden_states: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, *, goes_on: bool
    ) -> Tensor:
        """Any number of tokens; states, if given, are overwritten, and with `goes_on` continued."""
        u, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        initial_conv = initial_ssm = None
        if goes_on:
            assert conv_state is not None
            assert ssm_state is not None
            # Copies: what autograd keeps must not be what is overwritten below.
            initial_conv = channels_last(conv_state[..., 1:]).to(u.dtype, copy=True)
            initial_ssm = ssm_state.to(torch.promote_types(ssm_state.dtype, torch.float32), copy=True)
        inputs = u
        convolved = ops.causal_conv1d(
            u, self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_conv, activation="silu"
        )
        assert isinstance(convolved, Tensor)
        dt, B, C = self._select(convolved)
        result = ops.selective_scan(
            convolved, dt, self.A, B, C, self.D, z, self.dt_proj.bias, initial_ssm, dt_softplus=True,
            return_final_state=True,
        )  # fmt: skip
        assert isinstance(result, tuple)
        y, final = result
        if conv_state is not None and ssm_state is not None:
            self._keep_inputs(conv_state, channels_last(inputs), goes_on)
            ssm_state.copy_(final)
        out: Tensor = self.out_proj(y)
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token.

        Args:
            hidden_states: (batch, 1, d_model).
            conv_state: (batch, d_inner, d_conv), updated in place.
            ssm_state: (batch, d_inner, d_state), updated in place.

        Returns:
            The output (batch, 1, d_model) and the two states.

        Raises:
            ArgumentError: more than one token.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            raise ArgumentError(
                f"hidden_states: got shape {tuple(hidden_states.shape)}, expected (batch, 1, d_model); forward takes "
                "more tokens at once"
            )
        u, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        u = causal_conv1d_update(u, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self._select(u)
        y = selective_state_update(ssm_state, u, dt, self.A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus (..., d_inner), B and C (..., d_state)."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    @property
    def A(self) -> Tensor:
        """(d_inner, d_state), negative, float32 at least."""
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return -torch.exp(self.A_log.to(wide))

    def _keep_inputs(self, conv_state: Tensor, inputs: Tensor, goes_on: bool) -> None:
        """The last d_conv inputs (batch, d_inner, length) into the state, after zeros or what was there."""
        length, width = inputs.shape[2], self.d_conv
        if length >= width:
            conv_state.copy_(inputs[..., length - width :])
            return
        before = conv_state[..., length:].clone() if goes_on else conv_state.new_zeros(()).expand_as(conv_state)
        conv_state.copy_(torch.cat([before[..., : width - length], inputs.to(conv_state.dtype)], dim=-1))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: conv_state (batch, d_inner, d_conv) in `dtype` (default: the weights'), ssm_state (batch,
        d_inner, d_state), which is float32 at least: a sum over a whole sequence in half precision would lose it.
        """
        device = self.out_proj.weight.device
        conv_dtype = self.conv1d.weight.dtype if dtype is None else dtype
        ssm_dtype = torch.promote_types(self.dt_proj.weight.dtype if dtype is None else dtype, torch.float32)
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=conv_dtype),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=ssm_dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ArgumentError("layer_idx: is None; give each layer its own number to keep states in a cache")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        conv_state, ssm_state = cache[self.layer_idx]
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state
