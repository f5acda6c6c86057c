"""The long convolution as torch.library operators: what autograd, torch.compile, export and opcheck see.

The operators take normalised arguments: u and the past of one dtype, the kernel in the precision of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import check_offsets, once_differentiable

_INPUTS = "Tensor u, Tensor kernel, Tensor? past, Tensor? cu_seqlens, str backend"
torch.library.define("longscan::long_conv", f"({_INPUTS}) -> Tensor")
torch.library.define("longscan::long_conv_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
long_conv = torch.ops.longscan.long_conv.default


@torch.library.impl("longscan::long_conv", "CompositeExplicitAutograd")
def _forward(u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, u.shape[1])
    module = backends.resolve("long_conv", backend, (u, kernel, past, cu_seqlens))
    with torch.autocast(u.device.type, enabled=False):
        y: Tensor = module.forward(u, kernel, past, cu_seqlens)
    return y.contiguous()


@torch.library.register_fake("longscan::long_conv")
def _forward_fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.impl("longscan::long_conv_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, backend = args
    module = backends.resolve("long_conv", backend, tensors)
    with torch.autocast(dy.device.type, enabled=False):
        grads = module.backward(dy, *tensors)
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@torch.library.register_fake("longscan::long_conv_backward")
def _backward_fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in args[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = backend


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.longscan.long_conv_backward.default(dy, *tensors, ctx.backend)
    needed = (
        grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[:3], strict=True)
    )  # fmt: skip
    return (*needed, None, None)


torch.library.register_autograd("longscan::long_conv", _autograd, setup_context=_setup_context)
once_differentiable("long_conv")
