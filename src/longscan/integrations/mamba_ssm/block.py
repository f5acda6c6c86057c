"""`mamba_ssm.modules.block.Block` and `mamba_ssm.modules.mlp.GatedMLP`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.norm import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """Add, norm, mixer and, if wanted, add, norm, MLP; takes and gives the last branch and the stream before it.

    Args:
        dim: width of the stream.
        mixer_cls, mlp_cls, norm_cls: called with `dim`; an `mlp_cls` of `nn.Identity` means no MLP
            (mamba-ssm 1 has no such argument).
        fused_add_norm: add and norm in one pass; the norm is then a layer norm or an `RMSNorm`.
        residual_in_fp32: keep the stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise ArgumentError(
                f"norm_cls: makes a {type(self.norm).__name__}; with fused_add_norm a LayerNorm or RMSNorm is needed"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual (batch, length, dim) to the same two; a residual of None begins the stream."""
        hidden_states, residual = self._add_and_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_and_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_norm(self, norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            y, stream = layer_norm_fn(
                x, norm.weight, norm.bias, residual=residual, prenorm=True, residual_in_fp32=self.residual_in_fp32,
                eps=norm.eps, is_rms_norm=isinstance(norm, RMSNorm),
            )  # fmt: skip
            return y, stream
        stream = x if residual is None else x + residual
        y = norm(stream.to(norm.weight.dtype))
        return y, stream.to(torch.float32) if self.residual_in_fp32 else stream

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's cache."""
        return self.mixer.allocate_inference_cache(  # type: ignore[operator]
            batch_size, max_seqlen, dtype=dtype, **kwargs
        )


class GatedMLP(nn.Module):
    """``fc2(a * activation(b))`` with ``a, b = fc1(x)``; the hidden width is rounded up to a multiple."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out
