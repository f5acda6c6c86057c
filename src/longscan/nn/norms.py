"""Norms, alone or with the addition to a residual stream: of the root mean square, which is fused, and layer norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.ops.add_rms_norm import add_rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich 2019), computed in float32."""

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) to the same shape."""
        normed, _ = add_rms_norm(x, self.weight, eps=self.eps, residual_dtype=x.dtype)
        return normed

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class AddRMSNorm(RMSNorm):
    """The sum of a branch and a residual stream, and its RMS norm, in one pass."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, residual_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """x, residual (..., d_model) to the norm of their sum and the sum itself, in ``residual_dtype``.

        A residual of None is one of zeros: the stream begins with x.
        """
        return add_rms_norm(x, self.weight, residual, eps=self.eps, residual_dtype=residual_dtype)


class AddLayerNorm(nn.LayerNorm):
    """The sum of a branch and a residual stream, and its layer norm (Ba, Kiros and Hinton 2016), in float32."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, residual_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`AddRMSNorm.forward`."""
        total = (x if residual is None else x + residual).to(residual_dtype)
        wide = torch.promote_types(total.dtype, torch.float32)
        normed = F.layer_norm(total.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return normed.to(x.dtype), total


#: Name in configurations -> the sum of a branch and a residual stream, and its norm.
ADD_NORMS: dict[str, type[AddRMSNorm] | type[AddLayerNorm]] = {"rms": AddRMSNorm, "layer": AddLayerNorm}
