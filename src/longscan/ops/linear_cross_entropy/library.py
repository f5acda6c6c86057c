"""The head's cross entropy as a torch.library operator: what autograd, torch.compile and opcheck see.

It takes hidden as (places, channels) and gives the sum of the losses; with `save` also the sum's gradients, which the
backward pass only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, once_differentiable

torch.library.define(
    "longscan::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int vocab_size, bool save, str backend) -> "
    "(Tensor, Tensor, Tensor)",
)
torch.library.define(
    "longscan::linear_cross_entropy_backward",
    "(Tensor dtotal, Tensor dhidden, Tensor dweight) -> (Tensor, Tensor)",
)
linear_cross_entropy = torch.ops.longscan.linear_cross_entropy.default


@torch.library.impl("longscan::linear_cross_entropy", "CompositeExplicitAutograd")
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.resolve("linear_cross_entropy", backend, (hidden, weight))
    total, dhidden, dweight = module.forward(hidden, weight, targets, vocab_size=vocab_size, save=save)
    nothing = hidden.new_empty(0) if dhidden is None or dweight is None else None
    return total, dhidden if nothing is None else nothing, dweight if nothing is None else nothing.clone()


@torch.library.register_fake("longscan::linear_cross_entropy")
def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=ACCUMULATION[hidden.dtype])
    if not save:
        return total, hidden.new_empty(0), hidden.new_empty(0)
    return total, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


@torch.library.impl("longscan::linear_cross_entropy_backward", "CompositeExplicitAutograd")
def _backward(dtotal: Tensor, dhidden: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return (dhidden * dtotal).to(dhidden.dtype), (dweight * dtotal).to(dweight.dtype)


@torch.library.register_fake("longscan::linear_cross_entropy_backward")
def _backward_fake(dtotal: Tensor, dhidden: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return dhidden.new_empty(dhidden.shape), dweight.new_empty(dweight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)


def _autograd(ctx: Any, dtotal: Tensor, *_: Any) -> tuple[Any, ...]:
    dhidden, dweight = torch.ops.longscan.linear_cross_entropy_backward.default(dtotal, *ctx.saved_tensors)
    needs = ctx.needs_input_grad
    return dhidden if needs[0] else None, dweight if needs[1] else None, None, None, None, None


torch.library.register_autograd("longscan::linear_cross_entropy", _autograd, setup_context=_setup_context)
once_differentiable("linear_cross_entropy")
