"""`mamba_ssm.ops.triton.layer_norm`: residual sum and norm, by our operator where it has the case."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.layouts import without_autocast
from longscan.ops.add_rms_norm import add_rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    r"""Adds branches to the residual stream and normalises the sum.

    .. math:: r' = \mathrm{drop}(s\,x) + \mathrm{drop}(x_1) + r, \qquad y = \mathrm{norm}(r') \odot w + b

    Args:
        x, x1: (..., channels), the branches.
        weight, bias: (channels,), of y.
        weight1, bias1: (channels,), of a second output y1 of the same norm.
        residual: (..., channels), the stream.
        eps: added to the variance (layer norm) or the mean square.
        dropout_p: probability that an entry of a branch is dropped, by PyTorch's generator.
        rowscale: (...), one factor per vector of x; not together with x1.
        prenorm: also return r'.
        residual_in_fp32: with no residual, keep r' in float32; else it keeps the residual's dtype.
        is_rms_norm: root-mean-square norm instead of layer norm.
        return_dropout_mask: also return which entries of x and of x1 were kept (None without dropout).

    Returns:
        y in x's dtype; then, where asked for, y1, r', and the two masks. Arithmetic is float32 (float64 for float64).

    Raises:
        ArgumentError: x1 and rowscale together, or a shape or dtype that is not allowed.
    """
    if x1 is not None and rowscale is not None:
        raise ArgumentError("rowscale: is for x alone, it cannot be given together with x1")
    kept = x.dtype if residual is None else residual.dtype
    if residual is None and residual_in_fp32:
        kept = torch.float32
    plain = x1 is None and weight1 is None and rowscale is None and not dropout_p
    if plain and is_rms_norm and bias is None:
        with without_autocast(x):
            y, stream = add_rms_norm(x, weight, residual, eps=eps, residual_dtype=kept)
        outputs: tuple[Any, ...] = (y, stream) if prenorm else (y,)
        masks: tuple[Tensor | None, Tensor | None] = (None, None)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            total, masks = _branches(x.to(wide), None if x1 is None else x1.to(wide), rowscale, dropout_p)
            total = total if residual is None else total + residual
            outputs = (_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype),)
            if weight1 is not None:
                outputs += (_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype),)
        if prenorm:
            outputs += (total.to(kept),)
    if return_dropout_mask:
        outputs += masks
    return outputs[0] if len(outputs) == 1 else outputs


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """`layer_norm_fn` with the root-mean-square norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; with `residual` the sum is normalised (`rms_norm_fn`)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """x (..., hidden_size) to its norm, and with `prenorm` the sum."""
        dropped = self.drop.p if self.drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, None, residual=residual, eps=self.eps, dropout_p=dropped, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _branches(
    x: Tensor, x1: Tensor | None, rowscale: Tensor | None, dropout_p: float
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The sum of the branches after scale and dropout, and the masks of what was kept."""
    if rowscale is not None:
        x = x * rowscale[..., None]
    x, mask = _drop(x, dropout_p)
    if x1 is None:
        return x, (mask, None)
    x1, mask1 = _drop(x1, dropout_p)
    return x + x1, (mask, mask1)


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    if not p:
        return x, None
    kept = torch.rand(x.shape, device=x.device) >= p
    return torch.where(kept, x / (1 - p), 0), kept


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    shift = None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), shift, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return normed if shift is None else normed + shift
