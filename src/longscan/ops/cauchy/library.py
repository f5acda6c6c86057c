"""The Cauchy product as a torch.library operator: what autograd, torch.compile and opcheck see.

It takes normalised arguments of one complex dtype: v (products, channels, N), z (length,) and w (channels, N). Nothing
but them is kept for the backward pass; z is a grid, and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import once_differentiable

torch.library.define("longscan::cauchy", "(Tensor v, Tensor z, Tensor w, str backend) -> Tensor")
torch.library.define(
    "longscan::cauchy_backward", "(Tensor dy, Tensor v, Tensor z, Tensor w, str backend) -> (Tensor, Tensor)"
)
cauchy = torch.ops.longscan.cauchy.default


@torch.library.impl("longscan::cauchy", "CompositeExplicitAutograd")
def _forward(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    module = backends.resolve("cauchy", backend, (v, w))
    with torch.autocast(v.device.type, enabled=False):
        y: Tensor = module.product(v.resolve_conj(), z.resolve_conj(), w.resolve_conj())
    return y.contiguous()


@torch.library.register_fake("longscan::cauchy")
def _forward_fake(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    return v.new_empty((*v.shape[:2], z.shape[0]))


@torch.library.impl("longscan::cauchy_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, v: Tensor, z: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    module = backends.resolve("cauchy", backend, (v, w))
    with torch.autocast(v.device.type, enabled=False):
        first, second = module.transpose(dy.resolve_conj(), z.resolve_conj(), w.resolve_conj())
        return first.contiguous(), (torch.conj_physical(v) * second).sum(0)


@torch.library.register_fake("longscan::cauchy_backward")
def _backward_fake(dy: Tensor, v: Tensor, z: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), w.new_empty(w.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, z, w, ctx.backend = inputs
    ctx.save_for_backward(v, z, w)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dv, dw = torch.ops.longscan.cauchy_backward.default(dy, *ctx.saved_tensors, ctx.backend)
    needs = ctx.needs_input_grad
    return dv if needs[0] else None, None, dw if needs[2] else None, None


torch.library.register_autograd("longscan::cauchy", _autograd, setup_context=_setup_context)
once_differentiable("cauchy")
