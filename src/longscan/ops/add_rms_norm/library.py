"""The fused residual sum and RMSNorm as torch.library operators: what autograd, torch.compile and opcheck see.

They take x and residual as (tokens, channels) and the weight in the accumulation dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import once_differentiable

torch.library.define(
    "longscan::add_rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType residual_dtype, str backend) -> "
    "(Tensor, Tensor, Tensor)",
)
torch.library.define(
    "longscan::add_rms_norm_backward",
    "(Tensor dnormed, Tensor dresidual_out, Tensor residual_out, Tensor weight, Tensor rstd, ScalarType x_dtype, "
    "bool has_residual, str backend) -> (Tensor, Tensor, Tensor)",
)
add_rms_norm = torch.ops.longscan.add_rms_norm.default


@torch.library.impl("longscan::add_rms_norm", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.resolve("add_rms_norm", backend, (x, weight, residual))
    normed, residual_out, rstd = module.forward(x, weight, residual, eps=eps, residual_dtype=residual_dtype)
    return normed.contiguous(), residual_out.contiguous(), rstd


@torch.library.register_fake("longscan::add_rms_norm")
def _forward_fake(
    x: Tensor, weight: Tensor, _: Tensor | None, eps: float, residual_dtype: torch.dtype, backend: str
) -> Any:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=residual_dtype),
        x.new_empty(x.shape[:1], dtype=weight.dtype),
    )


@torch.library.impl("longscan::add_rms_norm_backward", "CompositeExplicitAutograd")
def _backward(
    dnormed: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.resolve("add_rms_norm", backend, (dnormed, weight, residual_out))
    dx, dweight, dresidual = module.backward(dnormed, dresidual_out, residual_out, weight, rstd, x_dtype, has_residual)
    return dx.contiguous(), dweight.contiguous(), dx.new_empty(0) if dresidual is None else dresidual.contiguous()


@torch.library.register_fake("longscan::add_rms_norm_backward")
def _backward_fake(
    dnormed: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = residual_out.shape
    dresidual = residual_out.new_empty(shape) if has_residual else dnormed.new_empty(0, dtype=x_dtype)
    return dnormed.new_empty(shape, dtype=x_dtype), weight.new_empty(weight.shape), dresidual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, _, _, backend = inputs
    _, residual_out, rstd = output
    ctx.save_for_backward(residual_out, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.x_dtype, ctx.has_residual, ctx.backend = x.dtype, residual is not None, backend


def _autograd(ctx: Any, dnormed: Tensor | None, dresidual_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    residual_out, weight, rstd = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(residual_out, dtype=ctx.x_dtype)
    if dresidual_out is None:
        dresidual_out = torch.zeros_like(residual_out)
    dx, dweight, dresidual = torch.ops.longscan.add_rms_norm_backward.default(
        dnormed, dresidual_out, residual_out, weight, rstd, ctx.x_dtype, ctx.has_residual, ctx.backend
    )
    return dx, dweight, dresidual if ctx.has_residual else None, None, None, None


torch.library.register_autograd("longscan::add_rms_norm", _autograd, setup_context=_setup_context)
once_differentiable("add_rms_norm")
