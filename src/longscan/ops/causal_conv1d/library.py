"""The causal convolution as torch.library operators: what autograd, torch.compile, export and opcheck see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import check_offsets, once_differentiable

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens"
torch.library.define("longscan::causal_conv1d", f"({_CONV}, bool silu, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "longscan::causal_conv1d_backward",
    f"(Tensor dy, Tensor dfinal, {_CONV}, bool silu, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "longscan::causal_conv1d_update_",
    "(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, str backend) -> Tensor",
)
causal_conv1d = torch.ops.longscan.causal_conv1d.default
causal_conv1d_update_ = torch.ops.longscan.causal_conv1d_update_.default


def _final_shape(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return sequences, weight.shape[1] - 1, x.shape[2]


@torch.library.impl("longscan::causal_conv1d", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, silu, backend = args
    if tensors[4] is not None:
        check_offsets(tensors[4], tensors[0].shape[1])
    module = backends.resolve("causal_conv1d", backend, tensors)
    y, final = module.forward(*tensors, silu=silu)
    return y.contiguous(), final.contiguous()


@torch.library.register_fake("longscan::causal_conv1d")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, _, _, cu_seqlens = args[:5]
    return x.new_empty(x.shape), x.new_empty(_final_shape(x, weight, cu_seqlens))


@torch.library.impl("longscan::causal_conv1d_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, silu, backend = args
    module = backends.resolve("causal_conv1d", backend, tensors)
    grads = module.backward(dy, dfinal, *tensors, silu=silu)
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@torch.library.register_fake("longscan::causal_conv1d_backward")
def _backward_fake(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, silu, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.silu, ctx.backend = silu, backend


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if dfinal is None:
        dfinal = x.new_zeros(_final_shape(x, weight, cu_seqlens))
    grads = torch.ops.longscan.causal_conv1d_backward.default(
        dy, dfinal, x, weight, bias, initial_state, cu_seqlens, ctx.silu, ctx.backend
    )
    inputs = (x, weight, bias, initial_state)
    needed = (
        grad if tensor is not None and wanted else None
        for grad, tensor, wanted in zip(grads, inputs, ctx.needs_input_grad[:4], strict=True)
    )
    return (*needed, None, None, None)


torch.library.register_autograd("longscan::causal_conv1d", _autograd, setup_context=_setup_context)
once_differentiable("causal_conv1d")


@torch.library.impl("longscan::causal_conv1d_update_", "CompositeExplicitAutograd")
def _update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str) -> Tensor:
    module = backends.resolve("causal_conv1d", backend, (x[:, None], weight, bias, state, None))
    y: Tensor = module.update(state, x, weight, bias, silu=silu)
    return y.contiguous()


@torch.library.register_fake("longscan::causal_conv1d_update_")
def _update_fake(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
