"""The Vandermonde product and its transpose as torch.library operators: what autograd, torch.compile and opcheck see.

They take normalised arguments: weights (batch, channels, N) and log_A_bar (channels, N) of one complex dtype, values
(batch, channels, length) of the real one that goes with it. Nothing but arguments is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import REAL, once_differentiable

torch.library.define("longscan::vandermonde", "(Tensor weights, Tensor log_A_bar, int length, str backend) -> Tensor")
torch.library.define(
    "longscan::vandermonde_backward",
    "(Tensor dkernel, Tensor weights, Tensor log_A_bar, str backend) -> (Tensor, Tensor)",
)
torch.library.define("longscan::vandermonde_transpose", "(Tensor values, Tensor log_A_bar, str backend) -> Tensor")
torch.library.define(
    "longscan::vandermonde_transpose_backward",
    "(Tensor dsums, Tensor values, Tensor log_A_bar, str backend) -> (Tensor, Tensor)",
)
vandermonde = torch.ops.longscan.vandermonde.default
vandermonde_transpose = torch.ops.longscan.vandermonde_transpose.default


def _backend(name: str, first: Tensor, log_A_bar: Tensor) -> Any:
    return backends.resolve("vandermonde", name, (first, log_A_bar))


@torch.library.impl("longscan::vandermonde", "CompositeExplicitAutograd")
def _product(weights: Tensor, log_A_bar: Tensor, length: int, backend: str) -> Tensor:
    with torch.autocast(weights.device.type, enabled=False):
        kernel: Tensor = _backend(backend, weights, log_A_bar).product(weights, log_A_bar, length)
    return kernel.contiguous()


@torch.library.register_fake("longscan::vandermonde")
def _product_fake(weights: Tensor, log_A_bar: Tensor, length: int, backend: str) -> Tensor:
    return weights.new_empty((*weights.shape[:2], length), dtype=REAL[weights.dtype])


@torch.library.impl("longscan::vandermonde_backward", "CompositeExplicitAutograd")
def _product_backward(dkernel: Tensor, weights: Tensor, log_A_bar: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(weights.device.type, enabled=False):
        sums, slopes = _backend(backend, weights, log_A_bar).moments(dkernel, log_A_bar, True)
        return torch.conj_physical(2 * sums), torch.conj_physical((2 * weights * slopes).sum(0))


@torch.library.register_fake("longscan::vandermonde_backward")
def _product_backward_fake(dkernel: Tensor, weights: Tensor, log_A_bar: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), log_A_bar.new_empty(log_A_bar.shape)


@torch.library.impl("longscan::vandermonde_transpose", "CompositeExplicitAutograd")
def _moments(values: Tensor, log_A_bar: Tensor, backend: str) -> Tensor:
    with torch.autocast(values.device.type, enabled=False):
        sums: Tensor = _backend(backend, values, log_A_bar).moments(values, log_A_bar, False)[0]
    return sums.contiguous()


@torch.library.register_fake("longscan::vandermonde_transpose")
def _moments_fake(values: Tensor, log_A_bar: Tensor, backend: str) -> Tensor:
    return log_A_bar.new_empty((values.shape[0], *log_A_bar.shape))


@torch.library.impl("longscan::vandermonde_transpose_backward", "CompositeExplicitAutograd")
def _moments_backward(dsums: Tensor, values: Tensor, log_A_bar: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    module = _backend(backend, values, log_A_bar)
    with torch.autocast(values.device.type, enabled=False):
        dvalues = module.product(torch.conj_physical(dsums), log_A_bar, values.shape[-1]) / 2
        slopes = module.moments(values, log_A_bar, True)[1]
        return dvalues, (dsums * torch.conj_physical(slopes)).sum(0)


@torch.library.register_fake("longscan::vandermonde_transpose_backward")
def _moments_backward_fake(dsums: Tensor, values: Tensor, log_A_bar: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), log_A_bar.new_empty(log_A_bar.shape)


def _setup_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, log_A_bar, _, ctx.backend = inputs
    ctx.save_for_backward(weights, log_A_bar)


def _product_autograd(ctx: Any, dkernel: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.longscan.vandermonde_backward.default(dkernel, *ctx.saved_tensors, ctx.backend)
    return *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)), None, None


def _setup_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, log_A_bar, ctx.backend = inputs
    ctx.save_for_backward(values, log_A_bar)


def _moments_autograd(ctx: Any, dsums: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.longscan.vandermonde_transpose_backward.default(dsums, *ctx.saved_tensors, ctx.backend)
    return *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=False)), None


torch.library.register_autograd("longscan::vandermonde", _product_autograd, setup_context=_setup_product)
torch.library.register_autograd("longscan::vandermonde_transpose", _moments_autograd, setup_context=_setup_moments)
once_differentiable("vandermonde")
once_differentiable("vandermonde_transpose")
