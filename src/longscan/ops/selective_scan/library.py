"""The selective scan as torch.library operators: what autograd, torch.compile, export and opcheck see.

The operators take normalised arguments (one activation dtype, B and C with a group axis or constant) and the name of
the backend asked for; the module that serves the call is found inside, from shapes, dtypes and devices alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, check_offsets, once_differentiable, values_are_checked

_SCAN = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
torch.library.define(
    "longscan::selective_scan", f"({_SCAN}, bool dt_softplus, bool save, str backend) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "longscan::selective_scan_backward",
    f"(Tensor dy, Tensor dfinal, {_SCAN}, Tensor checkpoints, bool dt_softplus, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "longscan::selective_state_update_",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, str backend) -> Tensor",
)
selective_scan = torch.ops.longscan.selective_scan.default
selective_state_update_ = torch.ops.longscan.selective_state_update_.default


def _check_A(A: Tensor) -> None:
    if not values_are_checked(A):
        return
    largest = (A.real if A.is_complex() else A).amax()
    # NaN compares false with everything: one pass finds both faults.
    if not largest <= 0:
        if torch.isnan(A).any():
            raise ArgumentError("A: holds NaN; every entry must be a number with real part at most 0")
        raise ArgumentError(
            f"A: has a real part of {float(largest):.4g}; allowed is at most 0, else the state grows without bound "
            "(parametrise it as A = -exp(A_log))"
        )


def _state_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    return torch.promote_types(ACCUMULATION[x.dtype], A.dtype)


def _num_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.impl("longscan::selective_scan", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, dt_softplus, save, backend = args
    x, A, cu_seqlens = tensors[0], tensors[2], tensors[9]
    _check_A(A)
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, x.shape[1])
    module = backends.resolve("selective_scan", backend, tensors)
    y, final, checkpoints = module.forward(*tensors, dt_softplus=dt_softplus, save=save)
    return y.contiguous(), final.contiguous(), checkpoints


@torch.library.register_fake("longscan::selective_scan")
def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, save, backend = args
    x, A, cu_seqlens = tensors[0], tensors[2], tensors[9]
    (batch, length, channels), state = x.shape, A.shape[1]
    sequences = _num_sequences(x, cu_seqlens)
    dtype = _state_dtype(x, A)
    module = backends.resolve("selective_scan", backend, tensors)
    shape = module.checkpoints_shape(batch * length, channels, state, sequences) if save else (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty((sequences, channels, state), dtype=dtype),
        x.new_empty(shape, dtype=dtype),
    )


@torch.library.impl("longscan::selective_scan_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, checkpoints, dt_softplus, backend = args
    module = backends.resolve("selective_scan", backend, tensors)
    if checkpoints.numel() == 0:
        _, _, checkpoints = module.forward(*tensors, dt_softplus=dt_softplus, save=True)
    grads = module.backward(dy, dfinal, *tensors, checkpoints, dt_softplus=dt_softplus)
    return tuple(dy.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@torch.library.register_fake("longscan::selective_scan_backward")
def _backward_fake(dy: Tensor, dfinal: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = args[:9]
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, dt_softplus, _, backend = inputs
    _, final, checkpoints = output
    ctx.save_for_backward(*tensors, checkpoints)
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)
    ctx.final_like = (final.shape, final.dtype)
    ctx.dt_softplus, ctx.backend = dt_softplus, backend


def _autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    x = tensors[0]
    if dy is None:
        dy = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if dfinal is None:
        shape, dtype = ctx.final_like
        dfinal = x.new_zeros(shape, dtype=dtype)
    grads = torch.ops.longscan.selective_scan_backward.default(
        dy, dfinal, *tensors, checkpoints, ctx.dt_softplus, ctx.backend
    )
    needed = (
        grad if tensor is not None and wanted else None
        for grad, tensor, wanted in zip(grads, tensors[:9], ctx.needs_input_grad[:9], strict=True)
    )
    return (*needed, None, None, None, None)


torch.library.register_autograd("longscan::selective_scan", _autograd, setup_context=_setup_context)
once_differentiable("selective_scan")


@torch.library.impl("longscan::selective_state_update_", "CompositeExplicitAutograd")
def _update(state: Tensor, *args: Any) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, backend = args
    _check_A(A)
    # Backends judge a step as a scan of length 1.
    as_scan = (x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None], dt_bias, state)
    module = backends.resolve("selective_scan", backend, (*as_scan, None))
    y: Tensor = module.update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
    return y.contiguous()


@torch.library.register_fake("longscan::selective_state_update_")
def _update_fake(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
