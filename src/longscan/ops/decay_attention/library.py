"""The decay attention as torch.library operators: what autograd, torch.compile, export and opcheck see.

The operators take normalised arguments: q, k and v of one dtype, log-decays and states in the precision of the sums, in
which the output comes too if `wide`; else it is in v's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, check_offsets, once_differentiable, values_are_checked

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens"
torch.library.define("longscan::decay_attention", f"({_INPUTS}, bool wide, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "longscan::decay_attention_backward",
    f"(Tensor dy, Tensor dfinal, {_INPUTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "longscan::decay_attention_update_",
    "(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, str backend) -> Tensor",
)
decay_attention = torch.ops.longscan.decay_attention.default
decay_attention_update_ = torch.ops.longscan.decay_attention_update_.default


def _check_decay(log_decay: Tensor | None) -> None:
    if log_decay is None or not values_are_checked(log_decay):
        return
    largest = float(log_decay.amax())
    # NaN compares false with everything: one pass finds both faults.
    if not largest <= 0:
        raise ArgumentError(
            f"log_decay: has an entry of {largest:.4g}; allowed is at most 0, else the state grows without bound "
            "(it is the logarithm of the decay, such as torch.nn.functional.logsigmoid gives)"
        )


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (sequences, v.shape[2], q.shape[3], v.shape[3])


@torch.library.impl("longscan::decay_attention", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, wide, backend = args
    _check_decay(tensors[3])
    if tensors[5] is not None:
        check_offsets(tensors[5], tensors[0].shape[1])
    module = backends.resolve("decay_attention", backend, tensors)
    # Arguments have their dtypes already: products inside stay in that of the sums.
    with torch.autocast(tensors[0].device.type, enabled=False):
        y, final = module.forward(*tensors, wide=wide)
    return y.contiguous(), final.contiguous()


@torch.library.register_fake("longscan::decay_attention")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, v, _, _, cu_seqlens, wide, _ = args
    real = ACCUMULATION[q.dtype]
    return q.new_empty(v.shape, dtype=real if wide else v.dtype), q.new_empty(
        _state_shape(q, v, cu_seqlens), dtype=real
    )


@torch.library.impl("longscan::decay_attention_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, backend = args
    module = backends.resolve("decay_attention", backend, tensors)
    with torch.autocast(dy.device.type, enabled=False):
        grads = module.backward(dy, dfinal, *tensors)
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@torch.library.register_fake("longscan::decay_attention_backward")
def _backward_fake(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.wide, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    q, _, v, _, _, cu_seqlens = tensors
    real = ACCUMULATION[q.dtype]
    if dy is None:
        dy = torch.zeros(v.shape, dtype=real if ctx.wide else v.dtype, device=v.device)
    if dfinal is None:
        dfinal = torch.zeros(_state_shape(q, v, cu_seqlens), dtype=real, device=v.device)
    grads = torch.ops.longscan.decay_attention_backward.default(dy, dfinal, *tensors, ctx.backend)
    needed = (
        grad if tensor is not None and wanted else None
        for grad, tensor, wanted in zip(grads, tensors[:5], ctx.needs_input_grad[:5], strict=True)
    )
    return (*needed, None, None, None)


torch.library.register_autograd("longscan::decay_attention", _autograd, setup_context=_setup_context)
once_differentiable("decay_attention")


@torch.library.impl("longscan::decay_attention_update_", "CompositeExplicitAutograd")
def _update(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, backend: str) -> Tensor:
    _check_decay(log_decay)
    # Backends judge a step as a sequence of length 1.
    over_time = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, None]
    as_sequence = (q[:, None], k[:, None], v[:, None], over_time, state, None)
    module = backends.resolve("decay_attention", backend, as_sequence)
    with torch.autocast(q.device.type, enabled=False):
        y: Tensor = module.update(state, q, k, v, log_decay)
    return y.contiguous()


@torch.library.register_fake("longscan::decay_attention_update_")
def _update_fake(state: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return state.new_empty(v.shape)
